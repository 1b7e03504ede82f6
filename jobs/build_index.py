"""Build the index of a round: embed its gallery for `afmrl_ray.serving` to search."""

from __future__ import annotations

import sys

from afmrl_ray.commands.index import main

if __name__ == "__main__":
    sys.exit(main())
