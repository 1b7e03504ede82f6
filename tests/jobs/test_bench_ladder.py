"""The ladder's programs on a run small enough for tests."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from afmrl_ray.config import dump_yaml, load_config, with_values
from afmrl_ray.report.plots import LIGHT
from tests.cit.test_ladder import ladder_config
from tests.jobs.benches import ROOT, bench, commits

RUNGS = ["vlm2vec", "agcl", "distilled", "rl"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_ladder_is_climbed_once_and_its_first_run_tells_what_attributes_cost(tmp_path: Path) -> None:
    config = tmp_path / "ladder.yaml"
    config.write_text(dump_yaml(ladder_config(tmp_path, ray={"num_cpus": 4, "object_store_mb": 100})))
    climb = ("--config", str(config), "--seeds", "0", "1", "--processes", "1", "--rungs", *RUNGS)
    done = bench(tmp_path, "ladder.py", *climb)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "t/ladder.json").read_text())
    assert record["seeds"] == 2
    assert [rung["key"] for rung in record["rungs"]] == RUNGS
    assert all(rung["seeds"] == 2 for rung in record["rungs"])
    gains = [rung["gain"]["fine"]["hit@1"] for rung in record["rungs"][1:]]
    assert all(gain["low"] <= gain["mean"] <= gain["high"] for gain in gains)
    assert (tmp_path / "t/ladder.md").read_text() in done.stdout
    assert (tmp_path / "t/ladder.png").stat().st_size > 10_000
    assert "<h2>Ladder</h2>" in (tmp_path / "t-s0/report/index.html").read_text("utf-8")
    before = commits(tmp_path)
    assert bench(tmp_path, "ladder.py", *climb).returncode == 0
    assert commits(tmp_path) == before

    asked = ("--run", str(tmp_path / "t-s0"), "--timed", "2", "--repeats", "1", "--cut", "1")
    cost = bench(tmp_path, "inference_cost.py", *asked)
    assert cost.returncode == 0, cost.stderr[-3000:]
    for way in ("no attributes", "all, from a cache", "first 1", "all, written"):
        assert way in cost.stdout
    assert (tmp_path / "runs/bench/inference_cost-t-s0.png").exists()


def program(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "jobs/bench"))
    return importlib.import_module(name)


def test_the_curve_of_costs_labels_milliseconds_in_plain_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = program(monkeypatch, "inference_cost")
    points = [cost.Point("cheap", 0.2, 0.18, 0.22, 9.7, [9.7]), cost.Point("dear", 0.3, 0.28, 0.32, 88.3, [88.3])]
    figure = Figure()
    axes = figure.subplots()
    cost.curve(points)(axes, LIGHT)
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    labels = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert labels == ["10", "20", "50"]
    assert not any(label.get_text() for label in axes.get_xticklabels(minor=True))


def test_every_setting_of_the_sweep_is_a_run_of_its_own_that_changes_what_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = program(monkeypatch, "ladder_sweep")
    base = load_config(str(ROOT / "jobs/configs/ladder.yaml"))
    cells = sweep.cells(base)
    assert len({config.run.name for _, _, config in cells}) == len(cells)
    told = [config.model_dump(exclude={"run"}) for _, _, config in cells]
    primary_protocol = {"evaluation.protocols": list(base.evaluation.protocols[:1]), "cit.gate.protocols": []}
    assert told[0] == with_values(base, primary_protocol).model_dump(exclude={"run"})
    assert {len(config.evaluation.protocols) for _, _, config in cells} == {1}
    assert all(told.count(each) == 1 for each in told), "two settings are the same"


def test_the_sweeps_table_has_gains_with_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = program(monkeypatch, "ladder_sweep")
    gain = {"mean": 0.021, "low": -0.003, "high": 0.045}
    rows = [{"knob": "k", "setting": "s", "hit@1": {"low": 0.25, "high": 0.3}, "gain": {"high": gain}, "f1": {}}]
    assert sweep.table(rows).splitlines()[-1] == "| k: s | 25.0 % | +2.1 [-0.3, +4.5] |"
