"""RAR as a trial of Ray Tune, in this process; `tests/jobs/test_tune_job.py` runs the job itself."""

from __future__ import annotations

import pytest

from afmrl_ray.rar.tune import RARTrainable
from tests.rar.test_trainer import STEPS, make, weights

__all__ = ["make"]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture
def trial(make):
    """Makes trials that change some settings of one job."""
    base, job = make("trials", kl_coef=0.0)

    def made(**changes):
        class Trial(RARTrainable):
            trial_id = "-".join(f"{name}-{value}" for name, value in changes.items())

            def setup(self, config):
                super().setup(config, base=base, job=job)

        return Trial(config={f"rar.{name}": value for name, value in changes.items()})

    return made


@pytest.mark.slow
def test_a_restored_trial_continues_with_its_own_settings(trial, tmp_path):
    first = trial(kl_coef=5.0)
    for _ in range(3):
        result = first.train()
    assert "eval/reward_gain" not in result
    first.save(str(tmp_path / "kept"))
    first.stop()
    again = trial(kl_coef=5.0)
    again.restore(str(tmp_path / "kept"))
    result = again.train()
    assert result["done"]
    assert result["actor/kl"] > 0
    assert result["eval/reward_gain"] == pytest.approx(result["eval/reward_after"] - result["eval/reward_before"])
    again.stop()
    free = trial(kl_coef=0.0)
    results = [free.train() for _ in range(STEPS)]
    free.stop()
    assert [row["done"] for row in results] == [False] * (STEPS - 1) + [True]
    assert results[-1]["actor/kl"] == 0, "a reference is held although nothing needs it"
    folder = tmp_path / "trials"
    assert weights(str(folder / "kl_coef-5.0")) != weights(str(folder / "kl_coef-0.0"))
