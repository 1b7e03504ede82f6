"""All benchmarks of stage 1 in one table; those whose peer is not installed are left out, loudly."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys

import torch
from harness import show, write

PARTS = ("agcl_loss", "bm25", "agcl_step", "agcl_train", "agcl_memory", "retrieval")
PEERS = ("sentence_transformers", "bm25s", "faiss")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part alone; may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(2)
    for peer in PEERS:
        if importlib.util.find_spec(peer) is None:
            print(
                f"{peer} is not installed: nothing is compared with it (make bench-agcl installs it)", file=sys.stderr
            )
    found = []
    for part in options.only or PARTS:
        print(f"{part} ...", file=sys.stderr)
        found += importlib.import_module(part).comparisons()
        # After every part, so that one that fails does not lose what the others measured.
        path = write("agcl", found, ["torch", "transformers", "deepspeed", "ray"])
    show(found)
    print(f"-> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
