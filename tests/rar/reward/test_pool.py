"""The reward service over Ray: its scores, what clients share, and how it recovers from failures."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import ray
import requests
from ray.exceptions import ActorDiedError

from afmrl_ray.errors import CatalogueError
from afmrl_ray.rar.reward import client as client_module
from afmrl_ray.rar.reward.actor import restarted
from afmrl_ray.rar.reward.client import RewardClient, RewardPool
from afmrl_ray.rar.reward.metrics import PHASES, ServiceLog, ServiceStats, sum_stats
from afmrl_ray.rar.reward.spec import METRICS, Scores
from tests.rar.conftest import reward_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]
KIND = "recall"


@pytest.fixture(scope="module")
def pool(reward) -> Iterator[RewardPool]:
    """Two actors over the whole gallery."""
    made = RewardPool(reward.spec, reward_config(batch_wait_ms=0), name="test-whole")
    made.wait_until_ready()
    yield made
    made.close()


@pytest.fixture(scope="module")
def batching(reward) -> Iterator[RewardPool]:
    """One actor that takes two requests at once, and waits long for the second."""
    one = {"num_workers": 1, "cpus_per_worker": 0.5, "batch_size": 1}
    made = RewardPool(reward.spec, reward_config(pool=one, batch_wait_ms=400, max_in_flight=2), name="test-batching")
    made.wait_until_ready()
    yield made
    made.close()


def pids(pool: RewardPool) -> list[int]:
    return ray.get([actor.pid.remote() for actor in pool._actors])


def queries_of(reward, mark: str, items: int = 5) -> list[tuple[int, str]]:
    """Queries that no other test uses."""
    return [(int(row), text) for row in reward.rows[:items] for text in (mark, f"color: red; {mark}")]


def counted(pool: RewardClient) -> ServiceStats:
    return sum_stats(pool.stats().values())


def test_scores_equal_a_full_sort_also_after_an_actor_was_killed(reward, pool):
    queries, others = queries_of(reward, "a: first"), queries_of(reward, "a: second")
    expected = reward.by_hand(queries, 4)
    scores = pool.submit("train", queries).result()
    for name in METRICS:
        np.testing.assert_allclose(scores.metrics[name], expected[name], rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(scores.rewards, scores.metrics[KIND])
    assert len(set(expected[KIND])) > 1
    os.kill(pids(pool)[0], signal.SIGKILL)
    np.testing.assert_allclose(pool.score("train", others), reward.by_hand(others, 4)[KIND])
    assert pool.failures.keys() == {"died"}
    assert asyncio.run(restarted(pool._actors[0], 60))


class DiesAtFirst:
    """A reward actor that dies at its first call; the file of its name records that it did."""

    def __init__(self, _spec, _config, names, *_) -> None:
        self._mark = names[0]

    @ray.method(concurrency_group="about")
    async def pid(self) -> int:
        if not os.path.exists(self._mark):
            with open(self._mark, "w"):
                os._exit(1)
        return os.getpid()


class FailsToStart:
    def __init__(self, *_) -> None:
        raise CatalogueError("no such gallery")

    @ray.method(concurrency_group="about")
    async def pid(self) -> int:
        return os.getpid()


@contextmanager
def pool_of(stand_in: type, name: str, spec, monkeypatch) -> Iterator[RewardPool]:
    monkeypatch.setattr(client_module, "RewardActor", stand_in)
    one = {"num_workers": 1, "cpus_per_worker": 0.1}
    pool = RewardPool(spec, reward_config(pool=one, start_timeout_s=100), name=name)
    yield pool
    pool.close()


def test_an_actor_that_dies_before_its_first_answer_is_waited_for(reward, tmp_path, monkeypatch):
    with pool_of(DiesAtFirst, str(tmp_path / "test"), reward.spec, monkeypatch) as pool:
        pool.wait_until_ready()
    assert (tmp_path / "test-reward-0").exists()


def test_an_actor_whose_constructor_raises_fails_the_start_with_its_error(reward, monkeypatch):
    with pool_of(FailsToStart, "test-fails", reward.spec, monkeypatch) as pool:
        with pytest.raises(ActorDiedError, match="no such gallery"):
            pool.wait_until_ready()


def test_sharded_galleries_give_the_same_scores_also_after_an_actor_was_killed(reward, pool):
    queries = queries_of(reward, "a: part", 8)
    whole = pool.submit("train", queries).result()
    config = reward_config(batch_wait_ms=0, cached_scores=0, gallery_placement="sharded")
    sharded = RewardPool(reward.gallery(2), config, name="test-sharded")
    sharded.wait_until_ready()
    for killed in (False, True):
        if killed:
            os.kill(pids(sharded)[1], signal.SIGKILL)
        parts = sharded.submit("train", queries).result()
        for name in METRICS:
            # Counts are exact, sums of exponentials are those of other groups of items.
            rtol = 1e-13 if name == "log_softmax" else 0
            np.testing.assert_allclose(parts.metrics[name], whole.metrics[name], rtol=rtol, err_msg=name)
    sharded.close()


def test_equal_queries_of_all_clients_are_scored_once(reward, pool):
    query, other = (int(reward.rows[0]), "a: once"), (int(reward.rows[1]), "a: once")
    before = counted(pool)
    scores = pool.score("train", [query, other, query, query])
    assert scores[0] == scores[2] == scores[3]
    after = counted(pool)
    assert (after.scored - before.scored, after.queries - before.queries) == (2, 2)
    score = ray.remote(num_cpus=0.1)(lambda client, queries: client.score("train", queries))
    np.testing.assert_array_equal(ray.get(score.remote(pool.client(), [other, query])), [scores[1], scores[0]])
    again = counted(pool)
    assert (again.scored, again.cache_hits) == (after.scored, after.cache_hits + 2)


def test_requests_of_several_clients_are_encoded_together(reward, batching):
    clients = [batching.client() for _ in range(2)]
    row = int(reward.rows[0])
    queries = [(row, "size: 0"), (row, "size: 1")]
    found: dict[int, float] = {}

    def score(index: int) -> None:
        found[index] = float(clients[index].score("train", [queries[index]])[0])

    before = counted(batching)
    threads = [threading.Thread(target=score, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = counted(batching)
    assert (stats.requests - before.requests, stats.batches - before.batches) == (2, 1)
    assert (stats.batch_requests_max, stats.batch_queries_max) == (2, 2)
    np.testing.assert_allclose([found[0], found[1]], reward.by_hand(queries, 4)[KIND])
    for client in clients:
        client.close()


def test_an_actor_has_at_most_max_in_flight_requests(reward, batching):
    other = batching.client()
    queries = queries_of(reward, "a: flight", 4)
    pending = [client.submit("train", queries) for client in (batching, other)]
    (first, second) = (each.result() for each in pending)
    np.testing.assert_allclose(first.rewards, reward.by_hand(queries, 4)[KIND])
    np.testing.assert_array_equal(first.rewards, second.rewards)
    stats = counted(batching)
    assert (stats.in_flight, stats.in_flight_max) == (0, 2)
    other.close()


def test_requests_of_a_hung_actor_time_out_and_go_to_others(reward, pool):
    client = RewardClient(pool.names, "v1", reward_config(timeout_s=4))
    queries, others = queries_of(reward, "a: hung"), queries_of(reward, "a: still")
    expected = [reward.by_hand(own, 4)[KIND] for own in (queries, others)]
    hung = pids(pool)[0]
    os.kill(hung, signal.SIGSTOP)
    try:
        np.testing.assert_allclose(client.score("train", queries), expected[0])
        failures = client.failures.copy()
        assert failures["timeout"] == failures.total() >= 1
        np.testing.assert_allclose(client.score("train", others), expected[1])
        assert client.failures == failures, "the hung actor was called again at once"
    finally:
        os.kill(hung, signal.SIGCONT)
    client.close()


def test_scores_can_be_polled_and_awaited(reward, pool):
    pending = pool.submit("train", queries_of(reward, "a: wait", 2))

    async def wait() -> Scores:
        return await asyncio.wrap_future(pending)

    np.testing.assert_array_equal(asyncio.run(wait()).rewards, pending.result().rewards)
    assert pending.done()
    assert len(pool.score("train", [])) == 0


def test_the_log_has_what_each_step_added(reward, pool):
    log, queries = ServiceLog(), queries_of(reward, "a: log", 3)
    log.step(pool.stats(), pool.failures)
    first = [pool.score("train", queries), log.step(pool.stats(), pool.failures)][1]
    second = [pool.score("train", queries), log.step(pool.stats(), pool.failures)][1]
    assert first["reward/service_scored"] == second["reward/service_cache_hits"] == len(queries)
    assert first["reward/service_cache_hits"] == second["reward/service_scored"] == 0
    assert all(first[f"reward/service_seconds_{phase}"] > 0 for phase in PHASES)
    assert first["reward/service_batch_queries_mean"] == len(queries) / first["reward/service_batches"]
    assert sum(value for name, value in first.items() if "failed" in name) == 0


def test_prometheus_gets_the_counts_of_every_actor(pool):
    pool.stats()
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    wanted = [f'actor="{name}"' for name in pool.names]
    deadline = time.monotonic() + 60  # Ray exports every ten seconds
    lines: list[str] = []
    while time.monotonic() < deadline and not all(any(actor in line for line in lines) for actor in wanted):
        time.sleep(0.5)
        text = requests.get(url, timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith("ray_afmrl_reward_queries_total{")]
    for actor in wanted:
        # A process that was killed before has lines of its own.
        counts = [float(line.rsplit(maxsplit=1)[1]) for line in lines if actor in line and 'gallery="train"' in line]
        assert sum(counts) > 0
