"""The depths of RAR's reward on a run small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afmrl_ray.config import dump_yaml
from afmrl_ray.report.collect import collect
from afmrl_ray.runs import RunDirectory
from tests.cit.test_ladder import ladder_config
from tests.jobs.benches import bench, commits


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_depth_is_measured_from_one_start_once(tmp_path: Path) -> None:
    config = tmp_path / "depth.yaml"
    config.write_text(dump_yaml(ladder_config(tmp_path, ray={"num_cpus": 4, "object_store_mb": 100})))
    asked = ("--config", str(config), "--depths", "1", "5", "--seeds", "1")
    done = bench(tmp_path, "rar_depth.py", *asked)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "runs/bench/rar_depth-t.json").read_text())
    assert [(row["k"], row["seed"]) for row in rows] == [(1, 0), (5, 0)]
    assert len({row["hit1_before"] for row in rows}) == 1
    run = RunDirectory(str(tmp_path), "t")
    for row in rows:
        hit = run.committed(f"depth-k{row['k']}-s0-evaluate").metrics["protocols"]["fine"]["metrics"]["hit@1"]["mean"]
        assert row["hit1_before"] + row["hit1_gain"] == pytest.approx(100 * hit)
        assert run.committed(f"depth-k{row['k']}-s0").inputs["changes"]["rar.reward.k"] == row["k"]
    # Stages name what they stand on and what they change, so a report takes none for stale.
    assert collect(run).stale == set()
    before = commits(tmp_path)
    assert bench(tmp_path, "rar_depth.py", *asked).returncode == 0
    assert commits(tmp_path) == before
