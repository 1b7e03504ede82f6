from __future__ import annotations

import numpy as np
import pytest

from afmrl_ray.rar.checkpoint import Checkpoints
from afmrl_ray.rar.heldout import compare, summarise
from afmrl_ray.rar.messages import PromptGroup
from afmrl_ray.rar.prompts import batch_columns, group_seeds, prompts_of_step


def test_every_epoch_uses_each_prompt_once():
    rows = np.arange(100, 110)
    used = np.concatenate([prompts_of_step(rows, step, 4, seed=1) for step in range(10)])
    for epoch in range(4):
        assert sorted(used[epoch * 10 : (epoch + 1) * 10]) == rows.tolist()
    np.testing.assert_array_equal(prompts_of_step(rows, 7, 4, seed=1), used[28:32])
    assert not np.array_equal(prompts_of_step(rows, 7, 4, seed=2), used[28:32])


def test_seeds_differ_between_groups_and_steps():
    seeds = [seed for step in range(-1, 20) for seed in group_seeds(0, step, 8)]
    assert len(set(seeds)) == len(seeds)
    assert group_seeds(0, 3, 8) == group_seeds(0, 3, 8)


def group(row: int, lengths: list[int], width: int) -> PromptGroup:
    mask = np.arange(width) < np.array(lengths)[:, None]
    ids = np.where(mask, row, 0)
    return PromptGroup(row, 0, ids, mask, np.where(mask, -1.0, 0.0).astype(np.float32), [("", True)] * len(lengths))


def test_columns_are_aligned_by_completion_and_use_the_denominator_of_the_step():
    groups, advantages = [group(5, [2, 1], 2), group(6, [3, 3], 3)], np.array([[1.0, -1.0], [2.0, -2.0]])
    columns = batch_columns(groups, advantages, np.ones((2, 2)))
    assert columns["row"].tolist() == [5, 5, 6, 6]
    assert columns["advantage"].tolist() == [1, -1, 2, -2]
    assert columns["completion"].tolist() == [[5, 5, 0], [5, 0, 0], [6, 6, 6], [6, 6, 6]]
    assert columns["mask"].sum(1).tolist() == [2, 1, 3, 3]
    assert set(columns["denominator"].tolist()) == {9.0}
    assert columns["weight"].tolist() == [1, 1, 1, 1]


def test_a_completion_whose_reward_failed_has_weight_zero():
    groups, advantages = [group(5, [2, 1], 2), group(6, [3, 3], 3)], np.array([[1.0, -1.0], [0.0, 0.0]])
    columns = batch_columns(groups, advantages, np.array([[0.5, 0.0], [1.0, np.nan]]))
    assert columns["weight"].tolist() == [1, 1, 1, 0]
    assert set(columns["denominator"].tolist()) == {6.0}


def test_held_out_means_exclude_failed_rewards():
    parsed = [(("a", "b"),)] * 6
    before = summarise(np.array([[0.0, 1.0], [np.nan, 0.5], [np.nan, np.nan]]), parsed)
    after = summarise(np.ones((3, 2)), parsed)
    np.testing.assert_array_equal(before.rewards, [0.5, 0.5, np.nan])
    result = compare(before, after, seed=0)
    assert result["eval/reward_gain"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert result["eval/prompts"] == 2
    assert result["eval/attribute_pairs_after"] == pytest.approx(1.0)


def test_a_checkpoint_is_complete_only_with_its_manifest(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.latest() is None
    for step in (2, 4, 6):
        folder = tmp_path / f"step_{step:07d}" / "engine"
        folder.mkdir(parents=True)
        (folder / "shard").write_text(str(step))
        if step < 6:
            checkpoints.commit(step, {"next_batch": None})
    assert checkpoints.latest() == {"step": 4, "next_batch": None}
    checkpoints.commit(6, {"next_batch": None})
    assert checkpoints.steps() == [4, 6]
    assert not (tmp_path / "step_0000002").exists()


def test_groups_of_equal_rewards_can_be_left_out_of_the_loss_and_its_denominator():
    groups = [group(5, [2, 1], 2), group(6, [3, 3], 3), group(7, [2, 2], 3)]
    rewards = np.array([[1.0, 0.0], [0.5, 0.5], [1.0, np.nan]])
    kept = batch_columns(groups, np.zeros((3, 2)), rewards)
    assert kept["weight"].tolist() == [1, 1, 1, 1, 1, 0]
    left_out = batch_columns(groups, np.zeros((3, 2)), rewards, exclude_zero_variance=True)
    assert left_out["weight"].tolist() == [1, 1, 0, 0, 0, 0]
    assert set(left_out["denominator"].tolist()) == {3.0}
    alone = batch_columns(groups[:1], np.zeros((1, 2)), rewards[:1])
    assert left_out["denominator"][0] == alone["denominator"][0]


def test_every_mini_batch_has_the_denominator_of_its_own_groups():
    groups = [group(row, [row, 1], row) for row in (1, 2, 3, 4)]
    columns = batch_columns(groups, np.zeros((4, 2)), np.array([[1.0, 0.0]] * 4), minibatches=2)
    assert columns["group"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert columns["denominator"].tolist() == [6, 6, 8, 8, 6, 6, 8, 8]
    assert columns["tokens"].tolist() == columns["denominator"].tolist()
