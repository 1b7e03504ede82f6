"""Stages in MLflow's own local store, read back with its own client."""

from __future__ import annotations

import sys

import pytest

from afmrl_ray import storage
from afmrl_ray.cit import driver
from afmrl_ray.cit.mlflow_tracker import MLflowTracker, key_of
from afmrl_ray.commands import run as commands_run
from afmrl_ray.config import validate, with_values
from afmrl_ray.errors import CatalogueError, ConfigError
from afmrl_ray.runs import RunDirectory, StageOutcome
from afmrl_ray.training.metrics_log import MetricsLog
from tests.cit.test_driver import Stubbed, opened

pytest.importorskip("mlflow", reason="MLflow is not installed (pip install .[mlflow]): ITS TRACKER IS NOT TESTED")
METRICS = {"protocols": {"fine": {"metrics": {"hit@1": {"mean": 0.5, "low": None}}}}, "why": ["no number"], "ok": True}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Config, run, and MLflow's client of a local store."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    uri = f"file://{tmp_path}/mlruns"
    config = validate({"run": {"name": "mugs"}, "tracking": {"mlflow_uri": uri, "mlflow_experiment": "shop"}})
    run = RunDirectory(str(tmp_path), "mugs")
    run.create()
    return config, run, MlflowClient(tracking_uri=uri)


def mlflow_run(client, run):
    """The MLflow run that a run is logged to."""
    return client.get_run(storage.read_json(storage.join(run.path, "mlflow.json"))["run_id"])


def commit(run, name, metrics, steps=0, seed=0):
    def body(directory):
        if steps:
            log = MetricsLog(storage.join(directory, "log"))
            for step in range(steps):
                log.log(
                    step, {"reward/mean": step / 10, "actor/kl": float("nan"), "rollout/name_fraction/size (cm)": 1.0}
                )
            log.close()
        return StageOutcome({}, metrics)

    return run.run_stage(name, {"seed": seed}, body)


def test_metrics_steps_and_settings_are_found_in_mlflow(world):
    config, run, client = world
    tracker = MLflowTracker(config, run)
    tracker.stage(commit(run, "rar-r0", {"reward/mean": 0.25}, steps=1200))
    tracker.stage(commit(run, "evaluate-r0", METRICS))
    tracker.close(finished=True)
    (experiment,) = (each for each in client.search_experiments() if each.name == "shop")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "mugs"
    assert found.info.status == "FINISHED"
    assert found.data.params["rar/group_size"] == str(config.rar.group_size)
    assert found.data.metrics["rar-r0/reward/mean"] == 0.25
    assert found.data.metrics["evaluate-r0/protocols/fine/metrics/hit_at_1/mean"] == 0.5
    assert not [name for name in found.data.metrics if name.endswith(("/low", "/ok", "/kl")) or "why" in name]
    steps = client.get_metric_history(found.info.run_id, "rar-r0/step/reward/mean")
    assert [(each.step, each.value) for each in steps] == [(step, step / 10) for step in range(1200)]
    assert "rar-r0/step/rollout/name_fraction/size _cm_" in found.data.metrics


def test_a_resumed_job_goes_on_in_the_same_mlflow_run_and_logs_nothing_twice(world, monkeypatch):
    config, run, client = world
    first = MLflowTracker(config, run)
    stage = commit(run, "rar-r0", {"reward/mean": 0.25}, steps=3)
    first.stage(stage)
    first.close(finished=False)
    again = MLflowTracker(config, run)
    again.stage(stage)
    (experiment,) = (each for each in client.search_experiments() if each.name == "shop")
    (found,) = client.search_runs([experiment.experiment_id])
    assert len(client.get_metric_history(found.info.run_id, "rar-r0/step/reward/mean")) == 3
    again.stage(commit(run, "rar-r0", {"reward/mean": 0.5}, steps=2, seed=1))
    assert client.get_run(found.info.run_id).data.metrics["rar-r0/reward/mean"] == 0.5


