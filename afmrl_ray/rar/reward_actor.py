"""The Ray shell of the reward service: requests in, batches through the scorer, counts of all parts added up.

Requests, the parts' counts and questions about the actor have a thread of their own each, and computing has another, so
that the actor answers while a batch runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError

from afmrl_ray.config.train import RewardConfig
from afmrl_ray.errors import GalleryVersionError, RewardServiceError
from afmrl_ray.rar.batching import DynamicBatcher, SingleFlightCache
from afmrl_ray.rar.liveness import wait_for_return
from afmrl_ray.rar.reward_meter import Meter, ServiceStats
from afmrl_ray.rar.reward_spec import Query, Reply, RewardSpec
from afmrl_ray.rar.scorer import EncodedQueries, PreparedQueries, Scorer
from afmrl_ray.retrieval.shards import Positives, merged


@dataclass(frozen=True)
class _Queued:
    prepared: PreparedQueries
    since: float


class RewardActor:
    """Scores requests of many clients.

    Args:
        spec: encoder and galleries.
        config: `rar.reward`.
        names: of all actors of the pool; where galleries are sharded, the i-th holds part i.
        index: of this actor.
        threads: torch's.
    """

    def __init__(self, spec: RewardSpec, config: RewardConfig, names: Sequence[str], index: int, threads: int) -> None:
        self._spec, self._config, self._names = spec, config, list(names)
        sharded = config.gallery_placement == "sharded"
        self._part = index if sharded else 0
        self._others = [name for name in names if name != names[index]] if sharded else []
        self._scorer = Scorer(spec, config, part=self._part, threads=threads)
        self._meter = Meter(names[index])
        # Images are read on one core, so that the batch that runs meanwhile keeps the others.
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
        self._once = {name: self._scored_once(name) for name in spec.galleries}

    @ray.method(concurrency_group="score")
    async def score(self, gallery: str, queries: Sequence[Query]) -> Reply:
        """Measures of queries, in their order.

        Raises:
            CatalogueError: a query has no positive in the gallery.
            TimeoutError, RewardServiceError, GalleryVersionError: another actor did not count in time, is gone, or
                searched another gallery; named.
        """
        with self._meter.request(gallery, len(queries)):
            self._scorer.check(gallery, queries)
            answers = await self._once[gallery].get(queries)
            self._meter.known(gallery, kept=answers.kept, joined=answers.joined)
        return Reply(self._spec.version, np.stack([answers.found[query] for query in queries]))

    @ray.method(concurrency_group="count")
    async def positives(self, gallery: str, asked: tuple[np.ndarray, np.ndarray]) -> tuple[str, Positives]:
        """Gallery version, and scores of the positives in this actor's part.

        Args:
            gallery: name.
            asked: catalogue rows [Q] and embeddings [Q, D] of queries.
        """
        return self._spec.version, await self._on(self._compute, self._scorer.positives, gallery, *asked)

    @ray.method(concurrency_group="count")
    async def count_before(
        self, gallery: str, asked: tuple[np.ndarray, np.ndarray], positives: Positives
    ) -> tuple[str, np.ndarray]:
        """Gallery version, and how many items of this actor's part stand before each positive."""
        return self._spec.version, await self._on(self._compute, self._scorer.count_before, gallery, *asked, positives)

    @ray.method(concurrency_group="about")
    async def stats(self) -> ServiceStats:
        """Counts since the actor began."""
        return replace(self._meter.stats, queue_depth=self._queue.depth)

    @ray.method(concurrency_group="about")
    async def pid(self) -> int:
        """Process id, to see who answers."""
        return os.getpid()

    def _scored_once(self, gallery: str) -> SingleFlightCache[Query, np.ndarray]:
        async def compute(queries: list[Query]) -> dict[Query, np.ndarray]:
            with self._meter.seconds("prepare", gallery):
                prepared = await self._on(self._prepare, self._scorer.prepare, gallery, queries)
            self._meter.queued(self._queue.depth + 1)
            return await self._queue.submit(_Queued(prepared, perf_counter()))

        return SingleFlightCache(compute, size=self._config.cached_scores)

    async def _run(self, batch: list[_Queued]) -> list[dict[Query, np.ndarray]]:
        """Score a batch of requests together."""
        now = perf_counter()
        tokens: dict[str, int] = {}
        for queued in batch:
            gallery = queued.prepared.gallery
            self._meter.spent("wait", gallery, now - queued.since)
            tokens[gallery] = tokens.get(gallery, 0) + queued.prepared.tokens
        self._meter.queued(self._queue.depth)
        with self._meter.seconds("encode", batch[0].prepared.gallery):
            encoded = await self._on(self._compute, self._scorer.encode, [queued.prepared for queued in batch])
        self._meter.batch(len(batch), {each.gallery: len(each.queries) for each in encoded}, tokens)
        found: dict[tuple[str, Query], np.ndarray] = {}
        for each in encoded:
            with self._meter.seconds("rank", each.gallery):
                measures = await self._rank(each)
            found.update(zip(((each.gallery, query) for query in each.queries), measures, strict=True))
        return [{query: found[queued.prepared.gallery, query] for query in queued.prepared.rows} for queued in batch]

    async def _rank(self, encoded: EncodedQueries) -> np.ndarray:
        if not self._others:
            return await self._on(self._compute, self._scorer.rank, encoded)
        asked = encoded.rows, encoded.embeddings
        sent = ray.put(asked)
        positives = merged(
            await asyncio.gather(
                self._on(self._compute, self._scorer.positives, encoded.gallery, *asked),
                *(self._of(name, "positives", encoded.gallery, sent) for name in self._others),
            )
        )
        counts = await asyncio.gather(
            self._on(self._compute, self._scorer.count_before, encoded.gallery, *asked, positives),
            *(self._of(name, "count_before", encoded.gallery, sent, positives) for name in self._others),
        )
        return self._scorer.measure(encoded.rows, positives, counts)

    async def _of(self, name: str, method: str, *arguments: Any) -> Any:
        """What another actor says about its part; one that is started again is waited for."""
        actor, timeout_s = ray.get_actor(name), self._config.timeout_s
        try:
            version, found = await asyncio.wait_for(getattr(actor, method).remote(*arguments), timeout_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"reward actor {name} did not count within rar.reward.timeout_s {timeout_s:g} s"
            ) from error
        except RayActorError as error:
            if not await wait_for_return(actor, timeout_s):
                raise RewardServiceError(f"reward actor {name}, which holds a part of the gallery, is gone") from error
            return await self._of(name, method, *arguments)
        if version != self._spec.version:
            raise GalleryVersionError(f"reward actor {name} searched gallery {version}, not {self._spec.version}")
        return found

    @staticmethod
    async def _on(executor: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(executor, work, *arguments)
