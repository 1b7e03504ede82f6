"""Reinforce the generator of a round with the retrieval of the frozen encoder."""

from __future__ import annotations

import sys

from afmrl_ray.commands.stages import train_generator as main

if __name__ == "__main__":
    sys.exit(main())
