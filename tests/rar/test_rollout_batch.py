"""Rollouts of a step, with fake pools that sample and score by rule."""

from __future__ import annotations

import numpy as np
import pytest

from afmrl_ray.rar.messages import PromptGroup
from afmrl_ray.rar.prompts import group_seeds, prompts_of_step
from afmrl_ray.rar.reward.spec import METRICS, Scores
from afmrl_ray.rar.rollout_batch import Collector, RolloutRequest, with_invalid

REQUEST = RolloutRequest(gallery="train", group_size=3, max_attributes=4, invalid_reward=-0.1)
ROWS = np.arange(100, 140)
NAN = float("nan")


def group(row: int, seed: int, size: int) -> PromptGroup:
    texts = [(f"color: {row}; part: {place}", True) for place in range(size - 1)] + [("nonsense", True)]
    shape = (size, 2)
    return PromptGroup(row, 0, np.full(shape, seed), np.ones(shape, bool), np.zeros(shape, np.float32), texts)


class Rollouts:
    """Chunks of two groups, the last one first."""

    def __init__(self, log: list) -> None:
        self.log = log

    def stream(self, rows, seeds, *, group_size):
        for start in reversed(range(0, len(rows), 2)):
            self.log.append(("sampled", start))
            pairs = zip(rows[start : start + 2], seeds[start : start + 2], strict=True)
            yield start, [group(row, seed, group_size) for row, seed in pairs]


class Rewards:
    """Row modulo ten; groups whose row satisfies `varies` get different rewards."""

    def __init__(self, log: list, varies=lambda row: True) -> None:
        self.log, self.varies = log, varies

    def value(self, row, text):
        return row % 10 + (int(text[-1]) if self.varies(row) else 0)

    def submit(self, gallery, queries):
        assert gallery == "train"
        self.log.append(("submitted", len(queries)))
        values = [self.value(row, text) for row, text in queries]

        class Done:
            def result(self):
                found = np.array(values, dtype=float)
                return Scores(found, dict.fromkeys(METRICS, found))

        return Done()

    def check(self, rewards):
        self.log.append(("checked", len(rewards)))


def collect(**options):
    log: list = []
    rows = [103, 104, 105]
    return Collector(Rollouts(log), Rewards(log)).collect(rows, [1, 2, 3], REQUEST, **options), log


def test_groups_and_rewards_are_in_the_order_of_the_prompts():
    found, _ = collect()
    assert [g.row for g in found.groups] == [103, 104, 105]
    assert found.rewards.tolist() == [[3, 4, -0.1], [4, 5, -0.1], [5, 6, -0.1]]
    assert len(found.parsed) == 9


def test_a_chunk_is_scored_before_the_next_is_sampled():
    _, log = collect()
    assert log == [("sampled", 2), ("submitted", 2), ("sampled", 0), ("submitted", 4), ("checked", 6)]


def test_only_rejected_completions_get_the_invalid_reward_and_they_are_not_scored():
    texts = [("color: red", True), ("color: red", False), ("nonsense", True), ("size: xl", True)]
    scored = []

    class Sampled:
        def stream(self, rows, seeds, *, group_size):
            shape = (4, 1)
            yield 0, [PromptGroup(5, 0, np.zeros(shape, int), np.ones(shape, bool), np.zeros(shape, np.float32), texts)]

    class Lossy(Rewards):
        def submit(self, gallery, queries):
            scored.extend(queries)
            return super().submit(gallery, queries)

    request = RolloutRequest(gallery="train", group_size=4, max_attributes=4, invalid_reward=-0.1)
    rewards = Lossy([])
    rewards.value = lambda row, text: NAN if "size" in text else 0.5
    found = Collector(Sampled(), rewards).collect([5], [1], request)
    assert scored == [(5, "color: red"), (5, "size: xl")]
    np.testing.assert_array_equal(found.rewards, [[0.5, -0.1, -0.1, NAN]])
    texts[:] = [("", True)] * 4
    rewards.submit = lambda *_: pytest.fail("scored")
    np.testing.assert_array_equal(Collector(Sampled(), rewards).collect([5], [1], request).rewards, [[-0.1] * 4])


