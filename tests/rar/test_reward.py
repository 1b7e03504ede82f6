"""The service behind Ray: what it gives, what it shares, and what is left when something dies."""

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

from afmrl_ray.errors import CatalogueError, GalleryVersionError, RewardServiceError
from afmrl_ray.rar.liveness import wait_for_return
from afmrl_ray.rar.reward import RewardClient, RewardPool
from afmrl_ray.rar.reward_actor import RewardActor
from afmrl_ray.rar.reward_log import ServiceLog
from afmrl_ray.rar.reward_meter import PARTS, ServiceStats, summed
from afmrl_ray.rar.reward_spec import KINDS, Reply, Scores
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
def coalescing(reward) -> Iterator[RewardPool]:
    """One actor that works on two requests at once, and waits long for the second."""
    one = {"num_workers": 1, "cpus_per_worker": 0.5, "batch_size": 1}
    made = RewardPool(reward.spec, reward_config(pool=one, batch_wait_ms=400, max_in_flight=2), name="test-coalescing")
    made.wait_until_ready()
    yield made
    made.close()


def pids(pool: RewardPool) -> list[int]:
    return ray.get([actor.pid.remote() for actor in pool._actors])


def queries_of(reward, mark: str, items: int = 5) -> list[tuple[int, str]]:
    """Queries that no other test asks."""
    return [(int(row), text) for row in reward.rows[:items] for text in (mark, f"color: red; {mark}")]


def counted(pool: RewardClient) -> ServiceStats:
    return summed(pool.stats().values())


def test_scores_are_those_of_a_full_sort_also_after_an_actor_was_killed(reward, pool):
    queries, others = queries_of(reward, "a: first"), queries_of(reward, "a: second")
    expected = reward.by_hand(queries, 4)
    scores = pool.submit("train", queries).result()
    for kind in KINDS:
        np.testing.assert_allclose(scores.measures[kind], expected[kind], err_msg=kind)
    np.testing.assert_array_equal(scores.rewards, scores.measures[KIND])
    assert len(set(expected[KIND])) > 1
    os.kill(pids(pool)[0], signal.SIGKILL)
    np.testing.assert_allclose(pool.score("train", others), reward.by_hand(others, 4)[KIND])
    assert pool.failures.keys() == {"died"}
    assert asyncio.run(wait_for_return(pool._actors[0], 60))


class DiesAtFirst:
    """Stands in for a reward actor that is killed when first asked; its name is the file that remembers it."""

    def __init__(self, _spec, _config, names, *_) -> None:
        self._mark = names[0]

    @ray.method(concurrency_group="about")
    async def pid(self) -> int:
        if not os.path.exists(self._mark):
            with open(self._mark, "w"):
                os._exit(1)
        return os.getpid()


class FailsToBegin:
    def __init__(self, *_) -> None:
        raise CatalogueError("no such gallery")

    @ray.method(concurrency_group="about")
    async def pid(self) -> int:
        return os.getpid()


@contextmanager
def pool_of(stand_in: type, name: str, spec, monkeypatch) -> Iterator[RewardPool]:
    monkeypatch.setattr("afmrl_ray.rar.reward.RewardActor", stand_in)
    one = {"num_workers": 1, "cpus_per_worker": 0.1}
    pool = RewardPool(spec, reward_config(pool=one, start_timeout_s=100), name=name)
    yield pool
    pool.close()


def test_an_actor_that_is_killed_before_it_answers_is_waited_for(reward, tmp_path, monkeypatch):
    with pool_of(DiesAtFirst, str(tmp_path / "test"), reward.spec, monkeypatch) as pool:
        pool.wait_until_ready()
    assert (tmp_path / "test-reward-0").exists()


def test_an_actor_that_fails_to_begin_tells_why_at_once(reward, monkeypatch):
    with pool_of(FailsToBegin, "test-fails", reward.spec, monkeypatch) as pool:
        with pytest.raises(ActorDiedError, match="no such gallery"):
            pool.wait_until_ready()


def test_sharded_galleries_give_exactly_the_same_also_after_an_actor_was_killed(reward, pool):
    queries = queries_of(reward, "a: part", 8)
    whole = pool.submit("train", queries).result()
    config = reward_config(batch_wait_ms=0, cached_scores=0, gallery_placement="sharded")
    sharded = RewardPool(reward.gallery(2), config, name="test-sharded")
    sharded.wait_until_ready()
    for killed in (False, True):
        if killed:
            os.kill(pids(sharded)[1], signal.SIGKILL)
        parts = sharded.submit("train", queries).result()
        for kind in KINDS:
            np.testing.assert_array_equal(parts.measures[kind], whole.measures[kind], err_msg=kind)
    sharded.close()


