"""Cyclic iterative training: distillation, then rounds of AGCL and RAR, evaluation and report."""

from __future__ import annotations

import sys

from afmrl_ray.commands.run import main

if __name__ == "__main__":
    sys.exit(main())
