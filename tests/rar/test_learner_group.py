"""When a learner dies, updates are repeated, not rollouts, and the result does not change."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.train._internal.worker_group import WorkerGroup

from afmrl_ray.config.models import OptimizerConfig
from afmrl_ray.config.rar import RARConfig
from afmrl_ray.errors import CheckpointError
from afmrl_ray.rar.checkpoint import Checkpoints
from afmrl_ray.rar.learner_group import FaultTolerantLearnerGroup, LearnerLostError
from afmrl_ray.rar.messages import PromptGroup
from afmrl_ray.rar.prompts import batch_columns
from tests.faults.harness import TITLES, find_title

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def columns(step: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step)
    shape = (2, 4)
    mask, logp = np.ones(shape, bool), np.full(shape, -4, np.float32)
    groups = [
        PromptGroup(row, step, draw.integers(20, 200, shape), mask, logp, [("", True)] * 2) for row in (0, step + 1)
    ]
    return batch_columns(groups, draw.normal(size=(2, 2)), np.ones((2, 2)))


def settings(**changes) -> RARConfig:
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0)
    return RARConfig(
        **{"group_size": 2, "prompts_per_step": 2, "optimizer": optimizer, "steps": 5, "cpus_per_learner": 0.5,
           "epsilon": 0.9, "epsilon_high": 9.0, **changes}
    )  # fmt: skip


def kill_one(learners: FaultTolerantLearnerGroup) -> None:
    pids = [result.get() for result in learners._group.foreach_learner(lambda _: os.getpid())]
    assert os.getpid() not in pids
    os.kill(pids[0], signal.SIGKILL)


def trained(policy_spec, folder: str, kills: dict[int, int], **changes) -> tuple[dict, list[dict], int]:
    """Weights and metrics of five updates, one checkpoint after the second, `kills[step]` deaths before an update."""
    learners = FaultTolerantLearnerGroup(settings(**changes), policy_spec, Checkpoints(folder))
    learners.restore(0)
    metrics = []
    try:
        for step in range(5):
            for _ in range(kills.get(step, 0)):
                kill_one(learners)
            metrics.append(learners.update(columns(step)))
            if step == 1:
                learners.save(2, {})
        weights = learners.weights()
        assert weights.version == 5
        return ray.get(weights.reference[0]), metrics, learners.restarts
    finally:
        learners.shutdown()


@pytest.fixture(scope="module")
def undisturbed(ray_local, policy_spec, tmp_path_factory):
    return trained(policy_spec, str(tmp_path_factory.mktemp("undisturbed")), {})


@pytest.mark.parametrize("step", [1, 4], ids=["before a checkpoint", "after one"])
def test_a_killed_learner_does_not_change_weights_or_metrics(policy_spec, undisturbed, tmp_path, step):
    weights, metrics, restarts = trained(policy_spec, str(tmp_path), {step: 1})
    assert (undisturbed[2], restarts) == (0, 1)
    assert all(torch.equal(weights[name], tensor) for name, tensor in undisturbed[0].items())
    for found, expected in zip(metrics, undisturbed[1], strict=True):
        assert found == expected


class KillTheNextLearner(threading.Thread):
    """Kills a learner as soon as its process appears, while it is being built."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.seen()
        self.killed = False

    @staticmethod
    def seen() -> set[int]:
        return {process.pid for process in find_title(psutil.Process().children(recursive=True), TITLES["learner"])}

    def run(self) -> None:
        while not (fresh := self.seen() - self.before):
            time.sleep(0.05)
        os.kill(fresh.pop(), signal.SIGKILL)
        self.killed = True


def test_a_learner_that_dies_while_it_is_built_is_replaced(policy_spec, undisturbed, tmp_path):
    killer = KillTheNextLearner()
    killer.start()
    rebuilt = trained(policy_spec, str(tmp_path), {})
    killer.join(timeout=60)
    assert killer.killed
    check_rebuilt(rebuilt, undisturbed)


def test_a_learner_that_dies_while_its_backend_starts_is_replaced(policy_spec, undisturbed, tmp_path, monkeypatch):
    execute = WorkerGroup.execute

    def die_first(group: WorkerGroup, *args: object, **kwargs: object) -> object:
        monkeypatch.undo()
        os.kill(group.workers[0].metadata.pid, signal.SIGKILL)
        return execute(group, *args, **kwargs)

    monkeypatch.setattr(WorkerGroup, "execute", die_first)
    rebuilt = trained(policy_spec, str(tmp_path), {})
    assert WorkerGroup.execute is execute
    check_rebuilt(rebuilt, undisturbed)


def check_rebuilt(found: tuple, undisturbed: tuple) -> None:
    weights, _, restarts = found
    assert restarts == 1
    assert all(torch.equal(weights[name], tensor) for name, tensor in undisturbed[0].items())
    held = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    assert not held, "the placement group of the first learners is still held"


def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_kept(ray_local, policy_spec, tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    with closing(FaultTolerantLearnerGroup(settings(), policy_spec, checkpoints)) as learners:
        learners.restore(0)
        learners.save(1, {})
        learners.save(2, {})
        (shard,) = (tmp_path / "step_0000002/engine").rglob("*model_states.pt")
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"SHA-256") as caught:
            learners.restore(2)
    assert "\n" not in str(caught.value)
    assert f"remove {tmp_path}/step_0000002 to go on from the checkpoint before it" in str(caught.value)
    shutil.rmtree(tmp_path / "step_0000002")
    assert checkpoints.latest() == {"step": 1}
    with closing(FaultTolerantLearnerGroup(settings(), policy_spec, checkpoints)) as learners:
        learners.restore(1)


@contextmanager
def closing(learners: FaultTolerantLearnerGroup) -> Iterator[FaultTolerantLearnerGroup]:
    yield learners
    learners.shutdown()


def test_learners_that_keep_dying_fail_the_training(ray_local, policy_spec, tmp_path, monkeypatch):
    learners = FaultTolerantLearnerGroup(settings(max_learner_restarts=2), policy_spec, Checkpoints(str(tmp_path)))
    attempts = []

    def dies(_: object) -> None:
        attempts.append(None)
        raise LearnerLostError("a learner died")

    monkeypatch.setattr(learners, "_update", dies)
    monkeypatch.setattr("afmrl_ray.rar.learner_group.build_learners", lambda *_: learners._group)
    monkeypatch.setattr(learners._group, "shutdown", lambda: None)
    with pytest.raises(LearnerLostError):
        learners.update(columns(0))
    assert len(attempts) == 3
    monkeypatch.undo()
    learners.shutdown()
