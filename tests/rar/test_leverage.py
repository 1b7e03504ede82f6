"""What true attributes would gain on held-out queries, and what is said if that is nothing."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from afmrl_ray.rar.leverage import measure_leverage
from tests.rar.test_rollout_batch import Rewards

NAN = float("nan")


class Reward(Rewards):
    """1 for true attributes, whatever the row."""

    def value(self, row, text):
        return {"true": 1.0, "lost": NAN}[text]


def measured(generated: list[float], truth: dict[int, str]) -> dict:
    log: list = []
    found = measure_leverage(Reward(log), "train", [5, 6, 7, 8], generated, truth, seed=0)
    assert ("checked", len(truth)) in log or not truth
    return found


def test_only_queries_with_known_rewards_and_true_attributes_count():
    found = measured([0.5, 0.25, NAN, 0.0], {5: "true", 6: "true", 7: "true"})["eval/leverage"]
    assert found["mean"] == pytest.approx(np.mean([0.5, 0.75]))
    assert found["low"] < found["mean"] < found["high"]
    assert measured([0.5, 0.25, 0.0, 0.0], {5: "lost", 6: "true"})["eval/leverage"]["mean"] == 0.75
    assert measured([0.5] * 4, {}) == {}
    assert measured([NAN] * 4, {5: "true"}) == {}


@pytest.mark.parametrize(("generated", "warned"), [([0.5, 0.4, 0.3, 0.6], False), ([1.0, 1.0, 1.0, 1.0], True)])
def test_no_leverage_is_a_warning_that_says_what_to_do(caplog, generated, warned):
    with caplog.at_level(logging.INFO, logger="afmrl_ray.rar.leverage"):
        measured(generated, dict.fromkeys([5, 6, 7, 8], "true"))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == warned
    assert all("rar.reward.kind=log_softmax" in message for message in warnings)
    assert any("true attributes on 4 held-out queries" in record.getMessage() for record in caplog.records)
