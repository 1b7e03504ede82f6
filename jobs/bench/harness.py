"""Side-by-side measurements: equal results first, then both sides in turn; a table and `runs/bench/NAME.json`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

FOLDER = Path("runs/bench")


@dataclass(frozen=True)
class Comparison:
    """Ours against a peer.

    Attributes:
        name: what was measured, with its sizes.
        against: the peer.
        ours: median.
        peer: median.
        ratio: ours / peer where less is better, else peer / ours.
        target: what the ratio is to reach.
        at_most: whether the target is an upper limit.
        reached: whether it was reached.
        unit: of `ours` and `peer`.
        samples: (ours, peer) of every repeat.
        equality: what was checked before, and how well it held.
    """

    name: str
    against: str
    ours: float
    peer: float
    ratio: float
    target: float
    at_most: bool
    reached: bool
    unit: str
    samples: list[tuple[float, float]]
    equality: str


def compare(
    name: str,
    against: str,
    ours: Callable[[], float],
    peer: Callable[[], float],
    *,
    target: float,
    equality: str,
    at_most: bool = True,
    repeats: int = 7,
    warmups: int = 1,
    unit: str = "s",
) -> Comparison:
    """Call both in turn, `repeats` times after `warmups`; each call returns what it measured."""
    for _ in range(warmups):
        ours(), peer()
    samples = [(ours(), peer()) for _ in range(repeats)]
    return comparison(name, against, samples, target=target, at_most=at_most, unit=unit, equality=equality)


def comparison(
    name: str,
    against: str,
    samples: Sequence[tuple[float, float]],
    *,
    target: float,
    equality: str,
    at_most: bool = True,
    unit: str = "s",
) -> Comparison:
    """Medians and their ratio."""
    mine, theirs = (statistics.median(column) for column in zip(*samples, strict=True))
    ratio = mine / theirs if at_most else theirs / mine
    reached = ratio <= target if at_most else ratio >= target
    return Comparison(name, against, mine, theirs, ratio, target, at_most, reached, unit, list(samples), equality)


def seconds(work: Callable[[], Any]) -> Callable[[], float]:
    """A measurement: how long `work` takes."""

    def measure() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return measure


def run_parts(
    name: str,
    description: str,
    parts: Sequence[str],
    *,
    peers: Sequence[str] = (),
    needed: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Command line of a set of benchmarks: run all parts or those of `--only`, and print one table.

    Args:
        name: of the set; the JSON is `runs/bench/<name>.json`.
        description: first line of `--help`.
        parts: modules, each with `comparisons()`.
        peers: packages without which parts run with fewer comparisons.
        needed: package without which a part cannot run, by part.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", choices=parts, action="append", help="run this part alone; may be repeated")
    asked = parser.parse_args().only or parts
    torch.set_num_threads(2)
    for peer in [peer for peer in peers if importlib.util.find_spec(peer) is None]:
        print(f"{peer} is not installed: nothing is compared with it (make bench-{name} installs it)", file=sys.stderr)
    found: list[Comparison] = []
    for part in asked:
        if part in needed and importlib.util.find_spec(needed[part]) is None:
            print(f"{needed[part]} is not installed: {part} is left out (make bench-{name})", file=sys.stderr)
            continue
        print(f"{part} ...", file=sys.stderr)
        found += importlib.import_module(part).comparisons()
        # After every part, so that one that fails does not lose what the others measured.
        write(name, found, ["torch", "transformers", "deepspeed", "ray"])
    show(found)
    print(f"-> {FOLDER / f'{name}.json'}")
    return 0


def write(name: str, comparisons: Sequence[Comparison], packages: Sequence[str]) -> Path:
    """Write the JSON."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    versions = {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
    path.write_text(json.dumps([{**asdict(c), "versions": versions} for c in comparisons], indent=2) + "\n")
    return path


def show(comparisons: Sequence[Comparison]) -> None:
    """Print the table."""
    print(f"\n{'what':<58} {'against':<30} {'ours':>10} {'peer':>10} {'ratio':>7} {'target':>8}")
    for c in comparisons:
        sign = "<=" if c.at_most else ">="
        mark = "" if c.reached else "  NOT REACHED"
        print(
            f"{c.name:<58} {c.against:<30} {_amount(c.ours, c.unit):>10} {_amount(c.peer, c.unit):>10} {c.ratio:>7.3g} "
            f"{sign}{c.target:>6.3g}{mark}"
        )
        for label, column in zip(("ours", "peer"), zip(*c.samples, strict=True), strict=True):
            print(
                f"    {label} {_amount(min(column), c.unit)} to {_amount(max(column), c.unit)} of {len(column)}", end=""
            )
        print(f"; {c.equality}")


def _amount(value: float, unit: str) -> str:
    return f"{value * 1e3:.1f} ms" if unit == "s" else f"{value:.1f} {unit}"
