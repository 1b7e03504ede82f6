"""Reading a run directory, finished or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from afmrl_ray import storage
from afmrl_ray.errors import StorageError
from afmrl_ray.report.collect import collect
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.runs import RunDirectory, StageOutcome
from tests.report.fake_run import CONFIG, STEPS, FakeRun


def test_the_summary_holds_every_stage_record(tmp_path: Path) -> None:
    run = FakeRun(str(tmp_path)).everything()
    summary = collect(run)
    assert [variant.name for variant in summary.variants] == ["chance", "pixels", "baseline", "round 0", "round 1"]
    for variant in summary.variants:
        stage = run.committed(variant.stage)
        assert stage is not None
        recorded = stage.metrics[variant.name] if variant.stage == "baselines" else stage.metrics["protocols"]
        read = {name: {m: vars(v) for m, v in of.metrics.items()} for name, of in variant.protocols.items()}
        assert read == {name: result["metrics"] for name, result in recorded.items()}
    for each in summary.rounds:
        rar = run.committed(f"rar-r{each.number}")
        assert rar is not None
        assert each.rar.keys() == rar.metrics.keys()
        assert vars(each.reward("eval/reward_gain") or Estimate(None)) == rar.metrics["eval/reward_gain"]
        assert [record["step"] for record in each.rar_log] == list(range(STEPS))
        assert "train/masked_fraction" in each.agcl_log[0]
    assert [(stage.name, stage.seconds, stage.peak_memory_mb) for stage in summary.stages] == [
        (stage.name, stage.seconds, stage.peak_memory_mb) for stage in run.stages()
    ]
    assert summary.stale == set()


def test_credentials_in_addresses_are_removed(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    record = fake.run.read_run()
    fake.run.write_run({**record, "command": "python job.py run.storage_path=s3://key:secret@bucket/runs"})
    summary = collect(fake.run)
    assert summary.command == "python job.py run.storage_path=s3://***@bucket/runs"
    assert summary.config["teacher"]["base_url"] == "https://***@teacher.example/v1"


def test_credentials_do_not_make_a_stage_stale(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    fake.run.run_stage("labels", {"config": {"teacher": CONFIG["teacher"]}}, lambda directory: StageOutcome({}, {}))
    assert collect(fake.run).stale == set()


def test_values_that_are_not_finite_count_as_not_measured() -> None:
    assert Estimate.of(float("nan")) == Estimate.of({"mean": float("inf"), "low": None}) == Estimate(None)
    assert Estimate.of(3) == Estimate(3.0)
    assert not Estimate.of({"mean": 1, "low": 0, "high": None}).has_interval


def test_a_missing_run_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"run\.json"):
        collect(RunDirectory(str(tmp_path), "nowhere"))


def test_stages_with_other_settings_or_changed_upstream_stages_are_stale(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    run = fake.everything(rounds=1, baseline=False)
    fake.stage("attributes-r0", fake.sizes(5.0), "distill")
    assert collect(run).stale == {"agcl-r0", "gallery-r0", "rar-r0", "evaluate-r0", "promotion-r0"}
    record = run.read_run()
    run.write_run({**record, "config": {**record["config"], "agcl": {"steps": 61}}})
    assert collect(run).stale == {stage.name for stage in run.stages()}


def test_a_changed_seed_makes_only_stages_that_read_it_stale(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    fake.stage("distill", {"train/loss": 1.0})
    fake.run.run_stage("catalogue", {"synthetic": {"seed": 7}}, lambda directory: StageOutcome({}, {}))
    record = fake.run.read_run()
    fake.run.write_run({**record, "config": {**record["config"], "run": {"seed": 5}}})
    assert collect(fake.run).stale == {"distill"}


@pytest.mark.parametrize(("promoted", "result"), [(None, 1), (True, 1), (False, 0)])
def test_the_result_is_the_last_round_that_was_not_refused(tmp_path: Path, promoted: bool | None, result: int) -> None:
    fake = FakeRun(str(tmp_path))
    for number in range(2):
        fake.round(number)
    storage.remove(storage.join(fake.run.path, "stages", "promotion-r1"))
    if promoted is not None:
        fake.stage("promotion-r1", {"promoted": promoted, "why": []}, "evaluate-r1")
    summary = collect(fake.run)
    assert summary.result == result
    assert summary.refused == ({1} if promoted is False else set())


def test_stages_of_experiments_are_read_too(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    for name, upstream in (("depth", ["f" * 64]), ("depth-attributes", "f" * 64)):
        fake.run.run_stage(name, {"upstream": upstream}, lambda directory: StageOutcome({}, {}))
    assert [stage.name for stage in collect(fake.run).stages] == ["depth", "depth-attributes"]


def test_logs_are_optional(tmp_path: Path) -> None:
    run = FakeRun(str(tmp_path)).everything(rounds=1)
    rar, agcl = run.committed("rar-r0"), run.committed("agcl-r0")
    assert rar is not None
    assert agcl is not None
    storage.remove(storage.join(rar.directory, "log"))
    assert collect(run).rounds[0].rar_log == []
    assert collect(run).rounds[0].agcl_log != []
