"""Which policy is kept, when training ends, and what its evaluations report."""

from __future__ import annotations

import json

import numpy as np
import pytest

from afmrl_ray.attributes.text import parse_attributes
from afmrl_ray.config import load_config
from afmrl_ray.errors import ConfigError
from afmrl_ray.rar.messages import PromptGroup
from afmrl_ray.rar.rollout_batch import RolloutBatch
from afmrl_ray.rar.selection import Evaluation, Selection

NAN = float("nan")


def evaluation(step: int, *rewards: float) -> Evaluation:
    return Evaluation(step, list(rewards), [True] * len(rewards), hit_1=0.5, mean_pairs=2.0)


def after(*rewards: float) -> Selection:
    selection = Selection.start(evaluation(0, rewards[0]))
    for step, reward in enumerate(rewards[1:], 1):
        selection = selection.add(evaluation(step, reward))
    return selection


@pytest.mark.parametrize(
    ("rewards", "best", "waited"),
    [([0.2], 0, 0), ([0.2, 0.1], 0, 1), ([0.2, 0.3, 0.1, 0.3], 1, 2), ([-3, -2, -2.5, -1], 3, 0), ([1, 1, 1], 0, 2)],
)
def test_the_earliest_of_the_highest_rewards_is_best(rewards, best, waited):
    selection = after(*rewards)
    assert (selection.first.step, selection.best.step, selection.last.step) == (0, best, len(rewards) - 1)
    assert selection.without_improvement == waited
    assert [selection.exhausted(patience) for patience in (None, waited + 1)] == [False, False]
    assert not waited or selection.exhausted(waited)


def test_a_selection_survives_a_checkpoint():
    selection = Selection.start(evaluation(0, 0.1, NAN)).add(evaluation(4, 0.3, 0.2))
    again = Selection.from_dict(json.loads(json.dumps(selection.as_dict())))
    assert str(again) == str(selection)


def test_an_evaluation_counts_invalid_completions_as_misses():
    texts = ["color: red", "nonsense", "color: blue; size: xl", "a: b"]
    parsed = [parse_attributes(text, max_attributes=4, complete=True) for text in texts]
    groups = [PromptGroup(0, 0, np.zeros((1, 1)), np.ones((1, 1)), np.zeros((1, 1)), [(text, True)]) for text in texts]
    batch = RolloutBatch(groups, np.array([[0.4], [-0.1], [0.6], [NAN]]), parsed, {"reward/hit_1": 1 / 3})
    found = Evaluation.of(batch, 7)
    assert found.step == 7
    assert found.reward == pytest.approx(0.3)
    assert found.metrics() == pytest.approx(
        {
            "eval/greedy_reward": 0.3,
            "eval/greedy_reward_valid": 0.5,
            "eval/greedy_hit": 0.25,
            "eval/greedy_invalid_fraction": 0.25,
            "eval/greedy_attribute_pairs": 4 / 3,
        }
    )


def test_the_result_compares_the_kept_policy_with_the_initial_one_by_prompt():
    selection = (
        Selection.start(evaluation(0, 0.1, 0.5, NAN)).add(evaluation(5, 0.3, 0.5, 0.9)).add(evaluation(9, 0, 0, 0))
    )
    result = selection.result(selection.best, seed=0)
    means = {name: result[f"eval/greedy_reward_{name}"]["mean"] for name in ("before", "after", "gain")}
    assert means == pytest.approx({"before": 0.3, "after": 0.4, "gain": 0.1})
    assert result["eval/kept_step"] == 5
    assert result["eval/greedy_reward_valid_after"] == pytest.approx(17 / 30)


def test_patience_without_evaluations_is_refused():
    with pytest.raises(ConfigError, match="set evaluate_every"):
        load_config(None, ["rar.patience=2"])
    assert load_config(None, ["rar.patience=2", "rar.evaluate_every=5"]).rar.patience == 2
