"""Retrieval as a reward: the client of the reward service, and the pool that owns its actors.

What fails for reasons of infrastructure is NaN, not a bad answer; what is the catalogue's fault is an error.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter as Counts
from collections.abc import AsyncIterator, Generator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError
from ray.util.metrics import Counter

from afmrl_ray.config.train import RewardConfig
from afmrl_ray.errors import GalleryVersionError, RewardServiceError, UserError
from afmrl_ray.models.threads import torch_threads
from afmrl_ray.rar.background import BackgroundLoop
from afmrl_ray.rar.liveness import wait_for_answer, wait_for_return
from afmrl_ray.rar.requests import Request, spread
from afmrl_ray.rar.reward_actor import RewardActor
from afmrl_ray.rar.reward_meter import ServiceStats
from afmrl_ray.rar.reward_spec import KINDS, Query, Reply, RewardSpec, Scores
from afmrl_ray.training.placement import ActorPlacement

log = logging.getLogger(__name__)

CAUSES = ("timeout", "died", "error", "version")
"""Why a request failed: its deadline, its actor's end, an error inside the actor, another gallery than asked for."""
_LONGEST_BACKOFF_S = 10.0
_STATS_TIMEOUT_S = 5.0


class Pending:
    """Scores on their way; wait with `result`, poll with `done`, or await it."""

    def __init__(self, future: Future[Scores]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout: float | None = None) -> Scores:
        """Wait for the scores.

        Args:
            timeout: seconds; none = as long as deadlines and retries last.

        Raises:
            CatalogueError: a query has no positive in the gallery.
            TimeoutError: they are not there yet.
        """
        return self._future.result(timeout)

    def __await__(self) -> Generator[Any, None, Scores]:
        return asyncio.wrap_future(self._future).__await__()


