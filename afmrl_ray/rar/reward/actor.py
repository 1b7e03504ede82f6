"""The Ray actor of the reward service: batches requests, runs the scorer, adds up the comparisons of all shards."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, RayActorError

from afmrl_ray.concurrency import DynamicBatcher, SingleFlightCache
from afmrl_ray.config.rar import RewardConfig
from afmrl_ray.errors import GalleryVersionError, RewardServiceError
from afmrl_ray.rar.reward.metrics import Meter, ServiceStats
from afmrl_ray.rar.reward.scoring import EncodedQueries, PreparedQueries, Scorer
from afmrl_ray.rar.reward.spec import Query, Reply, RewardSpec
from afmrl_ray.retrieval.shards import Comparison, Positives, merged

_PAUSE_S = 0.25


@dataclass(frozen=True)
class _Queued:
    prepared: PreparedQueries
    since: float


class RewardActor:
    """Scores requests of many clients.

    Requests, calls from other shards and questions about the actor are concurrency groups of their own, and computing
    happens on a thread, so that the actor answers while a batch runs.

    Args:
        spec: encoder and galleries.
        config: `rar.reward`.
        names: names of all actors of the pool; when galleries are sharded, the i-th holds part i.
        index: index of this actor.
        threads: number of torch threads.
    """

    def __init__(self, spec: RewardSpec, config: RewardConfig, names: Sequence[str], index: int, threads: int) -> None:
        self._spec, self._config = spec, config
        sharded = config.gallery_placement == "sharded"
        self._others = [name for name in names if name != names[index]] if sharded else []
        self._scorer = Scorer(spec, config, part=index if sharded else 0, threads=threads)
        self._meter = Meter(names[index])
        # Images are read on one core, so that the batch that runs at the same time keeps the others.
        self._compute, self._prepare = (
            ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(own,))
            for name, own in (("compute", threads), ("prepare", 1))
        )
        self._queue: DynamicBatcher[_Queued, dict[Query, np.ndarray]] = DynamicBatcher(
            self._run,
            cost=lambda queued: queued.prepared.tokens,
            budget=config.tokens_per_batch,
            wait_s=config.batch_wait_ms / 1000,
        )
        self._caches = {name: self._cache(name) for name in spec.galleries}

    @ray.method(concurrency_group="score")
    async def score(self, gallery: str, queries: Sequence[Query]) -> Reply:
        """Metrics of queries, in their order.

        Raises:
            CatalogueError: a query has no positive in the gallery.
            TimeoutError, RewardServiceError, GalleryVersionError: the actor of another shard, which is named, missed
                its deadline, is gone, or holds another gallery version.
        """
        with self._meter.request(gallery, len(queries)):
            self._scorer.check(gallery, queries)
            answers = await self._caches[gallery].get(queries)
            self._meter.reused(gallery, cached=answers.kept, joined=answers.joined)
        return Reply(self._spec.version, np.stack([answers.found[query] for query in queries]))

    @ray.method(concurrency_group="count")
    async def positives(self, gallery: str, queries: tuple[np.ndarray, np.ndarray]) -> tuple[str, Positives]:
        """Gallery version, and similarities of the positives in this actor's shard.

        Args:
            gallery: name of the gallery.
            queries: catalogue rows [Q] and embeddings [Q, D].
        """
        return self._spec.version, await self._on(self._compute, self._scorer.positives, gallery, *queries)

    @ray.method(concurrency_group="count")
    async def compare(
        self, gallery: str, queries: tuple[np.ndarray, np.ndarray], positives: Positives
    ) -> tuple[str, Comparison]:
        """Gallery version, and how the items of this actor's shard compare with the positives."""
        return self._spec.version, await self._on(self._compute, self._scorer.compare, gallery, *queries, positives)

    @ray.method(concurrency_group="about")
    async def stats(self) -> ServiceStats:
        """Counts since the actor started."""
        return replace(self._meter.stats, queue_depth=self._queue.depth)

    @ray.method(concurrency_group="about")
    async def pid(self) -> int:
        """Process id; an answer means that the actor is alive."""
        return os.getpid()

    def _cache(self, gallery: str) -> SingleFlightCache[Query, np.ndarray]:
        async def compute(queries: list[Query]) -> dict[Query, np.ndarray]:
            with self._meter.timed("prepare", gallery):
                prepared = await self._on(self._prepare, self._scorer.prepare, gallery, queries)
            self._meter.queued(self._queue.depth + 1)
            return await self._queue.submit(_Queued(prepared, time.perf_counter()))

        return SingleFlightCache(compute, size=self._config.cached_scores)

    async def _run(self, batch: list[_Queued]) -> list[dict[Query, np.ndarray]]:
        """Score a batch of requests together."""
        now = time.perf_counter()
        tokens: dict[str, int] = {}
        for queued in batch:
            gallery = queued.prepared.gallery
            self._meter.add_seconds("wait", gallery, now - queued.since)
            tokens[gallery] = tokens.get(gallery, 0) + queued.prepared.tokens
        self._meter.queued(self._queue.depth)
        with self._meter.timed("encode", batch[0].prepared.gallery):
            encoded = await self._on(self._compute, self._scorer.encode, [queued.prepared for queued in batch])
        self._meter.batch(len(batch), {each.gallery: len(each.queries) for each in encoded}, tokens)
        found: dict[tuple[str, Query], np.ndarray] = {}
        for each in encoded:
            with self._meter.timed("rank", each.gallery):
                metrics = await self._rank(each)
            found.update(zip(((each.gallery, query) for query in each.queries), metrics, strict=True))
        return [{query: found[queued.prepared.gallery, query] for query in queued.prepared.inputs} for queued in batch]

    async def _rank(self, encoded: EncodedQueries) -> np.ndarray:
        if not self._others:
            return await self._on(self._compute, self._scorer.rank, encoded)
        gallery, queries = encoded.gallery, (encoded.rows, encoded.embeddings)
        sent = ray.put(queries)
        positives = merged(
            await asyncio.gather(
                self._on(self._compute, self._scorer.positives, gallery, *queries),
                *(self._call(name, "positives", gallery, sent) for name in self._others),
            )
        )
        comparisons = await asyncio.gather(
            self._on(self._compute, self._scorer.compare, gallery, *queries, positives),
            *(self._call(name, "compare", gallery, sent, positives) for name in self._others),
        )
        return self._scorer.metrics(encoded.rows, positives, comparisons)

    async def _call(self, name: str, method: str, *arguments: Any) -> Any:
        """Call the actor of another shard; one that Ray restarts is waited for."""
        actor, timeout_s = ray.get_actor(name), self._config.timeout_s
        try:
            version, found = await asyncio.wait_for(getattr(actor, method).remote(*arguments), timeout_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"reward actor {name} did not count within rar.reward.timeout_s {timeout_s:g} s"
            ) from error
        except RayActorError as error:
            if not await restarted(actor, timeout_s):
                raise RewardServiceError(f"reward actor {name}, which holds a part of the gallery, is gone") from error
            return await self._call(name, method, *arguments)
        if version != self._spec.version:
            raise GalleryVersionError(f"reward actor {name} searched gallery {version}, not {self._spec.version}")
        return found

    @staticmethod
    async def _on(executor: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(executor, work, *arguments)


async def alive(actor: Any, timeout_s: float) -> bool:
    """Whether an actor answers within `timeout_s` seconds, however often Ray restarts it meanwhile.

    Calls to an actor that Ray is restarting fail at once instead of waiting, so this asks until it answers.

    Args:
        actor: handle of a `RewardActor`.
        timeout_s: longest wait.

    Raises:
        ActorDiedError: Ray will not restart it, for example because its constructor raised.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = asyncio.wrap_future(actor.pid.remote().future())
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait([answer], timeout=deadline - time.monotonic())
        if not answer.done():
            return False
        error = answer.exception()
        if isinstance(error, ActorDiedError):
            raise error
        if not isinstance(error, RayActorError):
            return error is None
        if time.monotonic() + _PAUSE_S > deadline:
            return False
        await asyncio.sleep(_PAUSE_S)


async def restarted(actor: Any, timeout_s: float) -> bool:
    """As `alive`, but False at once for an actor that Ray will not restart."""
    try:
        return await alive(actor, timeout_s)
    except ActorDiedError:
        return False
