"""The client against actors that fail on purpose, and the actor's class in this process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import ray

from afmrl_ray.errors import CatalogueError, GalleryVersionError, RewardServiceError
from afmrl_ray.rar.reward.actor import RewardActor
from afmrl_ray.rar.reward.client import RewardClient
from afmrl_ray.rar.reward.metrics import ServiceStats
from afmrl_ray.rar.reward.spec import METRICS, Reply, num_parts
from tests.rar.conftest import reward_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


class Broken:
    """A reward actor that raises MemoryError, raises CatalogueError or dies, by the text of a query."""

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
        return Reply(self._version, np.ones((len(queries), len(METRICS))))

    def positives(self, gallery, queries):
        return self._version, None

    def pid(self):
        return os.getpid()


@pytest.fixture(scope="module")
def broken(ray_local) -> Iterator[dict[str, list[str]]]:
    """Names of such actors, by the version of their gallery."""
    made = {"v1": ["broken-v1-0", "broken-v1-1"], "v2": ["broken-v2-0"]}
    actor = ray.remote(num_cpus=0.1, max_restarts=-1)(Broken)
    actors = [actor.options(name=name).remote(version) for version, names in made.items() for name in names]
    # Clients wait for answers, not for the start of a process.
    ray.get([each.pid.remote() for each in actors])
    yield made
    for each in actors:
        ray.kill(each)


@contextmanager
def client_of(names: list[str], version: str = "v1", **changes) -> Iterator[RewardClient]:
    client = RewardClient(names, version, reward_config(**changes))
    yield client
    client.close()


def test_too_many_failures_raise_and_a_catalogue_error_is_not_retried(broken):
    with client_of(broken["v1"], max_retries=1) as client:
        with pytest.raises(RewardServiceError, match=r"1 of 2 rewards failed after 1 retries .*2 error"):
            client.score("train", [(0, "large"), (1, "")])
        with pytest.raises(CatalogueError, match="no positive"):
            client.score("train", [(1, "wrong")])
        assert client.failures == {"error": 2}


def test_a_reply_about_another_gallery_version_is_refused(broken):
    with client_of([broken["v2"][0], broken["v1"][0]]) as client:
        np.testing.assert_array_equal(client.score("train", [(0, ""), (1, "")]), [1, 1])
        assert client.failures == {"version": 1}
    with client_of(broken["v1"], "v3", max_retries=1) as client:
        with pytest.raises(RewardServiceError, match=r"1 of 1 rewards failed .*2 version"):
            client.score("train", [(0, "")])


def test_failed_rewards_are_nan_and_counted_by_cause(broken):
    queries = [(place, {4: "large", 7: "deadly"}.get(place, "")) for place in range(12)]
    with client_of(broken["v1"], max_retries=0, max_failed_fraction=0.9) as client:
        found = client.score("train", queries)
        assert np.isnan(found[[4, 7]]).all()
        assert (found[[6, 8, 10]] == 1).all()
        assert client.failures["error"] == 1
        assert client.failures["died"] >= 1
    # Without another actor, the client waits for the restart.
    with client_of(broken["v1"][1:], max_retries=1) as client:
        np.testing.assert_array_equal(client.score("train", [(0, ""), (1, "")]), [1, 1])


def actor_here(reward, names: list[str], **changes) -> RewardActor:
    """An instance of the actor's class in this process."""
    config = reward_config(**changes)
    return RewardActor(reward.gallery(num_parts(config)), config, names, 0, 1)


def test_a_shard_of_another_gallery_version_is_refused(reward, broken):
    actor = actor_here(reward, ["here", broken["v2"][0]], gallery_placement="sharded")
    with pytest.raises(GalleryVersionError, match="broken-v2-0 searched gallery v2, not v1"):
        asyncio.run(actor.score("train", [(int(reward.rows[0]), "")]))


def test_an_actor_answers_stats_while_it_computes(reward, monkeypatch):
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
