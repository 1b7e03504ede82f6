"""All benchmarks of stage 2 in one table; those whose peer is not installed are left out, with a message."""

from __future__ import annotations

import sys

from jobs.benchmarks.harness import run_parts

PARTS = ("rar_rollout", "rar_reward", "rar_step", "rar_latency", "rar_scaling")

if __name__ == "__main__":
    sys.exit(run_parts("rar", __doc__ or "", PARTS, needed={"rar_step": "trl"}))