class RewardClient:
    """Asks named reward actors; any process of the Ray job may have one, and it can be pickled.

    Args:
        actors: their names.
        version: of the galleries; an answer about another one is refused.
        config: `rar.reward`.
    """

    def __init__(self, actors: Sequence[str], version: str, config: RewardConfig) -> None:
        self.names, self._version, self._config = list(actors), version, config
        self._actors = [ray.get_actor(name) for name in self.names]
        self._slots = [asyncio.Semaphore(config.max_in_flight) for _ in self.names]
        self._loop = BackgroundLoop("reward-client")
        self._suspect_until: dict[int, float] = {}
        self._returning: dict[int, asyncio.Task[None]] = {}
        self.failures: Counts[str] = Counts()
        self._failed = Counter(
            "afmrl_reward_failures", "Requests that failed, by cause.", ("actor", "gallery", "cause")
        )

    def __reduce__(self) -> tuple[type[RewardClient], tuple[list[str], str, RewardConfig]]:
        return RewardClient, (self.names, self._version, self._config)

    def submit(self, gallery: str, queries: Sequence[Query]) -> Pending:
        """Begin to score queries; equal ones are scored once."""
        return Pending(self._loop.start(self._score(gallery, list(queries))))

    def score(self, gallery: str, queries: Sequence[Query]) -> np.ndarray:
        """[len(queries)] rewards, NaN where the service failed; raises what `Pending.result` and `check` do."""
        rewards = self.submit(gallery, queries).result().rewards
        self.check(rewards)
        return rewards

    def check(self, rewards: np.ndarray) -> None:
        """Make sure that enough was scored.

        Args:
            rewards: all that count together, as those of a step, NaN where the service failed.

        Raises:
            RewardServiceError: more than `rar.reward.max_failed_fraction` failed.
        """
        lost = int(np.isnan(rewards).sum())
        if lost > self._config.max_failed_fraction * rewards.size:
            causes = ", ".join(f"{count} {cause}" for cause, count in self.failures.items())
            raise RewardServiceError(
                f"{lost} of {rewards.size} rewards failed after {self._config.max_retries} retries (failed requests so far: "
                f"{causes}), more than rar.reward.max_failed_fraction {self._config.max_failed_fraction:g} allows; "
                "look at the reward actors' logs"
            )

    def stats(self) -> dict[str, ServiceStats]:
        """Counts of every actor that answers within a few seconds."""
        calls = {actor.stats.remote(): name for actor, name in zip(self._actors, self.names, strict=True)}
        answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_STATS_TIMEOUT_S)
        found = {}
        for call in answered:
            try:
                found[calls[call]] = ray.get(call)
            except RayActorError:
                log.warning("%s tells no stats: it is starting again", calls[call])
        return found

    def close(self) -> None:
        """Give up what is on its way."""
        self._loop.close()

    async def _score(self, gallery: str, queries: list[Query]) -> Scores:
        requests = spread(queries, actors=len(self.names), size=self._config.pool.batch_size)
        answers = await asyncio.gather(*(self._ask(gallery, request) for request in requests))
        found = {query: row for answer in answers for query, row in answer.items()}
        unknown = np.full(len(KINDS), math.nan)
        columns = np.array([found.get(query, unknown) for query in queries]).reshape(-1, len(KINDS)).T
        measures = dict(zip(KINDS, columns, strict=True))
        return Scores(measures[self._config.kind], measures)

    async def _ask(self, gallery: str, request: Request) -> dict[Query, np.ndarray]:
        """Measures by query; empty if all attempts failed."""
        for attempt in range(self._config.max_retries + 1):
            if attempt:
                pause = min(self._config.backoff_s * 2 ** (attempt - 1), _LONGEST_BACKOFF_S)
                # Clients that failed together do not come back together.
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            async with self._slot(request.actor + attempt) as actor:
                answer = await self._call(actor, gallery, request.queries)
            if isinstance(answer, Reply):
                self._suspect_until.pop(actor, None)
                return dict(zip(request.queries, answer.measures, strict=True))
            log.warning("reward actor %s failed (%s), attempt %d", self.names[actor], answer, attempt + 1)
            self._note_failure(actor, gallery, answer)
        return {}

    def _note_failure(self, actor: int, gallery: str, cause: str) -> None:
        self.failures[cause] += 1
        self._failed.inc(tags={"actor": self.names[actor], "gallery": gallery, "cause": cause})
        # For the length of a deadline others are asked first.
        self._suspect_until[actor] = time.monotonic() + self._config.timeout_s
        if cause == "died" and actor not in self._returning:
            self._returning[actor] = asyncio.get_running_loop().create_task(self._return_of(actor))

    async def _return_of(self, actor: int) -> None:
        if await wait_for_return(self._actors[actor], self._config.start_timeout_s):
            self._suspect_until.pop(actor, None)
        del self._returning[actor]

    @asynccontextmanager
    async def _slot(self, wish: int) -> AsyncIterator[int]:
        """An actor with fewer than `max_in_flight` of our requests: the wished one, or the next that did not fail."""
        while True:
            actor = self._choice(wish)
            if actor in self._returning:  # none is left that did not fail
                await asyncio.wait(self._returning.values(), return_when=asyncio.FIRST_COMPLETED)
                actor = self._choice(wish)
            async with self._slots[actor]:
                if self._choice(wish) == actor:
                    yield actor
                    return

    def _choice(self, wish: int) -> int:
        order = [(wish + step) % len(self.names) for step in range(len(self.names))]
        now = time.monotonic()
        return next((actor for actor in order if self._suspect_until.get(actor, now) <= now), order[0])

    async def _call(self, actor: int, gallery: str, queries: list[Query]) -> Reply | str:
        """The actor's reply, or the cause why there is none."""
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
                raise  # trying again would not mend it
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
    """Restartable reward actors and a client of them; `close` ends both.

    Args:
        spec: encoder and galleries.
        config: `rar.reward`.
        name: prefix of the actors' names.
    """

    def __init__(self, spec: RewardSpec, config: RewardConfig, *, name: str) -> None:
        pool = config.pool
        self._room = ActorPlacement("rar.reward.pool", pool)
        made = ray.remote(
            max_restarts=-1,
            max_task_retries=0,
            concurrency_groups={"score": config.max_in_flight, "count": 2 * pool.num_workers, "about": 2},
        )(RewardActor)
        names = [f"{name}-reward-{index}" for index in range(pool.num_workers)]
        threads = torch_threads(pool.cpus_per_worker)
        self._owned = [
            made.options(name=names[index], **self._room.options(index)).remote(spec, config, names, index, threads)
            for index in range(len(names))
        ]
        # The store drops what nobody refers to, and actors that start again need it.
        self._spec = spec
        super().__init__(names, spec.version, config)

    def wait_until_ready(self) -> None:
        """Wait until every actor has begun, so that no deadline counts the reading of its encoder.

        One that is killed before it has begun is started again, and waited for.

        Raises:
            RewardServiceError: an actor has not after `rar.reward.start_timeout_s`; named.
            ActorDiedError: it failed to begin.
        """
        begun = self._loop.start(self._begun()).result()
        late = [name for name, answers in zip(self.names, begun, strict=True) if not answers]
        if late:
            raise RewardServiceError(
                f"{', '.join(late)} did not begin within rar.reward.start_timeout_s "
                f"{self._config.start_timeout_s:g} s; raise it, or look at what else holds the cluster's CPUs and GPUs"
            )

    async def _begun(self) -> list[bool]:
        return await asyncio.gather(*(wait_for_answer(actor, self._config.start_timeout_s) for actor in self._owned))

    def client(self) -> RewardClient:
        """A client for another process."""
        return RewardClient(self.names, self._version, self._config)

    def close(self) -> None:
        super().close()
        for actor in self._owned:
            ray.kill(actor)
        self._room.close()
