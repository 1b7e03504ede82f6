"""A learner group that survives the death of a learner: it is rebuilt and repeats the updates since the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from ray.exceptions import RayActorError, RayError
from ray.rllib.core.learner.learner_group import LearnerGroup

from afmrl_ray.config.rar import RARConfig
from afmrl_ray.errors import UserError
from afmrl_ray.rar.checkpoint import Checkpoints
from afmrl_ray.rar.learner import build_learners
from afmrl_ray.rar.messages import Weights
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.rar.rllib_contract import learner_batch

log = logging.getLogger(__name__)


class LearnerLostError(RuntimeError):
    """A learner died."""


class FaultTolerantLearnerGroup:
    """RLlib's learner group behind calls that survive the death of a learner.

    Every batch since the last checkpoint is kept (token ids and rewards, no images). When a learner dies, the group is
    rebuilt from that checkpoint and trained on those batches again: nothing is sampled or scored twice, and the result
    is that of an undisturbed run.

    Args:
        rar: settings.
        policy: the policy that is trained.
        checkpoints: where `save` writes to.

    Raises:
        LearnerLostError: learners died more than `rar.max_learner_restarts` times; any method may raise it.
    """

    def __init__(self, rar: RARConfig, policy: PolicySpec, checkpoints: Checkpoints) -> None:
        self._rar, self._policy, self._checkpoints = rar, policy, checkpoints
        self._since_checkpoint: list[dict[str, np.ndarray]] = []
        self._saved = 0
        self.restarts = 0
        """Times that the group was rebuilt."""
        self._resources = ExitStack()
        self._group: LearnerGroup
        self._surviving(self._build, on_rebuilt=_nothing)

    def restore(self, step: int) -> None:
        """Load the checkpoint taken after update number `step`; 0 = the initial policy."""
        self._saved = step
        self._surviving(self._load, on_rebuilt=_nothing)

    def revert(self, step: int) -> None:
        """Go back to the checkpoint taken after update number `step`, which may be any that is kept; 0 = the initial
        policy.
        """
        self._saved, self._since_checkpoint = step, []
        self._surviving(lambda: self._rebuilt(_nothing), on_rebuilt=_nothing)

    def update(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        """One optimizer step of all learners; returns its `actor/*` metrics."""
        metrics = self._surviving(lambda: self._update(columns))
        self._since_checkpoint.append(columns)
        return metrics

    def weights(self) -> Weights:
        """The trained tensors, in the object store."""
        exported = self._surviving(lambda: self._call(lambda learner: learner.export_weights()))
        return Weights(*next(found for found in exported if found))

    def save(self, step: int, manifest: dict[str, Any], *, keep: int | None = None) -> None:
        """Write a checkpoint after update number `step`, with `manifest` beside the engine's shards; older ones but
        that of step `keep` are removed.
        """
        path = self._checkpoints.engine_path(step)
        self._surviving(lambda: self._call(lambda learner: learner.save_engine(path)))
        self._checkpoints.commit(step, manifest, keep=keep)
        self._saved, self._since_checkpoint = step, []

    def save_model(self, path: str) -> None:
        """Write the policy as an ordinary checkpoint or adapter."""
        self._surviving(lambda: self._call(lambda learner: learner.save_model(path)))

    def shutdown(self) -> None:
        """Stop the learners and release their resources."""
        self._resources.close()

    def _build(self) -> None:
        try:
            self._group = build_learners(self._rar, self._policy)
        except (RayActorError, TypeError) as error:
            # When a learner dies as the backend starts, Ray Train raises `None`: a TypeError, the death its context.
            death = error if isinstance(error, RayActorError) else error.__context__
            if not isinstance(death, RayActorError):
                raise
            raise LearnerLostError(f"a learner died while it was built ({type(death).__name__})") from error
        self._resources.callback(lambda group: group.shutdown(), self._group)

    def _load(self) -> None:
        step = self._saved
        if step:
            path = self._checkpoints.engine_path(step)
            self._call(lambda learner: learner.load_engine(path, step))

    def _update(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        try:
            self._group.update(batch=learner_batch(columns))
        except RayError as error:
            raise LearnerLostError(f"a learner died in an update ({type(error).__name__})") from error
        return self._call(lambda learner: learner.stats)[0]

    def _call(self, function: Any) -> list[Any]:
        """Call a function on every learner and return the results.

        The function is pickled with its closure: with `self` in it the learners would get a learner group of their own
        and hang when that is shut down.

        Raises:
            LearnerLostError: a learner died.
        """
        results = self._group.foreach_learner(function)
        failed = [result.get() for result in results if not result.ok]
        for error in failed:
            if isinstance(error, UserError):
                # Ray's copy of the error has the learner's whole traceback as its message.
                raise getattr(error, "cause", error)
        if failed or not list(results):
            raise LearnerLostError(f"a learner failed: {failed[0] if failed else 'none is left'}")
        return [result.get() for result in results]

    def _surviving(self, action: Callable[[], Any], *, on_rebuilt: Callable[[], Any] | None = None) -> Any:
        """Run `action`; when a learner dies, rebuild the group and run `on_rebuilt`, or `action` again."""
        attempt = action
        while True:
            try:
                return attempt()
            except LearnerLostError as error:
                if self.restarts == self._rar.max_learner_restarts:
                    raise
                self.restarts += 1
                log.warning("%s; rebuilding the learners from the checkpoint of step %d", error, self._saved)
                attempt = partial(self._rebuilt, on_rebuilt or action)

    def _rebuilt(self, action: Callable[[], Any]) -> Any:
        """Run `action` on a new group that has repeated every update since the last checkpoint."""
        self.shutdown()
        self._build()
        self._load()
        for columns in self._since_checkpoint:
            self._update(columns)
        return action()


def _nothing() -> None:
    """For actions that rebuilding the group includes."""