def test_an_unreachable_server_costs_no_training_and_gets_the_stages_later(world, monkeypatch, caplog):
    from mlflow.exceptions import MlflowException

    config, run, client = world
    tracker = MLflowTracker(config, run)
    stage = commit(run, "rar-r0", {"reward/mean": 0.25})

    def away(*_, **__):
        raise MlflowException("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "log_batch", away)
        tracker.stage(stage)
    assert "did not take stage rar-r0, the next job tries again: connection refused" in caplog.text
    MLflowTracker(config, run).stage(stage)
    run_id = storage.read_json(storage.join(run.path, "mlflow.json"))["run_id"]
    assert client.get_run(run_id).data.metrics["rar-r0/reward/mean"] == 0.25


def test_the_report_is_an_artifact(world, tmp_path):
    config, run, client = world
    page = tmp_path / "index.html"
    page.write_text("<h1>mugs ü</h1>")
    MLflowTracker(config, run).report(str(page))
    run_id = storage.read_json(storage.join(run.path, "mlflow.json"))["run_id"]
    assert [each.path for each in client.list_artifacts(run_id, "report")] == ["report/index.html"]


def test_what_cannot_work_fails_at_the_start_in_one_line(world, monkeypatch):
    config, run, _ = world
    with pytest.raises(ConfigError, match=r"tracking\.mlflow_uri nonsense://x"):
        MLflowTracker(validate({"tracking": {"mlflow_uri": "nonsense://x"}}), run)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    with pytest.raises(ConfigError, match="MLFLOW_ALLOW_FILE_STORE=true") as refused:
        MLflowTracker(with_values(config, {"tracking.mlflow_uri": f"file://{run.path}/store"}), run)
    assert "\n" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install \.\[mlflow\]"):
        MLflowTracker(validate({"tracking": {"mlflow_uri": "http://x"}}), run)


def test_a_changed_setting_stands_in_a_tag_beside_its_first_value(world):
    config, run, client = world
    MLflowTracker(config, run)
    params = mlflow_run(client, run).data.params
    first = params["rar/group_size"]
    for value in (16, int(first)):
        MLflowTracker(with_values(config, {"rar.group_size": value}), run)
        found = mlflow_run(client, run).data
        assert {key: tag for key, tag in found.tags.items() if key.startswith("changed/")} == {
            "changed/rar/group_size": str(value)
        }
        assert found.params == params


def test_another_server_or_experiment_gets_a_run_of_its_own_with_all_stages(world, tmp_path):
    from mlflow import MlflowClient

    config, run, client = world
    stage = commit(run, "rar-r0", {"reward/mean": 0.25})
    MLflowTracker(config, run).stage(stage)
    before = mlflow_run(client, run)
    other = f"file://{tmp_path}/other"
    MLflowTracker(with_values(config, {"tracking.mlflow_uri": other}), run).stage(stage)
    moved = mlflow_run(MlflowClient(tracking_uri=other), run)
    assert moved.info.run_id != before.info.run_id
    assert moved.data.metrics["rar-r0/reward/mean"] == 0.25
    MLflowTracker(with_values(config, {"tracking.mlflow_experiment": "stall"}), run)
    (stall,) = (each for each in client.search_experiments() if each.name == "stall")
    assert mlflow_run(client, run).info.experiment_id == stall.experiment_id


def test_no_password_gets_into_mlflow_the_run_or_an_error(world):
    config, run, client = world
    teacher = {"kind": "openai", "base_url": "https://user:s3cr@et@teacher.example/v1", "model": "m"}
    MLflowTracker(with_values(config, {"teacher": teacher}), run)
    assert mlflow_run(client, run).data.params["teacher/base_url"] == "https://***@teacher.example/v1"
    with pytest.raises(ConfigError, match=r"nonsense://\*\*\*@x") as refused:
        MLflowTracker(with_values(config, {"tracking.mlflow_uri": "nonsense://user:secret@x"}), run)
    assert "secret" not in str(refused.value)


def test_a_rotated_password_is_no_other_server(world):
    config, run, _ = world
    place = config.tracking.mlflow_uri.removeprefix("file://")
    first = MLflowTracker(with_values(config, {"tracking.mlflow_uri": f"file://old@{place}"}), run)
    again = MLflowTracker(with_values(config, {"tracking.mlflow_uri": f"file://new@{place}"}), run)
    assert first._run_id == again._run_id
    assert "old" not in storage.read_bytes(storage.join(run.path, "mlflow.json")).decode()


def test_every_stage_of_a_run_is_logged(world, monkeypatch):
    config, run, client = world
    monkeypatch.setattr(driver, "Pipeline", Stubbed)
    with opened(config, run) as pipeline:
        driver.run_cit(pipeline)
        assert mlflow_run(client, run).info.status == "RUNNING"
    found = mlflow_run(client, run)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["evaluate-r1/queries"] == 10
    logged = {key.removeprefix("stage.") for key in found.data.tags if key.startswith("stage.")}
    assert logged == {stage.name for stage in run.stages()}
    assert logged >= {"catalogue", "evaluate-r0", "promotion-r0", "evaluate-r1", "promotion-r1"}


@pytest.mark.parametrize("where", ["check_selectors", "run_record", "run_cit"])
def test_a_job_that_fails_anywhere_has_failed_in_mlflow(world, monkeypatch, where):
    config, run, client = world

    def fails(*_):
        raise CatalogueError("no positives")

    monkeypatch.setattr(driver, "Pipeline", Stubbed)
    monkeypatch.setattr(driver, "check_selectors", lambda *_: None)
    monkeypatch.setattr(driver, where, fails)
    with pytest.raises(CatalogueError), opened(config, run, None) as pipeline:
        driver.run_cit(pipeline)
    assert mlflow_run(client, run).info.status == "FAILED"


def test_the_job_of_the_whole_run_adds_its_report(world, monkeypatch):
    config, run, client = world
    monkeypatch.setattr(driver, "Pipeline", Stubbed)
    monkeypatch.setattr(driver, "open_run", lambda config: opened(config, run))
    commands_run.body(config, None)
    assert [each.path for each in client.list_artifacts(mlflow_run(client, run).info.run_id, "report")] == [
        "report/index.html"
    ]


def test_names_are_made_fit():
    assert key_of("fine/hit@1: % (all)") == "fine/hit_at_1_ _ _all_"
