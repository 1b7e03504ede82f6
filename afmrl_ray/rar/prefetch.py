"""Collecting the rollouts of the next step while the learners train on those of this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from afmrl_ray.rar.rollout_batch import RolloutBatch


class RolloutPrefetcher:
    """Rollouts step by step; with a lag of 1 the next step is collected on a thread.

    Args:
        collect: samples and scores a step.
        lag: steps collected ahead, 0 or 1.
        steps: steps of the training.
    """

    def __init__(self, collect: Callable[[int], RolloutBatch], *, lag: int, steps: int) -> None:
        self._collect, self._lag, self._steps = collect, lag, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-prefetch")
        self._next: Future[RolloutBatch] | None = None

    def take(self, step: int) -> RolloutBatch:
        """Rollouts of a step; raises what collecting them raised. With a lag, starts to collect the next step."""
        batch = self._next.result() if self._next is not None else self._collect(step)
        self._next = self._thread.submit(self._collect, step + 1) if self._lag and step + 1 < self._steps else None
        return batch

    def put(self, batch: RolloutBatch) -> None:
        """Make the next `take` return a batch that a checkpoint held."""
        self._next = self._thread.submit(lambda: batch)

    def wait(self) -> RolloutBatch | None:
        """Wait for the rollouts that are being collected ahead, if any, and return them without taking them."""
        return self._next.result() if self._next is not None else None

    def close(self) -> None:
        """Wait for what is being collected, and drop it."""
        self._thread.shutdown(cancel_futures=True)
