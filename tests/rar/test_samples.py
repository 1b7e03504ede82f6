from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from afmrl_ray.attributes.text import InvalidAttributes
from afmrl_ray.rar.messages import PromptGroup
from afmrl_ray.rar.rollout_batch import RolloutBatch
from afmrl_ray.rar.samples import write_samples
from afmrl_ray.report.rollouts import read_rollouts
from afmrl_ray.runs import Stage


def test_the_table_has_one_row_per_completion_and_the_report_shows_the_best_first(tmp_path):
    mask = np.array([[True, True, False], [True, True, True]])
    groups = [
        PromptGroup(row, 7, mask.astype(np.int64), mask, np.where(mask, -0.5, 9).astype(np.float32),
                    [(f"color: red {row}", True), ("color", False)])
        for row in (3, 4)
    ]  # fmt: skip
    parsed = [(("color", "red"),), InvalidAttributes("no_pair")] * 2
    rewards = np.array([[0.25, -0.1], [np.nan, 0.5]])
    batch = RolloutBatch(groups, rewards, parsed, {})
    for step in (0, 10, 20):
        path = write_samples(str(tmp_path / "samples"), step, batch, np.array([[1.0, -1.0], [0.0, 0.0]]), ["a", "b"])
    rows = pq.read_table(path).to_pylist()
    assert [row["item_id"] for row in rows] == ["a", "a", "b", "b"]
    assert [row["sample"] for row in rows] == [0, 1, 0, 1]
    assert [row["reward"] for row in rows] == [0.25, -0.1, None, 0.5]
    assert [row["tokens"] for row in rows] == [2, 3, 2, 3]
    assert [row["invalid"] for row in rows] == [None, "no_pair"] * 2
    assert rows[0]["logp"] == pytest.approx(-0.5)
    assert {(row["step"], row["version"]) for row in rows} == {(20, 7)}

    stage = Stage("rar-r0", "", str(tmp_path), {}, {}, {}, {}, "", 0.0, None)
    shown = read_rollouts(stage)
    assert [(prompt.step, prompt.item_id) for prompt in shown] == [(0, "a"), (0, "b"), (20, "a"), (20, "b")]
    assert [rollout.reward for rollout in shown[1].rollouts] == [0.5, None]
    assert shown[0].rollouts[1].invalid == "no_pair"
    assert read_rollouts(None) == []
