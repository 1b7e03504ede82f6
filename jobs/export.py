"""Write a trained encoder or generator as one ordinary checkpoint, adapters merged into their base."""

from __future__ import annotations

import sys

from afmrl_ray.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
