"""Train the encoder of a round by attribute-guided contrastive learning."""

from __future__ import annotations

import sys

from afmrl_ray.commands.stages import train_encoder as main

if __name__ == "__main__":
    sys.exit(main())
