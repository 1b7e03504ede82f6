"""Settings of RAR that depend on one another."""

from __future__ import annotations

import pytest

from afmrl_ray.config import load_config
from afmrl_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "scale"),
    [
        ([], "group"),
        (["rar.reward.kind=log_softmax"], "batch"),
        (["rar.reward.kind=log_softmax", "rar.scale_rewards=group"], "group"),
        (["rar.scale_rewards=batch"], "batch"),
        (["rar.scale_rewards=none"], "none"),
    ],
)
def test_advantages_of_log_probabilities_are_scaled_by_the_batch_unless_set(overrides, scale):
    assert load_config(None, overrides).rar.reward_scaling == scale


def test_a_reward_that_is_added_to_the_worst_must_be_negative():
    with pytest.raises(ConfigError, match="use a negative one"):
        load_config(None, ["rar.reward.kind=log_softmax", "rar.reward.invalid=0"])
    assert load_config(None, ["rar.reward.kind=recall", "rar.reward.invalid=0"]).rar.reward.invalid == 0
