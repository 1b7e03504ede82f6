"""The ablation study and the inference cost as commands, on a run small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afmrl_ray.config import dump_yaml
from jobs.experiments.study_tables import read_study, study_markdown, study_tables
from tests.jobs.experiments.programs import commits, experiment
from tests.jobs.experiments.test_variants import study_config
from tests.report.page import read_page

VARIANTS = ["info-nce", "agcl", "distilled", "rl"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_study_runs_once_and_its_first_run_can_be_measured_for_inference_cost(tmp_path: Path) -> None:
    config = tmp_path / "ladder.yaml"
    config.write_text(dump_yaml(study_config(tmp_path, ray={"num_cpus": 4, "object_store_mb": 100})))
    arguments = ("--config", str(config), "--seeds", "0", "1", "--processes", "1", "--logs", str(tmp_path / "logs"))
    arguments += ("--variants", *VARIANTS)
    done = experiment("ladder", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "t/ladder.json").read_text())
    assert record["seeds"] == 2
    assert [variant["key"] for variant in record["variants"]] == VARIANTS
    assert all(variant["seeds"] == 2 for variant in record["variants"])
    gains = [variant["gain"]["fine"]["hit@1"] for variant in record["variants"][1:]]
    assert all(gain["low"] <= gain["mean"] <= gain["high"] for gain in gains)
    study = read_study(record)
    assert (tmp_path / "t/ladder.md").read_text() == study_markdown(study)
    assert study_markdown(study) in done.stdout
    assert (tmp_path / "t/ladder.png").stat().st_size > 10_000
    page = read_page((tmp_path / "t-s0/report/index.html").read_text("utf-8"))
    shown = page.section("attachment-ladder")
    for table in study_tables(study):
        assert shown.table(table.title) == [table.columns, *[[cell or "–" for cell in row] for row in table.rows]]
    report = json.loads((tmp_path / "t-s0/report/report.json").read_text())
    assert report["attachments"]["ladder"]["record"] == record
    assert json.loads((tmp_path / "t-s1/run.json").read_text())["command"].startswith(
        "python -m jobs.experiments.ladder --config"
    )
    before = commits(tmp_path)
    assert experiment("ladder", *arguments).returncode == 0
    assert commits(tmp_path) == before

    asked = ("--run", str(tmp_path / "t-s0"), "--timed", "2", "--repeats", "1", "--cut", "1", "--out", str(tmp_path))
    cost = experiment("inference_cost", *asked)
    assert cost.returncode == 0, cost.stderr[-3000:]
    points = json.loads((tmp_path / "inference_cost-t-s0.json").read_text())["points"]
    assert [point["name"] for point in points] == ["no attributes", "all, from a cache", "first 1", "all, generated"]
    assert all(point["low"] <= point["hit1"] <= point["high"] and point["milliseconds"] > 0 for point in points)
    assert (tmp_path / "inference_cost-t-s0.png").exists()