def test_equal_queries_are_scored_once_whoever_asks(reward, pool):
    query, other = (int(reward.rows[0]), "a: once"), (int(reward.rows[1]), "a: once")
    before = counted(pool)
    scores = pool.score("train", [query, other, query, query])
    assert scores[0] == scores[2] == scores[3]
    after = counted(pool)
    assert (after.scored - before.scored, after.queries - before.queries) == (2, 2)
    ask = ray.remote(num_cpus=0.1)(lambda client, queries: client.score("train", queries))
    np.testing.assert_array_equal(ray.get(ask.remote(pool.client(), [other, query])), [scores[1], scores[0]])
    again = counted(pool)
    assert (again.scored, again.cache_hits) == (after.scored, after.cache_hits + 2)


def test_requests_of_several_clients_are_encoded_together(reward, coalescing):
    clients = [coalescing.client() for _ in range(2)]
    row = int(reward.rows[0])
    queries = [(row, "size: 0"), (row, "size: 1")]
    found: dict[int, float] = {}

    def ask(index: int) -> None:
        found[index] = float(clients[index].score("train", [queries[index]])[0])

    before = counted(coalescing)
    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = counted(coalescing)
    assert (stats.requests - before.requests, stats.batches - before.batches) == (2, 1)
    assert (stats.batch_requests_max, stats.batch_queries_max) == (2, 2)
    np.testing.assert_allclose([found[0], found[1]], reward.by_hand(queries, 4)[KIND])
    for client in clients:
        client.close()


def test_an_actor_never_works_on_more_requests_than_it_may(reward, coalescing):
    other = coalescing.client()
    queries = queries_of(reward, "a: flight", 4)
    pending = [client.submit("train", queries) for client in (coalescing, other)]
    (first, second) = (each.result() for each in pending)
    np.testing.assert_allclose(first.rewards, reward.by_hand(queries, 4)[KIND])
    np.testing.assert_array_equal(first.rewards, second.rewards)
    stats = counted(coalescing)
    assert (stats.in_flight, stats.in_flight_max) == (0, 2)
    other.close()


def test_a_hung_actor_costs_its_deadline_and_others_do_its_work(reward, pool):
    client = RewardClient(pool.names, "v1", reward_config(timeout_s=4))
    queries, others = queries_of(reward, "a: hung"), queries_of(reward, "a: still")
    expected = [reward.by_hand(asked, 4)[KIND] for asked in (queries, others)]
    hung = pids(pool)[0]
    os.kill(hung, signal.SIGSTOP)
    try:
        np.testing.assert_allclose(client.score("train", queries), expected[0])
        failures = client.failures.copy()
        assert failures["timeout"] == failures.total() >= 1
        np.testing.assert_allclose(client.score("train", others), expected[1])
        assert client.failures == failures, "the hung actor was asked again at once"
    finally:
        os.kill(hung, signal.SIGCONT)
    client.close()


def test_scores_can_be_polled_and_awaited(reward, pool):
    pending = pool.submit("train", queries_of(reward, "a: wait", 2))

    async def wait() -> Scores:
        return await pending

    np.testing.assert_array_equal(asyncio.run(wait()).rewards, pending.result().rewards)
    assert pending.done()
    assert len(pool.score("train", [])) == 0


def test_the_log_tells_what_each_step_added(reward, pool):
    log, queries = ServiceLog(), queries_of(reward, "a: log", 3)
    log.step(pool)
    first = [pool.score("train", queries), log.step(pool)][1]
    second = [pool.score("train", queries), log.step(pool)][1]
    assert first["reward_service_scored"] == second["reward_service_cache_hits"] == len(queries)
    assert first["reward_service_cache_hits"] == second["reward_service_scored"] == 0
    assert all(first[f"reward_service_seconds_{part}"] > 0 for part in PARTS)
    assert first["reward_service_batch_queries_mean"] == len(queries) / first["reward_service_batches"]
    assert sum(value for name, value in first.items() if "failed" in name) == 0


def test_prometheus_gets_the_counts_of_every_actor(pool):
    pool.stats()
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    wanted = [f'actor="{name}"' for name in pool.names]
    deadline = time.monotonic() + 60  # Ray tells its agent every ten seconds
    lines: list[str] = []
    while time.monotonic() < deadline and not all(any(actor in line for line in lines) for actor in wanted):
        time.sleep(0.5)
        text = requests.get(url, timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith("ray_afmrl_reward_queries_total{")]
    for actor in wanted:
        # An actor that was killed before leaves lines of its own.
        counts = [float(line.rsplit(maxsplit=1)[1]) for line in lines if actor in line and 'gallery="train"' in line]
        assert sum(counts) > 0


