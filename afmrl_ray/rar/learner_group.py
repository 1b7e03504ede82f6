"""The learner group, and what to do when a learner dies: build it anew and do the same updates again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from ray.exceptions import RayActorError, RayError
from ray.rllib.core.learner.learner_group import LearnerGroup

from afmrl_ray.config.train import RARConfig
from afmrl_ray.errors import UserError
from afmrl_ray.rar.checkpoint import Checkpoints
from afmrl_ray.rar.learner import build_learners, learner_batch
from afmrl_ray.rar.messages import Weights
from afmrl_ray.rar.module import PolicySpec

log = logging.getLogger(__name__)


class LearnerLostError(RuntimeError):
    """A learner is gone."""


class FaultTolerantLearnerGroup:
    """RLlib's learner group behind calls that survive the death of a learner.

    Every batch since the last checkpoint is kept (token ids and rewards, no images). When a learner dies, the group
    is built anew from that checkpoint and the batches are learned from again: nothing is sampled or scored twice, and
    the numbers are those of an undisturbed run.

    Args:
        rar: settings.
        policy: what is learned.
        checkpoints: where `save` writes to.

    Raises:
        LearnerLostError: learners died more often than `rar.max_learner_restarts`, as any call may tell.
    """

    def __init__(self, rar: RARConfig, policy: PolicySpec, checkpoints: Checkpoints) -> None:
        self._rar, self._policy, self._checkpoints = rar, policy, checkpoints
        self._since: list[dict[str, np.ndarray]] = []
        self._saved = 0
        self.restarts = 0
        """Times that the group was built anew."""
        self._group: LearnerGroup | None = None
        self._surviving(self._build, again=_nothing)

    def restore(self, step: int) -> None:
        """Load the checkpoint taken after update number `step`; 0 = the start."""
        self._saved = step
        self._surviving(self._load, again=_nothing)

    def update(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        """One optimizer step of all learners; returns its numbers."""
        stats = self._surviving(lambda: self._update(columns))
        self._since.append(columns)
        return stats

    def weights(self) -> Weights:
        """The trained tensors, in the object store."""
        exported = self._surviving(lambda: self._call(lambda learner: learner.export_weights()))
        return Weights(*next(found for found in exported if found))

    def save(self, step: int, manifest: dict[str, Any]) -> None:
        """Write a checkpoint after update number `step`, with `manifest` beside the engine's shards."""
        path = self._checkpoints.engine_path(step)
        self._surviving(lambda: self._call(lambda learner: learner.save_engine(path)))
        self._checkpoints.commit(step, manifest)
        self._saved, self._since = step, []

    def save_model(self, path: str) -> None:
        """Write the policy as an ordinary checkpoint or adapter."""
        self._surviving(lambda: self._call(lambda learner: learner.save_model(path)))

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.shutdown()

    def _build(self) -> None:
        self._group = None
        try:
            self._group = build_learners(self._rar, self._policy)
        except (RayActorError, TypeError) as error:
            # Of a death as the backend starts Ray Train keeps nothing and raises `None`: a TypeError amid the death.
            death = error if isinstance(error, RayActorError) else error.__context__
            if not isinstance(death, RayActorError):
                raise
            raise LearnerLostError(f"a learner died as it was made ({type(death).__name__})") from error

    def _load(self) -> None:
        step = self._saved
        if step:
            path = self._checkpoints.engine_path(step)
            self._call(lambda learner: learner.load_engine(path, step))

    def _update(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        assert self._group is not None
        try:
            self._group.update(batch=learner_batch(columns))
        except RayError as error:
            raise LearnerLostError(f"a learner died in an update ({type(error).__name__})") from error
        return self._call(lambda learner: learner.stats)[0]

    def _call(self, function: Any) -> list[Any]:
        """Call a function on every learner and return what they gave.

        The function is pickled with what it closes over: with `self` the learners would get a learner group of their
        own, and hang on its shutdown.

        Raises:
            LearnerLostError: one is gone.
        """
        assert self._group is not None
        results = self._group.foreach_learner(function)
        failed = [result.get() for result in results if not result.ok]
        for error in failed:
            if isinstance(error, UserError):
                # Ray's own copy of it would tell the learner's whole traceback.
                raise getattr(error, "cause", error)
        if failed or not list(results):
            raise LearnerLostError(f"a learner failed: {failed[0] if failed else 'none is left'}")
        return [result.get() for result in results]

    def _surviving(self, action: Callable[[], Any], *, again: Callable[[], Any] | None = None) -> Any:
        """Do `action`; when a learner dies, rebuild the group and do it, or `again`, on the new one."""
        attempt = action
        while True:
            try:
                return attempt()
            except LearnerLostError as error:
                if self.restarts == self._rar.max_learner_restarts:
                    raise
                self.restarts += 1
                log.warning("%s; rebuilding the learners from the checkpoint of step %d", error, self._saved)
                attempt = partial(self._rebuilt, again or action)

    def _rebuilt(self, action: Callable[[], Any]) -> Any:
        """`action` on a new group, at the last checkpoint, that has learned from every batch since."""
        self.shutdown()
        self._build()
        self._load()
        for columns in self._since:
            self._update(columns)
        return action()


def _nothing() -> None:
    """What is left to do where the rebuilding has done it."""
