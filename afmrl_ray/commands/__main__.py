"""`python -m afmrl_ray.commands`, the same as `afmrl`."""

from __future__ import annotations

import sys

from afmrl_ray.commands import main

if __name__ == "__main__":
    sys.exit(main())