class Broken:
    """Runs out of memory on one query, holds a wrong catalogue on another, dies of a third."""

    def __init__(self, version: str) -> None:
        self._version = version

    def score(self, gallery, queries):
        texts = {text for _, text in queries}
        if "large" in texts:
            raise MemoryError("no memory left")
        if "wrong" in texts:
            raise CatalogueError("no positive")
        if "deadly" in texts:
            os._exit(1)
        return Reply(self._version, np.ones((len(queries), len(KINDS))))

    def positives(self, gallery, asked):
        return self._version, None

    def pid(self):
        return os.getpid()


@pytest.fixture(scope="module")
def broken(ray_local) -> Iterator[dict[str, list[str]]]:
    """Names of actors by the version of their gallery."""
    made = {"v1": ["broken-v1-0", "broken-v1-1"], "v2": ["broken-v2-0"]}
    actor = ray.remote(num_cpus=0.1, max_restarts=-1)(Broken)
    actors = [actor.options(name=name).remote(version) for version, names in made.items() for name in names]
    # What a client waits for is an answer, not the start of a process.
    ray.get([each.pid.remote() for each in actors])
    yield made
    for each in actors:
        ray.kill(each)


@contextmanager
def client_of(names: list[str], version: str = "v1", **changes) -> Iterator[RewardClient]:
    client = RewardClient(names, version, reward_config(**changes))
    yield client
    client.close()


def test_too_many_lost_end_the_job_and_the_catalogues_fault_is_told_at_once(broken):
    with client_of(broken["v1"], max_retries=1) as client:
        with pytest.raises(RewardServiceError, match=r"1 of 2 rewards failed after 1 retries .*2 error"):
            client.score("train", [(0, "large"), (1, "")])
        with pytest.raises(CatalogueError, match="no positive"):
            client.score("train", [(1, "wrong")])
        assert client.failures == {"error": 2}


def test_an_answer_about_another_gallery_is_refused(broken):
    with client_of([broken["v2"][0], broken["v1"][0]]) as client:
        np.testing.assert_array_equal(client.score("train", [(0, ""), (1, "")]), [1, 1])
        assert client.failures == {"version": 1}
    with client_of(broken["v1"], "v3", max_retries=1) as client:
        with pytest.raises(RewardServiceError, match=r"1 of 1 rewards failed .*2 version"):
            client.score("train", [(0, "")])


def test_what_the_service_lost_is_nan_and_counted_by_its_cause(broken):
    queries = [(place, {4: "large", 7: "deadly"}.get(place, "")) for place in range(12)]
    with client_of(broken["v1"], max_retries=0, max_failed_fraction=0.9) as client:
        found = client.score("train", queries)
        assert np.isnan(found[[4, 7]]).all()
        assert (found[[6, 8, 10]] == 1).all()
        assert client.failures["error"] == 1
        assert client.failures["died"] >= 1
    # An actor that is started again is waited for where there is no other.
    with client_of(broken["v1"][1:], max_retries=1) as client:
        np.testing.assert_array_equal(client.score("train", [(0, ""), (1, "")]), [1, 1])


def actor_here(reward, names: list[str], **changes) -> RewardActor:
    """The actor's class in this process."""
    config = reward_config(**changes)
    parts = len(names) if config.gallery_placement == "sharded" else 1
    return RewardActor(reward.gallery(parts), config, names, 0, 1)


def test_a_part_of_another_gallery_is_refused(reward, broken):
    actor = actor_here(reward, ["here", broken["v2"][0]], gallery_placement="sharded")
    with pytest.raises(GalleryVersionError, match="broken-v2-0 searched gallery v2, not v1"):
        asyncio.run(actor.score("train", [(int(reward.rows[0]), "")]))


def test_an_actor_tells_its_stats_while_it_computes(reward, monkeypatch):
    actor, computing, go_on = actor_here(reward, ["here"]), threading.Event(), threading.Event()
    encode = actor._scorer.encode

    def slow(batch):
        computing.set()
        assert go_on.wait(30)
        return encode(batch)

    monkeypatch.setattr(actor._scorer, "encode", slow)

    async def main() -> ServiceStats:
        call = asyncio.ensure_future(actor.score("train", [(int(reward.rows[0]), "")]))
        await asyncio.to_thread(computing.wait, 30)
        during = await actor.stats()
        go_on.set()
        await call
        return during

    during = asyncio.run(main())
    assert (during.in_flight, during.scored) == (1, 0)