def test_an_invalid_completion_is_worse_than_any_valid_one_of_its_group_in_log_probabilities():
    """Whatever the log-probabilities of other groups; failed rewards say nothing; without any valid one, chance."""
    rewards = np.array([[-3.0, -5.0, NAN, NAN], [-0.2, -0.1, -0.3, NAN], [NAN] * 4, [NAN] * 4])
    invalid = np.array([[0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=bool)
    found = with_invalid(rewards, invalid, penalty=-0.1, chance=-7.0)
    expected = [[-3, -5, NAN, -5.1], [-0.2, -0.1, -0.3, -0.4], [-7.1] * 4, [NAN, -7.1, -7.1, -7.1]]
    np.testing.assert_allclose(found, expected)
    fixed = with_invalid(rewards, invalid, penalty=-0.1, chance=None)
    np.testing.assert_array_equal(fixed[invalid], -0.1)
    np.testing.assert_array_equal(fixed[~invalid], rewards[~invalid])


def test_the_collector_applies_the_rule_of_its_request():
    request = RolloutRequest(gallery="train", group_size=3, max_attributes=4, invalid_reward=-0.5, chance=-9.0)
    found = Collector(Rollouts([]), Rewards([])).collect([103, 104, 105], [1, 2, 3], request)
    assert found.rewards.tolist() == [[3, 4, 2.5], [4, 5, 3.5], [5, 6, 4.5]]


def step(varies, rounds: int, number: int = 5):
    log: list = []
    collector = Collector(Rollouts(log), Rewards(log, varies))
    return collector.collect_step(ROWS, number, count=8, seed=3, request=REQUEST, dynamic_sampling_rounds=rounds)


@pytest.fixture
def only_valid_texts(monkeypatch):
    import sys

    def plain(row, seed, size):
        texts = [(f"color: {row}; part: {place}", True) for place in range(size)]
        shape = (size, 2)
        return PromptGroup(row, 0, np.full(shape, seed), np.ones(shape, bool), np.zeros(shape, np.float32), texts)

    monkeypatch.setattr(sys.modules[__name__], "group", plain)


@pytest.mark.usefixtures("only_valid_texts")
def test_prompts_of_zero_variance_are_replaced_by_unused_ones():
    used = prompts_of_step(ROWS, 5, 8, 3)
    zero_variance = {int(row) for row in used[:3]}
    kept = step(lambda row: row not in zero_variance, 0)
    assert [g.row for g in kept.groups] == used.tolist()
    assert kept.zero_variance_groups().sum() == 3
    found = step(lambda row: row not in zero_variance, 2)
    assert found.zero_variance_groups().sum() == 0
    assert found.metrics["rollout/resampled_groups"] == 3
    rows = [g.row for g in found.groups]
    assert len(set(rows)) == 8
    assert not zero_variance & set(rows)
    assert rows[3:] == used[3:].tolist()
    assert [g.ids[0, 0] for g in found.groups[3:]] == group_seeds(3, 5, 8)[3:]
    again = step(lambda row: row not in zero_variance, 2)
    assert [(g.row, g.ids[0, 0]) for g in again.groups] == [(g.row, g.ids[0, 0]) for g in found.groups]


@pytest.mark.usefixtures("only_valid_texts")
def test_groups_of_zero_variance_stay_after_the_last_round():
    found = step(lambda row: False, 2)
    assert found.zero_variance_groups().all()
    assert found.metrics["rollout/resampled_groups"] == 16
    assert len(found.groups) == len({g.row for g in found.groups}) == 8


def test_failed_rewards_are_no_variance():
    found, _ = collect()
    found.rewards[:] = [[NAN, 1, 1], [NAN, 1, 2], [NAN, NAN, NAN]]
    assert found.zero_variance_groups().tolist() == [True, False, True]
