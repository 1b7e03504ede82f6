"""Rewards of held-out prompts, apart from what the format costs."""

from __future__ import annotations

import numpy as np
import pytest

from afmrl_ray.attributes.text import parse_attributes
from afmrl_ray.rar.heldout import compare, summarise

NAN = float("nan")


def parsed(rows: list[list[int]]) -> list:
    """One valid completion for each 1, a rejected one for each 0."""
    texts = ["color: red" if valid else "nonsense" for row in rows for valid in row]
    return [parse_attributes(text, max_attributes=4, complete=True) for text in texts]


def test_valid_completions_are_averaged_apart():
    rewards = np.array([[0.4, -0.1], [0.2, NAN], [-0.1, -0.1]])
    found = summarise(rewards, parsed([[1, 0], [1, 1], [0, 0]]))
    np.testing.assert_allclose(found.rewards, [0.15, 0.2, -0.1])
    np.testing.assert_allclose(found.valid_rewards, [0.4, 0.2, NAN])
    assert found.invalid_fraction == 0.5


def test_a_gain_by_format_alone_is_none_of_valid_completions():
    """Each valid completion has the same reward before and after, and fewer are invalid after."""
    before = summarise(np.array([[0.4, -0.1], [0.2, -0.1], [-0.1, -0.1]]), parsed([[1, 0], [1, 0], [0, 0]]))
    after = summarise(np.array([[0.4, 0.4], [0.2, 0.2], [0.9, 0.9]]), parsed([[1, 1], [1, 1], [1, 1]]))
    result = compare(before, after, seed=0)
    assert result["eval/reward_gain"]["low"] > 0
    assert result["eval/reward_valid_gain"] == {"mean": 0, "low": 0, "high": 0}
    assert result["eval/reward_valid_before"]["mean"] == result["eval/reward_valid_after"]["mean"] == pytest.approx(0.3)
    assert result["eval/prompts"] == 3


def test_without_valid_completions_there_is_no_reward_of_them():
    nothing = summarise(np.full((2, 2), -0.1), parsed([[0, 0], [0, 0]]))
    result = compare(nothing, nothing, seed=0)
    assert result["eval/reward_before"]["mean"] == -0.1
    assert not any("valid_before" in name for name in result if name.startswith("eval/reward_valid"))
