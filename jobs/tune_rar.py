"""Compare settings of a round's RAR with Ray Tune, from the same start, by the gain in reward on held-out prompts."""

from __future__ import annotations

import sys

from afmrl_ray.commands.tune_generator import main

if __name__ == "__main__":
    sys.exit(main())
