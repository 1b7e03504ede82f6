"""All benchmarks of stage 2 in one table."""

from __future__ import annotations

import argparse
import importlib
import sys

import torch
from harness import show, write

PARTS = ("rar_reward",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part alone; may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(2)
    found = []
    for part in options.only or PARTS:
        print(f"{part} ...", file=sys.stderr)
        found += importlib.import_module(part).comparisons()
        # After every part, so that one that fails does not lose what the others measured.
        path = write("rar", found, ["torch", "transformers", "deepspeed", "ray"])
    show(found)
    print(f"-> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
