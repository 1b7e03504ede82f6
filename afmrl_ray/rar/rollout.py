"""A pool of Ray actors that sample completions, each holding a copy of the policy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from afmrl_ray.config.train import RolloutConfig
from afmrl_ray.errors import WeightsLostError, WeightSyncError
from afmrl_ray.models.threads import torch_threads
from afmrl_ray.rar.engine import MakeEngine, engine_class
from afmrl_ray.rar.messages import PromptGroup, Weights
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.training.placement import ActorPlacement

log = logging.getLogger(__name__)


class RolloutPool:
    """Actors that sample; chunks of prompts are cut by order alone, so results do not depend on who is free.

    Args:
        spec: the policy.
        config: `rar.rollout`.
        engine: what each actor is made of; none = what `config` names.

    Raises:
        ConfigError: see `rar.engine.engine_class`.
    """

    def __init__(self, spec: PolicySpec, config: RolloutConfig, engine: MakeEngine | None = None) -> None:
        self._spec, self._config, self._engine = spec, config, engine or engine_class(config)
        self._weights: Weights | None = None
        self._restarts = 0
        self._made = 0
        self._room = ActorPlacement("rar.rollout.pool", config.pool)
        self.actors = [self._make(index) for index in range(config.pool.num_workers)]

    def _make(self, index: int) -> Any:
        pool = self._config.pool
        self._made += 1
        actor = ray.remote(max_restarts=0, **self._room.options(index))(self._engine)
        return actor.remote(self._spec, self._config, torch_threads(pool.cpus_per_worker))

    @property
    def restarts(self) -> int:
        """Actors replaced so far."""
        return self._restarts

    def push(self, weights: Weights) -> None:
        """Give every actor the weights and wait until each has echoed version and fingerprint.

        Raises:
            WeightSyncError: an actor holds something else, or does not answer in time.
            WeightsLostError: they are gone; they must be exported again.
            RuntimeError: an actor cannot be made, or more died than `max_restarts`.
        """
        self._weights = weights
        for index in range(len(self.actors)):
            try:
                self._push_to(index)
            except RayActorError:
                self._replace(index)

    def _push_to(self, index: int) -> None:
        assert self._weights is not None
        try:
            echo = ray.get(self.actors[index].set_weights.remote(self._weights), timeout=self._config.timeout_s)
        except GetTimeoutError as error:
            raise WeightSyncError(
                f"rollout actor {index} did not take weights {self._weights.version} within "
                f"rar.rollout.timeout_s {self._config.timeout_s:g} s"
            ) from error
        except ObjectLostError as error:
            raise WeightsLostError(
                f"weights {self._weights.version} were lost before rollout actor {index} had them"
            ) from error
        except RayActorError as error:
            if error.actor_init_failed:
                # Its replacements would fail alike.
                reason = str(error).strip().splitlines()[-1]
                raise RuntimeError(f"rollout actor {index} cannot be made: {reason}") from error
            raise
        if echo != (self._weights.version, self._weights.fingerprint):
            raise WeightSyncError(f"rollout actor {index} holds {echo}, pushed was version {self._weights.version}")

    def _replace(self, index: int) -> None:
        """Make another in its place, and yet another where that dies before it has the weights."""
        while True:
            self._restarts += 1
            if self._restarts > self._config.max_restarts:
                raise RuntimeError(
                    f"rollout actors died {self._restarts} times, more than rar.rollout.max_restarts "
                    f"{self._config.max_restarts} allows; look at their logs"
                )
            log.warning("rollout actor %d died, replaced (%d of %d)", index, self._restarts, self._config.max_restarts)
            self.actors[index] = self._make(index)
            try:
                return self._push_to(index)
            except RayActorError:
                continue

    def sample(self, rows: Sequence[int], seeds: Sequence[int], *, group_size: int) -> list[PromptGroup]:
        """A group for each row, in order; see `stream`."""
        chunks = dict(self.stream(rows, seeds, group_size=group_size))
        return [group for place in sorted(chunks) for group in chunks[place]]

    def stream(
        self, rows: Sequence[int], seeds: Sequence[int], *, group_size: int
    ) -> Iterator[tuple[int, list[PromptGroup]]]:
        """Groups as they come: number of the first row of a chunk, and a group for each row of it.

        Chunks lost with an actor are sampled again, none twice.

        Args:
            rows: catalogue rows of the prompts.
            seeds: one for each prompt; a group is a function of weights, prompt and seed.
            group_size: completions per prompt.

        Raises:
            TimeoutError: an actor does not answer; named.
            RuntimeError: more actors died than `max_restarts`, or one cannot be made.
        """
        assert self._weights is not None, "push weights before sampling"
        size = self._config.pool.batch_size
        chunks = [slice(start, start + size) for start in range(0, len(rows), size)]
        waiting = list(range(len(chunks)))
        running: dict[Any, tuple[int, int]] = {}
        free = list(range(len(self.actors)))
        ready: list[tuple[int, list[PromptGroup]]] = []
        while waiting or running or ready:
            while waiting and free:
                chunk, actor = waiting.pop(0), free.pop(0)
                call = self.actors[actor].sample.remote(
                    list(rows[chunks[chunk]]),
                    list(seeds[chunks[chunk]]),
                    group_size=group_size,
                    version=self._weights.version,
                )
                running[call] = chunk, actor
            # Handed on only now, so that no actor idles while the caller looks at them.
            yield from ready
            ready = []
            if not running:
                continue
            finished, _ = ray.wait(list(running), timeout=self._config.timeout_s)
            if not finished:
                names = sorted(actor for _, actor in running.values())
                raise TimeoutError(f"rollout actors {names} gave nothing within {self._config.timeout_s:g} s")
            for call in finished:
                chunk, actor = running.pop(call)
                free.append(actor)
                try:
                    ready.append((chunks[chunk].start, ray.get(call)))
                except RayActorError:
                    self._replace(actor)
                    waiting.insert(0, chunk)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self._room.close()
