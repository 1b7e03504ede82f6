"""A pool of Ray actors that sample completions, each holding a copy of the policy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from afmrl_ray.config.rar import RolloutConfig
from afmrl_ray.errors import WeightsLostError, WeightSyncError
from afmrl_ray.models.threads import torch_threads
from afmrl_ray.rar.engine import MakeEngine, engine_class
from afmrl_ray.rar.messages import PromptGroup, Weights
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.training.placement import ActorPlacement

log = logging.getLogger(__name__)


class RolloutPool:
    """Rollout actors; prompts are cut into chunks by order alone, so results do not depend on which actor is free.

    Args:
        spec: the policy.
        config: `rar.rollout`.
        engine: class of the actors; none = the one that `config` names.

    Raises:
        ConfigError: see `rar.engine.engine_class`.
    """

    def __init__(self, spec: PolicySpec, config: RolloutConfig, engine: MakeEngine | None = None) -> None:
        self._spec, self._config, self._engine = spec, config, engine or engine_class(config)
        self._weights: Weights | None = None
        self._restarts = 0
        self._placement = ActorPlacement("rar.rollout.pool", config.pool)
        self.actors = [self._make(index) for index in range(config.pool.num_workers)]

    def _make(self, index: int) -> Any:
        pool = self._config.pool
        actor = ray.remote(max_restarts=0, **self._placement.options(index))(self._engine)
        return actor.remote(self._spec, self._config, torch_threads(pool.cpus_per_worker))

    @property
    def restarts(self) -> int:
        """Actors replaced so far."""
        return self._restarts

    def push(self, weights: Weights) -> None:
        """Load weights into every actor and wait until each has returned their version and fingerprint.

        Raises:
            WeightSyncError: an actor returned another version or fingerprint, or did not answer in time.
            WeightsLostError: the object store has lost the weights; they must be exported again.
            RuntimeError: the constructor of an actor raised, or more actors died than `max_restarts`.
        """
        self._weights = weights
        for index in range(len(self.actors)):
            try:
                self._push_to(index, weights)
            except RayActorError:
                self._replace(index, weights)

    def _push_to(self, index: int, weights: Weights) -> None:
        try:
            loaded = ray.get(self.actors[index].set_weights.remote(weights), timeout=self._config.timeout_s)
        except GetTimeoutError as error:
            raise WeightSyncError(
                f"rollout actor {index} did not take weights {weights.version} within "
                f"rar.rollout.timeout_s {self._config.timeout_s:g} s"
            ) from error
        except ObjectLostError as error:
            raise WeightsLostError(
                f"weights {weights.version} were lost before rollout actor {index} had them"
            ) from error
        except RayActorError as error:
            if error.actor_init_failed:
                # A replacement would fail alike.
                reason = str(error).strip().splitlines()[-1]
                raise RuntimeError(f"rollout actor {index} cannot be made: {reason}") from error
            raise
        if loaded != (weights.version, weights.fingerprint):
            raise WeightSyncError(f"rollout actor {index} holds {loaded}, pushed was version {weights.version}")

    def _replace(self, index: int, weights: Weights) -> None:
        """Replace an actor that died; again if the replacement dies before it has the weights."""
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
                return self._push_to(index, weights)
            except RayActorError:
                continue

    def sample(self, rows: Sequence[int], seeds: Sequence[int] | None, *, group_size: int) -> list[PromptGroup]:
        """One group per row, in order; see `stream`."""
        chunks = dict(self.stream(rows, seeds, group_size=group_size))
        return [group for place in sorted(chunks) for group in chunks[place]]

    def stream(
        self, rows: Sequence[int], seeds: Sequence[int] | None, *, group_size: int
    ) -> Iterator[tuple[int, list[PromptGroup]]]:
        """Groups as they are sampled: index of the first row of a chunk, and one group per row of the chunk.

        A chunk that was lost with its actor is sampled again; no other is sampled twice.

        Args:
            rows: catalogue rows of the prompts.
            seeds: one per prompt; a group is a function of weights, prompt and seed. None = greedy decoding, with
                `group_size` 1.
            group_size: completions per prompt.

        Raises:
            TimeoutError: the named actors did not answer in time.
            RuntimeError: no weights were pushed, more actors died than `max_restarts`, or a constructor raised.
        """
        weights = self._weights
        if weights is None:
            raise RuntimeError("push weights before sampling")
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
                    list(seeds[chunks[chunk]]) if seeds is not None else None,
                    group_size=group_size,
                    version=weights.version,
                )
                running[call] = chunk, actor
            # Yielded after the next calls are sent, so that no actor idles while the caller handles these.
            yield from ready
            ready = []
            if not running:
                continue
            finished, _ = ray.wait(list(running), timeout=self._config.timeout_s)
            if not finished:
                names = sorted(actor for _, actor in running.values())
                raise TimeoutError(f"rollout actors {names} returned nothing within {self._config.timeout_s:g} s")
            for call in finished:
                chunk, actor = running.pop(call)
                free.append(actor)
                try:
                    ready.append((chunks[chunk].start, ray.get(call)))
                except RayActorError:
                    self._replace(actor, weights)
                    waiting.insert(0, chunk)

    def close(self) -> None:
        """Kill the actors and release their resources."""
        for actor in self.actors:
            ray.kill(actor)
        self._placement.close()
