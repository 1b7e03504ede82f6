from __future__ import annotations

import math

import numpy as np
import pytest

from afmrl_ray.attributes.text import InvalidAttributes
from afmrl_ray.rar.completions import parse_completions, reward_completions


def test_only_the_parser_gives_the_invalid_reward_and_what_it_refused_is_never_scored():
    texts = [("color: red", True), ("color: red", False), ("nonsense", True), ("size: xl", True)]
    parsed = parse_completions(texts, max_attributes=4)
    assert [isinstance(p, InvalidAttributes) for p in parsed] == [False, True, True, False]
    asked = []

    def score(queries):
        asked.extend(queries)
        return np.array([0.0, math.nan])

    rewards = reward_completions([5, 5, 6, 7], parsed, score, invalid=-0.1)
    assert asked == [(5, "color: red"), (7, "size: xl")]
    np.testing.assert_array_equal(rewards, [0.0, -0.1, -0.1, math.nan])


def test_nothing_valid_asks_nothing():
    parsed = parse_completions([("", True)], max_attributes=4)
    rewards = reward_completions([1], parsed, lambda queries: pytest.fail("asked"), invalid=-0.1)
    np.testing.assert_array_equal(rewards, [-0.1])
