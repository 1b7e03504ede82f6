"""Fine-tune the generator on the teacher's attributes."""

from __future__ import annotations

import sys

from afmrl_ray.commands.stages import distill as main

if __name__ == "__main__":
    sys.exit(main())
