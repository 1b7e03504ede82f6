"""The harness of the benchmarks: ratios, targets, tables, JSON, parts."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from jobs.benchmarks import agcl, harness, rar
from jobs.benchmarks.harness import Comparison, compare, comparison

SAMPLES = [(2.0, 8.0), (1.0, 4.0), (4.0, 5.0)]


def test_medians_are_compared_with_the_target() -> None:
    less = comparison("name", "peer", SAMPLES, target=0.4, equality="equal")
    assert (less.ours, less.peer, less.ratio, less.reached) == (2.0, 5.0, 0.4, True)
    assert not comparison("name", "peer", SAMPLES, target=0.39, equality="equal").reached
    more = comparison("name", "peer", SAMPLES, target=2.5, at_most=False, equality="equal")
    assert (more.ratio, more.reached) == (2.5, True)
    assert not comparison("name", "peer", SAMPLES, target=2.6, at_most=False, equality="equal").reached


def test_both_sides_are_called_in_turn_after_the_warm_up() -> None:
    calls: list[str] = []

    def measure(side: str) -> float:
        calls.append(side)
        return float(len(calls))

    found = compare(
        "x", "y", lambda: measure("ours"), lambda: measure("peer"), target=1, equality="", repeats=2, warmups=1
    )
    assert calls == ["ours", "peer"] * 3
    assert found.samples == [(3.0, 4.0), (5.0, 6.0)]


def test_the_tables_have_medians_ratio_target_and_ranges() -> None:
    slow = comparison("slow", "loop", SAMPLES, target=0.1, equality="equal within 1e-7")
    memory = comparison("memory", "64 pairs", [(300.0, 200.0)], target=2, at_most=True, unit="MiB", equality="same")
    ratios, samples = harness.rows([slow, memory])
    assert ratios == [
        ["slow", "loop", "2000.0 ms", "5000.0 ms", "0.4", "<= 0.1", "NO"],
        ["memory", "64 pairs", "300.0 MiB", "200.0 MiB", "1.5", "<= 2", "yes"],
    ]
    assert samples[0] == ["slow", "loop", "equal within 1e-7", "3", "1000.0 ms to 4000.0 ms", "4000.0 ms to 8000.0 ms"]


@pytest.mark.parametrize("part", [*agcl.PARTS, *rar.PARTS])
def test_every_part_is_a_module_with_comparisons(part: str) -> None:
    assert callable(import_module(f"jobs.benchmarks.{part}").comparisons)


def test_parts_are_run_written_and_left_out_without_their_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = ModuleType("jobs.benchmarks.fake")
    part.comparisons = lambda: [comparison("name", "peer", SAMPLES, target=1, equality="equal")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jobs.benchmarks.fake", part)
    monkeypatch.setattr(harness, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["program"])
    assert harness.run_parts("set", "a set", ["fake", "other"], needed={"other": "no_such_package"}) == 0
    (record,) = json.loads((tmp_path / "set.json").read_text())
    assert Comparison(**{**{k: v for k, v in record.items() if k != "versions"}, "samples": SAMPLES}).reached
    assert "torch" in record["versions"]
    printed = capsys.readouterr()
    assert "2000.0 ms" in printed.out
    assert "other is left out" in printed.err
