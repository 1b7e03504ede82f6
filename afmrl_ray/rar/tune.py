"""RAR as a trial of Ray Tune: a thin shell around `RARTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ray.tune import Trainable

from afmrl_ray import storage
from afmrl_ray.config import Config, with_values
from afmrl_ray.rar.context import RARJob
from afmrl_ray.rar.trainer import open_trainer

_HELDOUT = tuple(
    f"{name}_{when}" for name in ("eval/reward", "eval/greedy_reward") for when in ("before", "after", "gain")
)


class RARTrainable(Trainable):
    """A trial: RAR with some settings changed, in a directory of its own below the job's.

    Tune's `config` has dotted keys, for example `{"rar.kl_coef": 0.01}`. A restored trial continues from its last
    checkpoint. The last result adds the means of the held-out rewards to the metrics of its step.
    """

    def setup(self, config: Mapping[str, Any], base: Config, job: RARJob) -> None:
        """Start the trial's actors and learners.

        Args:
            config: settings that the trial changes.
            base: config of all trials.
            job: inputs of all trials.
        """
        own = replace(job, directory=storage.join(job.directory, self.trial_id), name=f"{job.name}-{self.trial_id}")
        self._resources = ExitStack()
        self._trainer = self._resources.enter_context(open_trainer(with_values(base, config), own))

    def step(self) -> dict[str, Any]:
        """One step of the training."""
        metrics: dict[str, Any] = dict(self._trainer.train_step())
        if self._trainer.done:
            result = self._trainer.finish()
            metrics |= {name: result[name]["mean"] for name in _HELDOUT}
            metrics["done"] = True
        return metrics

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Write the trainer's own checkpoint, in the trial's directory; Tune keeps only the step."""
        self._trainer.save()
        return {"step": self._trainer.step}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Tune calls it to restore a trial; `setup` has loaded the trial's last checkpoint already."""

    def cleanup(self) -> None:
        """Stop the trial's actors and learners."""
        self._resources.close()
