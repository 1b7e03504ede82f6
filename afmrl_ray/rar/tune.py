"""RAR as a trial of Ray Tune: a thin shell around `RARTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray.tune import Trainable

from afmrl_ray import storage
from afmrl_ray.config import Config, with_values
from afmrl_ray.rar.trainer import RARJob, RARTrainer


class RARTrainable(Trainable):
    """A trial: RAR with some settings changed, in a directory of its own below the job's.

    Tune's `config` has dotted keys, for example `{"rar.kl_coef": 0.01}`. A trial that is restored goes on from its last
    checkpoint. The last result has `heldout_gain`, `heldout_before` and `heldout_after` beside the numbers of the step.
    """

    def setup(self, config: Mapping[str, Any], base: Config, job: RARJob) -> None:
        """Start the trial's actors and learners.

        Args:
            config: what the trial changes.
            base: everything else.
            job: what every trial starts from.
        """
        own = replace(job, directory=storage.join(job.directory, self.trial_id), name=f"{job.name}-{self.trial_id}")
        settings = with_values(base, config)
        self._steps = settings.rar.steps
        self._trainer = RARTrainer(settings, own)
        self._trainer.begin()

    def step(self) -> dict[str, Any]:
        """One step of the training."""
        values: dict[str, Any] = dict(self._trainer.train_step())
        if self._trainer.step == self._steps:
            result = self._trainer.finish()
            values.update({name: result[name]["mean"] for name in ("heldout_before", "heldout_after", "heldout_gain")})
            values["done"] = True
        return values

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Write the trainer's own checkpoint, in the trial's directory; Tune keeps only where it stands."""
        self._trainer.save()
        return {"step": self._trainer.step}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: `setup` has gone to the trial's last checkpoint."""

    def cleanup(self) -> None:
        self._trainer.close()
