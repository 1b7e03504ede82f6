"""Side-by-side timings: results are checked for equality first, then both sides are timed in turn.

A set of benchmarks prints a table and writes `runs/bench/NAME.json`.
"""

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
    """Our implementation against another one.

    Attributes:
        name: what was measured, with its sizes.
        against: the other implementation.
        ours: median of ours.
        peer: median of the other one.
        ratio: ours / peer if `at_most`, else peer / ours.
        target: limit of the ratio.
        at_most: whether the target is an upper limit.
        reached: whether the ratio is within the target.
        unit: unit of `ours` and `peer`.
        samples: (ours, peer) of every repeat.
        equality: result of the equality check.
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
    """Call both in turn, `repeats` times after `warmups` calls; each call returns a measurement in `unit`."""
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
    """The comparison of (ours, peer) measurements by their medians."""
    mine, theirs = (statistics.median(column) for column in zip(*samples, strict=True))
    ratio = mine / theirs if at_most else theirs / mine
    reached = ratio <= target if at_most else ratio >= target
    return Comparison(name, against, mine, theirs, ratio, target, at_most, reached, unit, list(samples), equality)


def seconds(work: Callable[[], Any]) -> Callable[[], float]:
    """A function that measures the seconds of a call of `work`."""

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
        name: name of the set; the JSON file is `runs/bench/<name>.json`.
        description: first line of `--help`.
        parts: modules of `jobs.benchmarks`, each with a function `comparisons()`.
        peers: packages without which parts run with fewer comparisons.
        needed: package without which a part cannot run, by part.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", choices=parts, action="append", help="run this part only; may be repeated")
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
        found += importlib.import_module(f"jobs.benchmarks.{part}").comparisons()
        # After every part, so that a failing part does not lose the results of the others.
        write(name, found, ["torch", "transformers", "deepspeed", "ray"])
    show(found)
    print(f"-> {FOLDER / f'{name}.json'}")
    return 0


def write(name: str, comparisons: Sequence[Comparison], packages: Sequence[str]) -> Path:
    """Write the JSON file, with versions of Python and of some packages; returns its path."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    versions = {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
    path.write_text(json.dumps([{**asdict(c), "versions": versions} for c in comparisons], indent=2) + "\n")
    return path


def show(comparisons: Sequence[Comparison]) -> None:
    """Print the comparisons, then their samples and equality checks."""
    # Imported here, so that processes whose memory is measured do not load the report's packages.
    from afmrl_ray.report.text_table import TextTable, print_tables

    ratios, samples = rows(comparisons)
    columns = ["", "against", "ours", "peer", "ratio", "target", "reached"]
    print_tables(
        [
            TextTable("comparisons", columns, ratios, left=2),
            TextTable("samples", ["", "against", "equality check", "repeats", "ours", "peer"], samples, left=3),
        ]
    )


def rows(comparisons: Sequence[Comparison]) -> tuple[list[list[str]], list[list[str]]]:
    """Cells of the two tables: medians with ratio and target; equality check, number of repeats and ranges."""
    ratios, samples = [], []
    for c in comparisons:
        medians = [_amount(c.ours, c.unit), _amount(c.peer, c.unit)]
        target = f"{'<=' if c.at_most else '>='} {c.target:.3g}"
        ratios.append([c.name, c.against, *medians, f"{c.ratio:.3g}", target, "yes" if c.reached else "NO"])
        ranges = [
            f"{_amount(min(side), c.unit)} to {_amount(max(side), c.unit)}" for side in zip(*c.samples, strict=True)
        ]
        samples.append([c.name, c.against, c.equality, f"{len(c.samples)}", *ranges])
    return ratios, samples


def _amount(value: float, unit: str) -> str:
    return f"{value * 1e3:.1f} ms" if unit == "s" else f"{value:.1f} {unit}"
