from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest

from afmrl_ray.rar.reward import metrics
from afmrl_ray.rar.reward.metrics import FAILURE_CAUSES, Meter, ServiceLog, ServiceStats, stats_since, sum_stats


class Recorded:
    """Replaces Ray's metrics; adds up the values of each by name and tags."""

    total: ClassVar[Counter[tuple[str, ...]]] = Counter()

    def __init__(self, name, description, *rest):
        self._name = name

    def inc(self, value, tags):
        Recorded.total[self._name, *tags.values()] += value

    def observe(self, value, tags):
        Recorded.total[self._name, *tags.values()] += value

    set = inc


@pytest.fixture
def meter(monkeypatch) -> Meter:
    Recorded.total.clear()
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Recorded)
    return Meter("a0")


def test_prometheus_gets_the_same_counts_as_the_stats(meter):
    with meter.request("train", 5):
        assert meter.stats.in_flight == 1
        with meter.request("heldout", 2):
            meter.reused("train", cached=1, joined=2)
            meter.batch(2, {"train": 2, "heldout": 2}, {"train": 70, "heldout": 30})
    meter.add_seconds("encode", "train", 1.5)
    assert meter.stats == ServiceStats(
        requests=2, queries=7, cache_hits=1, joined=2, scored=4, batches=1, batch_requests_max=2, batch_queries_max=4,
        tokens=100, in_flight_max=2, seconds_encode=1.5,
    )  # fmt: skip
    for name in ("requests", "queries", "cache_hits", "joined", "scored", "tokens"):
        exported = sum(value for (metric, *_), value in Recorded.total.items() if metric == f"afmrl_reward_{name}")
        assert exported == getattr(meter.stats, name), name
    assert Recorded.total["afmrl_reward_queries", "a0", "heldout"] == 2
    assert Recorded.total["afmrl_reward_batch_queries", "a0", "train"] == 2
    assert Recorded.total["afmrl_reward_encode_seconds", "a0", "train"] == 1.5
    assert Recorded.total["afmrl_reward_in_flight", "a0"] == 1 + 2 + 1 + 0


def test_the_difference_of_a_restarted_actor_starts_from_zero():
    before = ServiceStats(requests=5, queries=50, batch_queries_max=9, queue_depth=3)
    now = ServiceStats(requests=7, queries=60, batch_queries_max=9, queue_depth=1)
    assert stats_since(now, before) == ServiceStats(requests=2, queries=10, batch_queries_max=9, queue_depth=1)
    restarted = ServiceStats(requests=2, queries=8)
    assert stats_since(restarted, before) == stats_since(restarted, None) == restarted


def test_counts_of_actors_add_up_and_maxima_are_maxima():
    a = ServiceStats(queries=3, in_flight_max=2, seconds_rank=0.5)
    b = ServiceStats(queries=4, in_flight_max=5, seconds_rank=1.0)
    assert sum_stats([a, b]) == ServiceStats(queries=7, in_flight_max=5, seconds_rank=1.5)


def test_the_log_has_what_each_step_added():
    log = ServiceLog()
    log.step({"a0": ServiceStats(requests=1, scored=3, batches=1)}, {"died": 2})
    second = log.step({"a0": ServiceStats(requests=3, scored=9, batches=4)}, {"died": 2, "timeout": 1})
    assert (second["reward/service_scored"], second["reward/service_batch_queries_mean"]) == (6, 2)
    failed = {cause: second[f"reward/service_failed_{cause}"] for cause in FAILURE_CAUSES}
    assert failed == {"timeout": 1, "died": 0, "error": 0, "version": 0}
