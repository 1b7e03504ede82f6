"""The training loop of RAR: resuming, staleness, lost weights. Rewards are a rule, learners and rollout actors real."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from afmrl_ray import storage
from afmrl_ray.config import Config
from afmrl_ray.errors import WeightsLostError
from afmrl_ray.rar import context, rollout_batch
from afmrl_ray.rar.context import RARJob
from afmrl_ray.rar.reward.spec import METRICS, Scores
from afmrl_ray.rar.rollout import RolloutPool
from afmrl_ray.rar.selection import Evaluation
from afmrl_ray.rar.trainer import open_trainer
from afmrl_ray.training.metrics_log import read_metrics
from tests.rar.conftest import every_text_counts, small_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
STEPS = 4


class Rule:
    """A reward service in this process: a hash of row and text."""

    def __init__(self, *_: object, **__: object) -> None:
        """Ignores the arguments of the real pool."""
        self.failures: dict[str, int] = {}

    def submit(self, gallery, queries):
        class Done:
            def result(self):
                found = np.array([hashlib.sha256(f"{row}{text}".encode()).digest()[0] / 255 for row, text in queries])
                return Scores(found, dict.fromkeys(METRICS, found))

        return Done()

    def check(self, rewards) -> None:
        assert not np.isnan(rewards).any()

    def stats(self) -> dict:
        return {}

    def wait_until_ready(self) -> None:
        """It is."""

    def close(self) -> None:
        """Holds nothing."""


@pytest.fixture
def make(ray_local, tiny_checkpoints, tiny_catalogue_ref, tmp_path, monkeypatch):
    """Makes jobs on one catalogue; random weights write nonsense, so every text counts as valid."""
    monkeypatch.setattr(context, "RewardPool", Rule)
    monkeypatch.setattr(rollout_batch, "parse_completions", every_text_counts)

    def made(folder: str, **rar) -> tuple[Config, RARJob]:
        return small_job(tiny_checkpoints, tiny_catalogue_ref, tmp_path / folder, **{"steps": STEPS, **rar})

    return made


def run(job: tuple[Config, RARJob], stop_after: int | None = None) -> list[dict[str, float]]:
    """Metrics of the steps; with `stop_after` the training ends unfinished, as if its driver was killed."""
    found: list[dict[str, float]] = []
    with open_trainer(*job) as trainer:
        while trainer.step < STEPS and (stop_after is None or trainer.step < stop_after):
            found.append(trainer.train_step())
        if stop_after is None:
            trainer.finish()
    return found


def weights(folder: str) -> bytes:
    names = [name for name in storage.list_files(f"{folder}/model") if name.endswith(".safetensors")]
    return b"".join(storage.read_bytes(f"{folder}/model/{name}") for name in names)


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_resumed_run_equals_an_uninterrupted_one(make, tmp_path, lag):
    whole = run(make("whole", max_staleness=lag))
    run(make("stopped", max_staleness=lag), stop_after=3)
    rest = run(make("stopped", max_staleness=lag))
    assert len(rest) == 2, "it resumes from the checkpoint of step 2"
    assert weights(str(tmp_path / "stopped")) == weights(str(tmp_path / "whole"))
    for found, expected in zip(rest, whole[2:], strict=True):
        for name in ("reward/mean", "actor/loss", "actor/grad_norm", "actor/rollout_logprob_diff", "rollout/staleness"):
            assert found[name] == expected[name], name
    logged = read_metrics(str(tmp_path / "stopped" / "log"))
    assert [row["step"] for row in logged] == list(range(STEPS))


def test_weights_lost_before_a_push_are_exported_again(make, monkeypatch):
    push, pushed = RolloutPool.push, []

    def lossy(self, weights):
        pushed.append(weights.version)
        if pushed == [0, 1]:
            raise WeightsLostError("gone with the learner")
        push(self, weights)

    monkeypatch.setattr(RolloutPool, "push", lossy)
    steps = run(make("lossy"), stop_after=2)
    assert pushed == [0, 1, 1, 2]
    assert [values["rollout/staleness"] for values in steps] == [0, 0]


def test_stale_rollouts_are_one_update_old_and_get_importance_weights(make, tmp_path):
    fresh, late = (run(make(str(lag), max_staleness=lag)) for lag in (0, 1))
    assert [values["rollout/staleness"] for values in fresh] == [0] * STEPS
    assert [values["rollout/staleness"] for values in late] == [0, 1, 1, 1]
    assert max(values["actor/rollout_logprob_diff"] for values in fresh) < 1e-4
    assert min(values["actor/rollout_logprob_diff"] for values in late[1:]) > 1e-4
    assert "actor/tis_weight" not in fresh[0]
    assert late[0]["actor/tis_weight"] == pytest.approx(1, abs=1e-4)
    assert any(abs(values["actor/tis_weight"] - 1) > 1e-4 for values in late[1:])
    assert weights(str(tmp_path / "0")) != weights(str(tmp_path / "1"))


class Policies:
    """Weights, held-out rewards and metrics of the policies of an undisturbed run that evaluates none of them."""

    def __init__(self, job: tuple[Config, RARJob], steps: int) -> None:
        self.weights, self.heldout, self.metrics = [], [], []
        folder = job[1].directory
        with open_trainer(*job) as trainer:
            for step in range(steps + 1):
                trainer._context.learners.save_model(f"{folder}/{step}/model")
                self.weights.append(weights(f"{folder}/{step}"))
                self.heldout.append(np.nanmean(trainer._heldout().rewards))
                if step < steps:
                    self.metrics.append(trainer.train_step())
        assert len(set(self.weights)) == steps + 1


@pytest.fixture
def scripted(monkeypatch):
    """Sets the greedy reward of the policy after each step."""

    def set_rewards(rewards: list[float]) -> None:
        of = Evaluation.of.__func__

        def found(cls, batch, step):
            assert batch.rewards.shape[1] == 1
            return replace(of(cls, batch, step), rewards=[rewards[step]] * len(batch.groups))

        monkeypatch.setattr(Evaluation, "of", classmethod(found))

    return set_rewards


def finished(job: tuple[Config, RARJob]) -> dict:
    with open_trainer(*job) as trainer:
        return trainer.run()


def test_the_best_policy_is_written_and_measured_also_by_a_resumed_run(make, tmp_path, scripted):
    policies = Policies(make("reference"), 2)
    scripted([0.0, 0.2, 0.5, 0.1, 0.3])
    settings = {"evaluate_every": 1, "keep_best": True, "checkpoint_every": 3}
    result = finished(make("whole", **settings))
    assert result["eval/kept_step"] == 2
    assert weights(str(tmp_path / "whole")) == policies.weights[2]
    assert result["eval/reward_after"]["mean"] == pytest.approx(policies.heldout[2])
    logged = read_metrics(str(tmp_path / "whole" / "log"))
    assert [row["eval/greedy_reward"] for row in logged] == [0.2, 0.5, 0.1, 0.3]
    for row, expected in zip(logged, policies.metrics, strict=False):
        assert row["actor/loss"] == expected["actor/loss"], "an evaluation changed the training"
    # The checkpoint of step 3 knows that step 2 was the best, whose checkpoint outlives those of steps 3 and 4.
    run(make("stopped", **settings), stop_after=3)
    again = finished(make("stopped", **settings))
    assert weights(str(tmp_path / "stopped")) == policies.weights[2]
    for name in ("eval/reward_after", "eval/greedy_reward_gain", "eval/kept_step"):
        assert again[name] == result[name], name


def test_training_ends_early_and_the_initial_policy_may_be_the_best(make, tmp_path, scripted):
    policies = Policies(make("reference"), 0)
    scripted([0.5, 0.4, 0.3, 0.2, 0.1])
    settings = {"evaluate_every": 1, "patience": 2, "keep_best": True, "checkpoint_every": 3}
    for _ in ("trained", "resumed"):
        result = finished(make("early", **settings))
        assert result["eval/kept_step"] == 0
        assert result["eval/reward_after"] == result["eval/reward_before"]
        assert weights(str(tmp_path / "early")) == policies.weights[0]
        assert [row["step"] for row in read_metrics(str(tmp_path / "early" / "log"))] == [0, 1]


def test_without_evaluations_during_training_the_last_policy_is_compared_with_the_first(make, tmp_path, scripted):
    scripted([0.5, 0, 0, 0, 0.4])
    settings = {"max_staleness": 1}
    result = finished(make("last", keep_best=False, **settings))
    assert result["eval/kept_step"] == STEPS
    assert result["eval/greedy_reward_gain"]["mean"] == pytest.approx(-0.1)
    logged = read_metrics(str(tmp_path / "last" / "log"))
    assert ["eval/greedy_reward" in row for row in logged] == [False] * (STEPS - 1) + [True]
    assert finished(make("first", keep_best=True, **settings))["eval/kept_step"] == 0
    assert weights(str(tmp_path / "first")) != weights(str(tmp_path / "last"))
