"""The client of the reward service, and the pool that owns the actors.

A failure of the infrastructure gives NaN, never a bad reward; an error of the catalogue is raised.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter as Counts
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError
from ray.util.metrics import Counter

from afmrl_ray.concurrency import BackgroundLoop
from afmrl_ray.config.rar import RewardConfig
from afmrl_ray.errors import GalleryVersionError, RewardServiceError, UserError
from afmrl_ray.models.threads import torch_threads
from afmrl_ray.rar.reward.actor import RewardActor, alive, restarted
from afmrl_ray.rar.reward.batching import Request, split_requests
from afmrl_ray.rar.reward.metrics import ServiceStats
from afmrl_ray.rar.reward.spec import METRICS, Query, Reply, RewardSpec, Scores
from afmrl_ray.training.placement import ActorPlacement

log = logging.getLogger(__name__)

_MAX_BACKOFF_S = 10.0
_STATS_TIMEOUT_S = 5.0


class RewardClient:
    """Sends queries to named reward actors. Any process of the Ray job may hold one, and it can be pickled.

    Args:
        actors: names of the actors.
        version: version of the galleries; replies about another one are refused.
        config: `rar.reward`.
    """

    def __init__(self, actors: Sequence[str], version: str, config: RewardConfig) -> None:
        self.names, self._version, self._config = list(actors), version, config
        self._actors = [ray.get_actor(name) for name in self.names]
        self._slots = [asyncio.Semaphore(config.max_in_flight) for _ in self.names]
        self._loop = BackgroundLoop("reward-client")
        self._suspect_until: dict[int, float] = {}
        self._restarting: dict[int, asyncio.Task[None]] = {}
        self.failures: Counts[str] = Counts()
        """Failed requests by cause, see `metrics.FAILURE_CAUSES`."""
        self._failed = Counter("afmrl_reward_failures", "Failed requests by cause.", ("actor", "gallery", "cause"))

    def __reduce__(self) -> tuple[type[RewardClient], tuple[list[str], str, RewardConfig]]:
        return RewardClient, (self.names, self._version, self._config)

    def submit(self, gallery: str, queries: Sequence[Query]) -> Future[Scores]:
        """Start to score queries; equal ones are scored once.

        The result raises CatalogueError if a query has no positive in the gallery. Deadlines and retries end it in any
        case. In an event loop, await `asyncio.wrap_future` of it.
        """
        return self._loop.start(self._score(gallery, list(queries)))

    def score(self, gallery: str, queries: Sequence[Query]) -> np.ndarray:
        """[len(queries)] rewards, NaN where the service failed; raises what `submit` and `check` do."""
        rewards = self.submit(gallery, queries).result().rewards
        self.check(rewards)
        return rewards

    def check(self, rewards: np.ndarray) -> None:
        """Make sure that enough queries were scored.

        Args:
            rewards: rewards that count together, such as those of a step, NaN where the service failed.

        Raises:
            RewardServiceError: more than `rar.reward.max_failed_fraction` of them failed.
        """
        lost = int(np.isnan(rewards).sum())
        if lost > self._config.max_failed_fraction * rewards.size:
            causes = ", ".join(f"{count} {cause}" for cause, count in self.failures.items())
            raise RewardServiceError(
                f"{lost} of {rewards.size} rewards failed after {self._config.max_retries} retries (failed requests so "
                f"far: {causes}), more than rar.reward.max_failed_fraction {self._config.max_failed_fraction:g} "
                "allows; look at the reward actors' logs"
            )

    def stats(self) -> dict[str, ServiceStats]:
        """Counts of every actor that answers within a few seconds, by name."""
        calls = {actor.stats.remote(): name for actor, name in zip(self._actors, self.names, strict=True)}
        answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_STATS_TIMEOUT_S)
        found = {}
        for call in answered:
            try:
                found[calls[call]] = ray.get(call)
            except RayActorError:
                log.warning("no stats of %s: it is restarting", calls[call])
        return found

    def close(self) -> None:
        """Cancel the requests in progress."""
        self._loop.close()

    async def _score(self, gallery: str, queries: list[Query]) -> Scores:
        size = self._config.pool.batch_size
        requests = split_requests(queries, num_actors=len(self.names), max_queries=size)
        answers = await asyncio.gather(*(self._request(gallery, request) for request in requests))
        found = {query: values for answer in answers for query, values in answer.items()}
        failed = np.full(len(METRICS), math.nan)
        columns = np.array([found.get(query, failed) for query in queries]).reshape(-1, len(METRICS)).T
        metrics = dict(zip(METRICS, columns, strict=True))
        return Scores(metrics[self._config.kind], metrics)

    async def _request(self, gallery: str, request: Request) -> dict[Query, np.ndarray]:
        """Metrics by query; empty if all attempts failed."""
        for attempt in range(self._config.max_retries + 1):
            if attempt:
                pause = min(self._config.backoff_s * 2 ** (attempt - 1), _MAX_BACKOFF_S)
                # Jitter, so that clients that failed together do not retry together.
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            async with self._slot(request.actor + attempt) as actor:
                answer = await self._call(actor, gallery, request.queries)
            if isinstance(answer, Reply):
                self._suspect_until.pop(actor, None)
                return dict(zip(request.queries, answer.metrics, strict=True))
            log.warning("reward actor %s failed (%s), attempt %d", self.names[actor], answer, attempt + 1)
            self._note_failure(actor, gallery, answer)
        return {}

    def _note_failure(self, actor: int, gallery: str, cause: str) -> None:
        self.failures[cause] += 1
        self._failed.inc(tags={"actor": self.names[actor], "gallery": gallery, "cause": cause})
        # For the length of a deadline the other actors are preferred.
        self._suspect_until[actor] = time.monotonic() + self._config.timeout_s
        if cause == "died" and actor not in self._restarting:
            self._restarting[actor] = asyncio.get_running_loop().create_task(self._wait_for_restart(actor))

    async def _wait_for_restart(self, actor: int) -> None:
        if await restarted(self._actors[actor], self._config.start_timeout_s):
            self._suspect_until.pop(actor, None)
        del self._restarting[actor]

    @asynccontextmanager
    async def _slot(self, preferred: int) -> AsyncIterator[int]:
        """An actor with less than `max_in_flight` of our requests: the preferred one, or the next that did not fail."""
        while True:
            actor = self._choose(preferred)
            if actor in self._restarting:  # every actor has failed
                await asyncio.wait(self._restarting.values(), return_when=asyncio.FIRST_COMPLETED)
                actor = self._choose(preferred)
            async with self._slots[actor]:
                if self._choose(preferred) == actor:
                    yield actor
                    return

    def _choose(self, preferred: int) -> int:
        order = [(preferred + step) % len(self.names) for step in range(len(self.names))]
        now = time.monotonic()
        return next((actor for actor in order if self._suspect_until.get(actor, now) <= now), order[0])

    async def _call(self, actor: int, gallery: str, queries: list[Query]) -> Reply | str:
        """The actor's reply, or the cause of the failure."""
        call = self._actors[actor].score.remote(gallery, queries)
        answer = asyncio.wrap_future(call.future())
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait([answer], timeout=self._config.timeout_s)
        if not answer.done():
            ray.cancel(call, recursive=False)
            return "timeout"
        try:
            reply: Reply = answer.result()
        except RayError as error:
            if isinstance(error, UserError):
                raise  # a retry would fail alike
            log.warning("%s: %s", self.names[actor], str(error).strip().splitlines()[-1])
            return _cause(error)
        return reply if reply.version == self._version else "version"


