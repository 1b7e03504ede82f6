"""Collecting a step's experience while the step before it is learned from."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from afmrl_ray.rar.rollout_batch import RolloutBatch


class RolloutPrefetcher:
    """Rollouts of one step after another; with a lag of 1 the next one is collected in a thread of its own.

    Args:
        collect: samples and scores a step.
        lag: steps ahead, 0 or 1.
        steps: of the training.
    """

    def __init__(self, collect: Callable[[int], RolloutBatch], *, lag: int, steps: int) -> None:
        self._collect, self._lag, self._steps = collect, lag, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next-step")
        self._next: Future[RolloutBatch] | None = None

    def take(self, step: int) -> RolloutBatch:
        """The experience of a step; raises what collecting it raised. With a lag, the next one is begun."""
        found = self._next.result() if self._next is not None else self._collect(step)
        self._next = self._thread.submit(self._collect, step + 1) if self._lag and step + 1 < self._steps else None
        return found

    def put(self, found: RolloutBatch) -> None:
        """Let the next `take` give what a checkpoint has kept."""
        self._next = self._thread.submit(lambda: found)

    def wait(self) -> RolloutBatch | None:
        """The experience of the next step, if it was begun, as soon as it is whole."""
        return self._next.result() if self._next is not None else None

    def close(self) -> None:
        """Wait for what is being collected, and drop it."""
        self._thread.shutdown(cancel_futures=True)
