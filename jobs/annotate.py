"""Write attributes for the catalogue with the generator that a round starts from."""

from __future__ import annotations

import sys

from afmrl_ray.commands.stages import annotate as main

if __name__ == "__main__":
    sys.exit(main())