def _cause(error: RayError) -> str:
    if isinstance(error, RayActorError):
        return "died"
    if isinstance(error, TimeoutError):
        return "timeout"
    return "version" if isinstance(error, GalleryVersionError) else "error"


class RewardPool(RewardClient):
    """Reward actors, which Ray restarts, and a client of them; `close` ends both.

    Args:
        spec: encoder and galleries.
        config: `rar.reward`.
        name: prefix of the actors' names.
    """

    def __init__(self, spec: RewardSpec, config: RewardConfig, *, name: str) -> None:
        pool = config.pool
        self._placement = ActorPlacement("rar.reward.pool", pool)
        actor_class = ray.remote(
            max_restarts=-1,
            max_task_retries=0,
            concurrency_groups={"score": config.max_in_flight, "count": 2 * pool.num_workers, "about": 2},
        )(RewardActor)
        names = [f"{name}-reward-{index}" for index in range(pool.num_workers)]
        threads = torch_threads(pool.cpus_per_worker)
        self._owned = [
            actor_class.options(name=names[index], **self._placement.options(index)).remote(
                spec, config, names, index, threads
            )
            for index in range(len(names))
        ]
        # Restarted actors need the galleries, and the object store drops what has no reference.
        self._spec = spec
        super().__init__(names, spec.version, config)

    def wait_until_ready(self) -> None:
        """Wait until every actor has loaded its encoder, so that no request's deadline includes that time.

        Raises:
            RewardServiceError: the named actors did not start within `rar.reward.start_timeout_s`.
            ActorDiedError: the constructor of an actor raised.
        """
        started = self._loop.start(self._alive()).result()
        late = [name for name, answers in zip(self.names, started, strict=True) if not answers]
        if late:
            raise RewardServiceError(
                f"{', '.join(late)} did not start within rar.reward.start_timeout_s "
                f"{self._config.start_timeout_s:g} s; raise it, or look at what else holds the cluster's CPUs and GPUs"
            )

    async def _alive(self) -> list[bool]:
        return await asyncio.gather(*(alive(actor, self._config.start_timeout_s) for actor in self._owned))

    def client(self) -> RewardClient:
        """A client for another process."""
        return RewardClient(self.names, self._version, self._config)

    def close(self) -> None:
        super().close()
        for actor in self._owned:
            ray.kill(actor)
        self._placement.close()
