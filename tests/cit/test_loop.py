"""The whole loop on a local Ray: commits, resumes, and what a changed config re-runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from afmrl_ray import storage
from afmrl_ray.cit.driver import open_run, run_cit
from afmrl_ray.config import dump_yaml, validate
from afmrl_ray.models.model_settings import ModelSettings
from afmrl_ray.runs import RunDirectory, Stage
from afmrl_ray.training.metrics_log import read_metrics
from tests.cit.conftest import run_values

ROOT = Path(__file__).resolve().parents[2]
ROUND = ("attributes-r0", "agcl-r0", "gallery-r0", "rar-r0", "attributes-r1", "evaluate-r0", "promotion-r0")


def fingerprints(run: RunDirectory) -> dict[str, str]:
    return {stage.name: stage.fingerprint for stage in run.stages()}


def commits(run: RunDirectory) -> dict[str, str]:
    root = storage.join(run.path, "stages")
    return {
        stage.name: storage.read_json(storage.join(root, stage.name, "stage.json"))["committed_at"]
        for stage in run.stages()
    }


def weights(stage: Stage) -> bytes:
    folder = stage.output("model")
    names = [name for name in storage.list_files(folder) if name.endswith(".safetensors")]
    return b"".join(storage.read_bytes(storage.join(folder, name)) for name in names)


def check_model_settings(stage: Stage, section, catalogue: str) -> None:
    """The folder of a model records what it was trained with."""
    folder = Path(stage.output("model"))
    settings = ModelSettings.read(str(folder))
    not_recorded = {"path", "vision_cache"}
    assert settings.config().model_dump(exclude=not_recorded) == section.model_dump(exclude=not_recorded)
    assert (settings.catalogue, settings.upstream) == (catalogue, stage.inputs["upstream"])
    adapter = folder / "adapter_config.json"
    assert settings.base == (json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else None)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_run_commits_every_stage_skips_them_next_time_and_reruns_what_a_change_touches(ray_local, tmp_path):
    config = validate(run_values(tmp_path))
    with open_run(config) as pipeline:
        run_cit(pipeline)
        run = pipeline.run
    first = commits(run)
    assert set(first) == {"catalogue", "models", "labels", "distill", "baselines", *ROUND}
    measured = run.committed("evaluate-r0").metrics
    assert 0 <= measured["protocols"]["fine"]["metrics"]["hit@1"]["mean"] <= 1
    # Rounds, galleries and rewards look at the same images with the same frozen tower.
    steps = read_metrics(storage.join(run.committed("agcl-r0").directory, "log"))
    assert steps[-1]["data/vision_cache_hit_fraction"] > 0.5
    rar = run.committed("rar-r0").metrics
    assert rar["eval/reward_before"]["low"] <= rar["eval/reward_before"]["mean"] <= rar["eval/reward_before"]["high"]
    assert weights(run.committed("rar-r0")) != weights(run.committed("distill"))
    for name, section in (("agcl-r0", config.encoder), ("distill", config.generator), ("rar-r0", config.generator)):
        check_model_settings(run.committed(name), section, pipeline.catalogue_ref.fingerprint)

    with open_run(config) as pipeline:
        run_cit(pipeline)
    assert commits(run) == first

    changed = validate(run_values(tmp_path, evaluation={**run_values(tmp_path)["evaluation"], "bootstrap_samples": 60}))
    with open_run(changed) as pipeline:
        run_cit(pipeline)
    again = commits(run)
    assert {name for name in again if again[name] != first[name]} == {"baselines", "evaluate-r0", "promotion-r0"}


def start_driver(config_file: Path, log: Path) -> subprocess.Popen:
    environment = {**os.environ, "RAY_ADDRESS": "", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/train_rar.py"), "--config", str(config_file)],
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )


def kill_when(driver: subprocess.Popen, condition, log: Path, limit_s: float = 240) -> None:
    """Kill the driver and everything it started, all at once, as soon as `condition` holds."""
    wait_for(driver, condition, log, limit_s)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()


def wait_for(driver: subprocess.Popen, condition, log: Path, limit_s: float = 240) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert driver.poll() is None, f"the driver ended before it could be killed:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, "the condition never came"
        time.sleep(0.05)


def is_learner(process: psutil.Process) -> bool:
    """RLlib wraps the learners in a class of this name."""
    return "_WrappedExecutable" in " ".join(process.cmdline())


def appears(folder: Path, pattern: str):
    return lambda: list(folder.glob(pattern))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_driver_and_a_killed_learner_leave_the_numbers_of_an_undisturbed_run(tmp_path):
    """The driver is killed in AGCL and in RAR and started again; a learner is killed and the driver goes on."""
    results = {}
    for name in ("undisturbed", "killed", "learner"):
        folder = tmp_path / name
        folder.mkdir()
        file = folder / "config.yaml"
        values = run_values(folder, ray={"num_cpus": 4, "object_store_mb": 100})
        values["catalogue"]["cache_dir"] = str(tmp_path / "staging")
        values["rar"]["steps"] = 8
        file.write_text(dump_yaml(validate(values)))
        log = folder / "log"
        stages = folder / "t" / "stages"
        if name == "killed":
            driver = start_driver(file, log)
            kill_when(driver, appears(stages, "agcl-r0/*/train/agcl-r0/step_*"), log)
            assert not (stages / "agcl-r0" / "stage.json").exists()
            driver = start_driver(file, log)
            kill_when(driver, appears(stages, "rar-r0/*/checkpoints/step_*/manifest.json"), log)
            assert not (stages / "rar-r0" / "stage.json").exists()
        driver = start_driver(file, log)
        if name == "learner":
            wait_for(driver, appears(stages, "rar-r0/*/checkpoints/step_*/manifest.json"), log)
            (learner,) = (child for child in psutil.Process(driver.pid).children(recursive=True) if is_learner(child))
            learner.kill()
        assert driver.wait(timeout=600) == 0, log.read_text()[-3000:]
        assert ("rebuilding the learners" in log.read_text()) == (name == "learner")
        run = RunDirectory(str(folder), "t")
        results[name] = {
            stage: (run.committed(stage).metrics, weights(run.committed(stage))) for stage in ("agcl-r0", "rar-r0")
        }
    for stage in ("agcl-r0", "rar-r0"):
        metrics, model = results["undisturbed"][stage]
        for name in ("killed", "learner"):
            other_metrics, other_model = results[name][stage]
            assert other_model == model, (name, stage)
            assert json.dumps(other_metrics, sort_keys=True) == json.dumps(metrics, sort_keys=True), (name, stage)
