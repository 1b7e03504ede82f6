"""Evaluate a round with every protocol."""

from __future__ import annotations

import sys

from afmrl_ray.commands.stages import evaluate as main

if __name__ == "__main__":
    sys.exit(main())
