"""What a RAR opens is closed in reverse order, whatever fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from afmrl_ray.attributes.text import normalise_attributes
from afmrl_ray.rar import context
from afmrl_ray.rar.context import open_context
from tests.rar.conftest import small_job

PARTS = ("FaultTolerantLearnerGroup", "RewardPool", "RolloutPool", "RolloutPrefetcher", "MetricsLog")


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Opening and closing of every part, in order; the parts themselves are replaced."""
    found: list[str] = []

    def replaced(name: str) -> type:
        class Part:
            def __init__(self, *arguments: Any, **_: Any) -> None:
                self.arguments = arguments
                found.append(f"open {name}")

            def close(self) -> None:
                found.append(f"close {name}")

            shutdown = close

        return Part

    for name in PARTS:
        monkeypatch.setattr(context, name, replaced(name))
    monkeypatch.setattr(context.Gallery, "put", lambda *_, **__: None)
    return found


@pytest.fixture
def job(tiny_checkpoints, tiny_catalogue_ref, tmp_path):
    return small_job(tiny_checkpoints, tiny_catalogue_ref, tmp_path)


def test_everything_is_closed_in_reverse_order(events, job):
    with open_context(*job):
        assert sorted(events) == sorted(f"open {name}" for name in PARTS)
    opened = [event.removeprefix("open ") for event in events[: len(PARTS)]]
    assert events[len(PARTS) :] == [f"close {name}" for name in reversed(opened)]


def test_an_error_closes_everything_too(events, job):
    with pytest.raises(RuntimeError, match="in a step"):
        with open_context(*job):
            raise RuntimeError("in a step")
    assert [event for event in events if event.startswith("close")] == [f"close {name}" for name in reversed(PARTS)]


def test_a_part_that_fails_to_open_closes_those_before_it(events, job, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(context, "RolloutPool", fails)
    with pytest.raises(RuntimeError, match="no room"):
        with open_context(*job):
            pytest.fail("it opened")
    assert events == [
        "open FaultTolerantLearnerGroup",
        "open RewardPool",
        "close RewardPool",
        "close FaultTolerantLearnerGroup",
    ]


def test_known_duplicates_reach_the_reward_service_only_with_a_threshold(
    events, monkeypatch, tiny_checkpoints, tmp_path, tiny_catalogue_ref
):
    """The first attribute alone counts here, since no two items of the tiny catalogue have all in common."""
    monkeypatch.setattr(context, "normalise_attributes", lambda attributes: normalise_attributes(attributes)[:1])
    for threshold in (None, -1.0):
        reward = {"duplicate_threshold": threshold}
        config, job = small_job(tiny_checkpoints, tiny_catalogue_ref, tmp_path / str(threshold), reward=reward)
        with open_context(config, job) as opened:
            left_out = opened.rewards.arguments[0].left_out
        assert left_out == opened.left_out
        if threshold is None:
            assert left_out == {"train": {}, "heldout": {}}
            continue
        catalogue = tiny_catalogue_ref.open()
        items = [catalogue.item(row) for row in range(len(catalogue))]
        pairs = [normalise_attributes(item.attributes)[:1] for item in items]
        assert left_out["train"]
        for query in opened.prompts["train"].rows.tolist():
            expected = [
                row
                for row, item in enumerate(items)
                if item.product_id != items[query].product_id and pairs[row] == pairs[query] and pairs[query]
            ]
            assert left_out["train"].get(query, np.array([])).tolist() == expected
