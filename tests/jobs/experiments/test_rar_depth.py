"""RAR with rewards of several depths, on a run small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afmrl_ray.config import dump_yaml
from afmrl_ray.report.collect import collect
from afmrl_ray.runs import RunDirectory
from jobs.experiments.rar_depth import COLUMNS, table
from tests.jobs.experiments.programs import commits, experiment
from tests.jobs.experiments.test_variants import study_config


def test_the_table_has_means_over_seeds_with_intervals() -> None:
    found = {(k, seed): dict.fromkeys(COLUMNS, 10.0 * k + seed) for k in (1, 5) for seed in (0, 2)}
    rows = table("name", found).rows
    assert [row[0] for row in rows] == ["1", "5"]
    # Student's t of two values that are 2 apart: 12.7062 * sqrt(2) / sqrt(2).
    first = dict(zip(COLUMNS, rows[0][1:], strict=True))
    assert first["heldout_before"] == "11.000 ± 12.706"
    assert first["hit1_gain"] == first["hit1_gain_queries"] == "+11.0 ± 12.7"
    assert first["pairs_after"] == "11.0 ± 12.7"
    one = {key: value for key, value in found.items() if key == (5, 0)}
    assert table("name", one).rows[0][1] == "50.000"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_depth_is_measured_from_one_start_once(tmp_path: Path) -> None:
    config = tmp_path / "depth.yaml"
    config.write_text(dump_yaml(study_config(tmp_path, ray={"num_cpus": 4, "object_store_mb": 100})))
    asked = ("--config", str(config), "--depths", "1", "5", "--seeds", "1", "--out", str(tmp_path))
    done = experiment("rar_depth", *asked)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "rar_depth-t.json").read_text())
    assert [(row["k"], row["seed"]) for row in rows] == [(1, 0), (5, 0)]
    assert len({row["hit1_before"] for row in rows}) == 1
    run = RunDirectory(str(tmp_path), "t")
    for row in rows:
        hit = run.committed(f"depth-k{row['k']}-s0-evaluate").metrics["protocols"]["fine"]["metrics"]["hit@1"]["mean"]
        assert row["hit1_before"] + row["hit1_gain"] == pytest.approx(100 * hit)
        assert run.committed(f"depth-k{row['k']}-s0").inputs["changes"]["rar.reward.k"] == row["k"]
    # Stages record their upstream stages and changes, so that a report does not take them for stale.
    assert collect(run).stale == set()
    before = commits(tmp_path)
    assert experiment("rar_depth", *asked).returncode == 0
    assert commits(tmp_path) == before
