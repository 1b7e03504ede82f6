"""The job that compares settings of RAR with Ray Tune."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from afmrl_ray.config import dump_yaml, validate
from tests.cit.conftest import run_values
from tests.jobs.test_jobs import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_value_of_the_grid_is_run_from_the_same_start(tmp_path):
    values = run_values(tmp_path, ray={"num_cpus": 4, "object_store_mb": 100})
    values["rar"]["steps"] = 2
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(validate(values)))
    command = [sys.executable, "jobs/tune_rar.py", "--config", str(config), "--grid", "rar.kl_coef=0.0,0.5"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, head, first, second, best = done.stdout.strip().splitlines()
    assert head.split()[0] == "rar.kl_coef"
    assert sorted([first.split()[0], second.split()[0]]) == ["0.0", "0.5"]
    assert first.split()[1] == second.split()[1], "trials have different held-out rewards before RAR"
    gains = {line.split()[0]: float(line.split()[3]) for line in (first, second)}
    assert best == f"best: rar.kl_coef={max(gains, key=gains.__getitem__)}"
    trials = list((tmp_path / "t" / "tune" / "rar-r0").glob("*/log/metrics.jsonl"))
    assert len(trials) == 2
    for log in trials:
        assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("given", ["rar.kl_coef", "rar.kl_coef=", "rar.kl_coef=-1", "rar.no_such=1"])
def test_an_invalid_grid_is_refused_with_one_line(given, tmp_path, capsys):
    from tests.jobs.test_jobs import main_of

    assert main_of("tune_rar")([f"--grid={given}", f"run.storage_path={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert given.split("=")[0] in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
