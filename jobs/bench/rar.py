"""All benchmarks of stage 2 in one table; those whose peer is not installed are left out, loudly."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys

import torch
from harness import show, write

PARTS = ("rar_rollout", "rar_reward", "rar_step", "rar_latency", "rar_scaling")
PEERS = {"rar_step": "trl"}
"""Parts that cannot be run without a peer."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part alone; may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(2)
    found = []
    path = None
    for part in options.only or PARTS:
        peer = PEERS.get(part)
        if peer and importlib.util.find_spec(peer) is None:
            print(f"{peer} is not installed: {part} is left out (make bench-rar installs it)", file=sys.stderr)
            continue
        print(f"{part} ...", file=sys.stderr)
        found += importlib.import_module(part).comparisons()
        # After every part, so that one that fails does not lose what the others measured.
        path = write("rar", found, ["torch", "transformers", "deepspeed", "ray"])
    show(found)
    print(f"-> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
