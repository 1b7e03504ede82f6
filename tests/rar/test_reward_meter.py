from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest

from afmrl_ray.rar import reward_meter
from afmrl_ray.rar.reward_meter import Meter, ServiceStats, since, summed


class Told:
    """Stands in for Ray's metrics; adds up what each is told, by name and tags."""

    total: ClassVar[Counter[tuple[str, ...]]] = Counter()

    def __init__(self, name, description, *rest):
        self._name = name

    def inc(self, value, tags):
        Told.total[self._name, *tags.values()] += value

    def observe(self, value, tags):
        Told.total[self._name, *tags.values()] += value

    set = inc


@pytest.fixture
def meter(monkeypatch) -> Meter:
    Told.total.clear()
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(reward_meter, kind, Told)
    return Meter("a0")


def test_prometheus_is_told_what_the_stats_count(meter):
    with meter.request("train", 5):
        assert meter.stats.in_flight == 1
        with meter.request("heldout", 2):
            meter.known("train", kept=1, joined=2)
            meter.batch(2, {"train": 2, "heldout": 2}, {"train": 70, "heldout": 30})
    meter.spent("encode", "train", 1.5)
    assert meter.stats == ServiceStats(
        requests=2, queries=7, cache_hits=1, joined=2, scored=4, batches=1, batch_requests_max=2, batch_queries_max=4,
        tokens=100, in_flight_max=2, seconds_encode=1.5,
    )  # fmt: skip
    for name in ("requests", "queries", "cache_hits", "joined", "scored", "tokens"):
        told = sum(value for (metric, *_), value in Told.total.items() if metric == f"afmrl_reward_{name}")
        assert told == getattr(meter.stats, name), name
    assert Told.total["afmrl_reward_queries", "a0", "heldout"] == 2
    assert Told.total["afmrl_reward_batch_queries", "a0", "train"] == 2
    assert Told.total["afmrl_reward_encode_seconds", "a0", "train"] == 1.5
    assert Told.total["afmrl_reward_in_flight", "a0"] == 1 + 2 + 1 + 0


def test_a_difference_counts_an_actor_that_began_anew_from_its_beginning():
    before = ServiceStats(requests=5, queries=50, batch_queries_max=9, queue_depth=3)
    now = ServiceStats(requests=7, queries=60, batch_queries_max=9, queue_depth=1)
    assert since(now, before) == ServiceStats(requests=2, queries=10, batch_queries_max=9, queue_depth=1)
    anew = ServiceStats(requests=2, queries=8)
    assert since(anew, before) == since(anew, None) == anew


def test_actors_add_up_but_for_what_is_a_largest():
    a = ServiceStats(queries=3, in_flight_max=2, seconds_rank=0.5)
    b = ServiceStats(queries=4, in_flight_max=5, seconds_rank=1.0)
    assert summed([a, b]) == ServiceStats(queries=7, in_flight_max=5, seconds_rank=1.5)
