"""Training on Ray Train: killed right after a report, resumed by fewer workers, started with fewer than configured."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from afmrl_ray import storage
from afmrl_ray.errors import CheckpointError, UserError
from afmrl_ray.training.metrics_log import read_metrics
from tests.training.toy import EVERY, STEPS, final_weights, relative_to_update, steps_done, train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def calm(ray_local, tmp_path_factory) -> Path:
    """Folder of an undisturbed training by two workers."""
    folder = tmp_path_factory.mktemp("calm")
    train(str(folder), num_workers=2)
    return folder


def test_every_metric_has_a_name_space(calm):
    records = read_metrics(str(calm / "log"))
    assert [record["step"] for record in records] == list(range(STEPS))
    for record in records:
        names = record.keys() - {"step", "time"}
        assert names == {
            *(f"train/{name}" for name in ("loss", "learning_rate", "grad_norm")),
            *(f"time/{name}" for name in ("step", "optimizer", "peak_memory_mb")),
        }


def assert_one_interval_lost_at_most(folder: Path, calm: Path) -> None:
    done = [step for step, _ in steps_done(folder)]
    assert sorted(set(done)) == list(range(STEPS))
    assert len(done) - STEPS <= EVERY
    for ours, theirs in zip(final_weights(folder), final_weights(calm), strict=True):
        assert torch.equal(ours, theirs)


def test_a_worker_killed_right_after_a_report_costs_one_interval_at_most(calm, tmp_path):
    train(str(tmp_path), at=2 * EVERY, event="worker", num_workers=2)
    assert (tmp_path / "happened").exists()
    assert_one_interval_lost_at_most(tmp_path, calm)


@pytest.mark.slow
def test_a_controller_killed_right_after_a_report_costs_one_interval_at_most(calm, tmp_path):
    with pytest.raises(Exception, match=r"[Aa]ctor"):
        train(str(tmp_path), at=2 * EVERY, event="controller", num_workers=2)
    train(str(tmp_path), num_workers=2)
    assert_one_interval_lost_at_most(tmp_path, calm)


@pytest.mark.slow
def test_a_driver_killed_right_after_a_report_costs_one_interval_at_most(calm, tmp_path):
    killed = start("own_session", tmp_path)
    while not (tmp_path / "happened").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert start("own_session", tmp_path).wait() == 0
    assert_one_interval_lost_at_most(tmp_path, calm)


@pytest.mark.slow
def test_an_elastic_training_continues_without_a_lost_node(calm, tmp_path):
    assert start("lose_a_node", tmp_path).wait() == 0
    done = steps_done(tmp_path)
    assert done[0] == (0, 2)
    assert done[-1] == (STEPS - 1, 1)
    assert (0, 1) not in done, "it restarted from the first step"
    assert len(done) - STEPS <= EVERY
    assert relative_to_update(final_weights(tmp_path), final_weights(calm)) < 1e-5


def start(scenario: str, folder: Path) -> subprocess.Popen:
    """A driver with a Ray of its own; it and all that it starts are one process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.toy", scenario, str(folder)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ""},
        start_new_session=True,
    )


@pytest.mark.parametrize("zero_stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3])
def test_one_worker_resumes_where_two_stopped(calm, tmp_path, zero_stage):
    with pytest.raises(UserError, match="stopped as asked"):
        train(str(tmp_path), at=2 * EVERY, event="stop", num_workers=2, zero_stage=zero_stage, max_failures=0)
    train(str(tmp_path), num_workers=1, zero_stage=zero_stage)
    done = steps_done(tmp_path)
    assert [step for step, _ in done[-EVERY:]] == [STEPS - 2, STEPS - 1]
    assert (0, 1) not in done, "one worker restarted from the first step"
    assert relative_to_update(final_weights(tmp_path), final_weights(calm)) < 1e-5


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_once_removed_the_training_restarts(calm, tmp_path):
    with pytest.raises(UserError, match="stopped as asked"):
        train(str(tmp_path), at=2 * EVERY, event="stop", num_workers=1, max_failures=0)
    for shard in (tmp_path / "train/toy").glob("step_*/engine/engine/*model_states.pt"):
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=r"step_\d+/engine: engine/mp_rank_00_model_states.pt is damaged"
    ) as caught:
        train(str(tmp_path), num_workers=1, max_failures=0)
    assert "\n" not in str(caught.value)
    assert f"remove {tmp_path}/train/toy to restart" in str(caught.value)
    shutil.rmtree(tmp_path / "train/toy")
    train(str(tmp_path), num_workers=1)
    assert relative_to_update(final_weights(tmp_path), final_weights(calm)) < 1e-5


def test_an_elastic_training_starts_with_the_workers_that_fit(calm, tmp_path):
    # Two workers of three CPUs each do not fit into the four available ones.
    train(str(tmp_path), num_workers=2, min_workers=1, cpus_per_worker=3)
    assert {world for _, world in steps_done(tmp_path)} == {1}
    progress = storage.read_json(str(tmp_path / f"train/toy/step_{STEPS:07d}/progress.json"))
    assert progress == {"step": STEPS, "world_size": 1, "zero_stage": 0}
    assert relative_to_update(final_weights(tmp_path), final_weights(calm)) < 1e-5
