"""The driver of RAR: what a stop and a lag leave unchanged. Rewards are a rule, learners and rollout actors real."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from afmrl_ray import storage
from afmrl_ray.errors import WeightsLostError
from afmrl_ray.rar import experience, trainer
from afmrl_ray.rar.reward_spec import KINDS, Scores
from afmrl_ray.rar.rollout import RolloutPool
from afmrl_ray.rar.trainer import RARTrainer
from afmrl_ray.training.metrics_log import read_metrics
from tests.rar.conftest import every_text_counts, small_trainer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
STEPS = 4


class Rule:
    """A reward service in this process: a hash of row and text."""

    def __init__(self, *_: object, **__: object) -> None:
        """Needs nothing of what the real one does."""
        self.failures: dict[str, int] = {}

    def submit(self, gallery, queries):
        class Done:
            def result(self):
                found = np.array([hashlib.sha256(f"{row}{text}".encode()).digest()[0] / 255 for row, text in queries])
                return Scores(found, dict.fromkeys(KINDS, found))

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
    """Makes trainers on one catalogue; random weights write nonsense, so every text counts as some attribute."""
    monkeypatch.setattr(trainer, "RewardPool", Rule)
    monkeypatch.setattr(experience, "parse_completions", every_text_counts)

    def made(folder: str, **rar) -> RARTrainer:
        return small_trainer(tiny_checkpoints, tiny_catalogue_ref, tmp_path / folder, **{"steps": STEPS, **rar})

    return made


def run(driver: RARTrainer, stop_after: int | None = None) -> list[dict[str, float]]:
    """Numbers of the steps; stopped as a killed driver would be, with nothing finished."""
    found: list[dict[str, float]] = []
    try:
        driver.begin()
        while driver.step < STEPS and (stop_after is None or driver.step < stop_after):
            found.append(driver.train_step())
        if stop_after is None:
            driver.finish()
    finally:
        driver.close()
    return found


def weights(folder: str) -> bytes:
    names = [name for name in storage.list_files(f"{folder}/model") if name.endswith(".safetensors")]
    return b"".join(storage.read_bytes(f"{folder}/model/{name}") for name in names)


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(make, tmp_path, lag):
    whole = run(make("whole", max_staleness=lag))
    run(make("stopped", max_staleness=lag), stop_after=3)
    rest = run(make("stopped", max_staleness=lag))
    assert len(rest) == 2, "it goes on from the checkpoint of step 2"
    assert weights(str(tmp_path / "stopped")) == weights(str(tmp_path / "whole"))
    for found, expected in zip(rest, whole[2:], strict=True):
        for name in ("reward_mean", "loss", "grad_norm", "rollout_logprob_diff", "staleness"):
            assert found[name] == expected[name], name
    logged = read_metrics(str(tmp_path / "stopped" / "log"))
    assert [row["step"] for row in logged] == list(range(STEPS))


def test_weights_that_were_lost_on_their_way_are_exported_again(make, monkeypatch):
    push, pushed = RolloutPool.push, []

    def lossy(self, weights):
        pushed.append(weights.version)
        if pushed == [0, 1]:
            raise WeightsLostError("gone with the learner")
        push(self, weights)

    monkeypatch.setattr(RolloutPool, "push", lossy)
    steps = run(make("lossy"), stop_after=2)
    assert pushed == [0, 1, 1, 2]
    assert [values["staleness"] for values in steps] == [0, 0]


def test_rollouts_lag_one_update_behind_and_are_weighted_for_it(make, tmp_path):
    fresh, late = (run(make(str(lag), max_staleness=lag)) for lag in (0, 1))
    assert [values["staleness"] for values in fresh] == [0] * STEPS
    assert [values["staleness"] for values in late] == [0, 1, 1, 1]
    assert max(values["rollout_logprob_diff"] for values in fresh) < 1e-4
    assert min(values["rollout_logprob_diff"] for values in late[1:]) > 1e-4
    assert "importance" not in fresh[0]
    assert late[0]["importance"] == pytest.approx(1, abs=1e-4)
    assert any(abs(values["importance"] - 1) > 1e-4 for values in late[1:])
    assert weights(str(tmp_path / "0")) != weights(str(tmp_path / "1"))
