"""Retrieval-aware attribute reinforcement: the training loop over rollouts, rewards and learners.

Prompts and seeds of a step are functions of the run's seed and the step, and rollouts are functions of weights, prompts
and seeds. So a run that resumes from a checkpoint continues exactly as it would have. With `max_staleness` 1 the
checkpoint also holds the rollouts of the next step, since the weights that sampled them are gone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from afmrl_ray import storage
from afmrl_ray.config import Config
from afmrl_ray.errors import WeightsLostError
from afmrl_ray.rar.context import RARContext, RARJob, open_context
from afmrl_ray.rar.heldout import HeldOut, compare, summarise
from afmrl_ray.rar.leverage import measure_leverage
from afmrl_ray.rar.loss import group_advantages
from afmrl_ray.rar.prompts import batch_columns, group_seeds
from afmrl_ray.rar.reward.metrics import ServiceLog
from afmrl_ray.rar.rollout_batch import RolloutBatch
from afmrl_ray.rar.rollout_metrics import rollout_metrics
from afmrl_ray.rar.samples import write_samples
from afmrl_ray.rar.selection import Evaluation, Selection

log = logging.getLogger(__name__)

_RECENT_STEPS = 10
"""Steps whose metrics the result averages."""

OnStep = Callable[[int, dict[str, float]], None]
"""Called after every step with its number and its metrics."""


def train_rar(config: Config, job: RARJob, on_step: OnStep | None = None) -> dict[str, Any]:
    """Reinforce the generator; resumes from the latest checkpoint below `job.directory`.

    When a learner dies, the learner group is rebuilt and the updates since the last checkpoint are repeated with the
    same rollouts.

    Args:
        config: the run's config.
        job: inputs.
        on_step: called after every step.

    Returns:
        Held-out reward before, after and gained, with intervals (`eval/*`), means over the last steps and counts.
        "After" is the policy that was written, which is the best one with `rar.keep_best`.

    Raises:
        CatalogueError: no query can be used.
        ConfigError: `rar.rollout.engine` is not installed.
        RewardServiceError, WeightSyncError: see `rar.reward.client` and `rar.rollout`.
        LearnerLostError: learners died more often than they are replaced.
        RuntimeError: log-probabilities of sampler and learner differ by more than `rar.rollout_logprob_diff_limit`.
    """
    with open_trainer(config, job) as trainer:
        return trainer.run(on_step)


@contextmanager
def open_trainer(config: Config, job: RARJob) -> Iterator[RARTrainer]:
    """A trainer at the latest checkpoint, whose actors and learners run until the context ends."""
    with open_context(config, job) as context:
        yield RARTrainer(context)


class RARTrainer:
    """The training loop; restores the latest checkpoint and pushes its weights to the rollout actors.

    Args:
        context: the open parts; the caller closes them, after which the trainer must not be used.

    Attributes:
        step: steps done.
        done: whether training has ended, after the last step or early.
    """

    def __init__(self, context: RARContext) -> None:
        self._context, self._rar = context, context.config.rar
        self._service_log = ServiceLog()
        self._catalogue = context.job.catalogue.open()
        manifest = context.manifest
        self.step, self._recent = int(manifest["step"]), manifest["recent_metrics"]
        context.learners.restore(self.step)
        self._sync_weights()
        context.rewards.wait_until_ready()
        self._heldout_before = self._load_heldout_before()
        saved = manifest["selection"]
        self._selection = Selection.from_dict(saved) if saved is not None else Selection.start(self._evaluate())
        self._leverage = measure_leverage(
            context.rewards,
            "heldout",
            context.prompts["heldout"].rows.tolist(),
            self._selection.first.rewards,
            context.job.heldout_truth,
            seed=context.config.run.seed,
        )
        self._finished = False
        if manifest["next_batch"] is not None:
            max_attributes = context.policy.generator.max_attributes
            context.prefetcher.put(RolloutBatch.from_dict(manifest["next_batch"], max_attributes=max_attributes))

    def run(self, on_step: OnStep | None = None) -> dict[str, Any]:
        """Train up to the last step; see `train_rar`."""
        steps, name = self._rar.steps, self._context.job.name
        for step in tqdm(range(self.step, steps), desc=name, initial=self.step, total=steps):
            if self.done:
                break
            metrics = self.train_step()
            if on_step is not None:
                on_step(step, metrics)
        return self.finish()

    @property
    def done(self) -> bool:
        return self.step >= self._rar.steps or self._selection.exhausted(self._rar.patience)

    def train_step(self) -> dict[str, float]:
        """One step: rollouts, rewards, update, weights to the rollout actors. Returns its metrics."""
        context, step = self._context, self.step
        seconds: dict[str, float] = {}
        with _timed(seconds, "wait_rollouts"):
            batch = context.prefetcher.take(step)
        with _timed(seconds, "update_actor"):
            advantages = self._advantages(batch)
            actor = context.learners.update(self._columns(batch, advantages))
        self._check_rollout_logprobs(batch, actor["actor/rollout_logprob_diff"])
        # Rollout actors must not change weights during a rollout.
        with _timed(seconds, "wait_prefetch"):
            context.prefetcher.wait()
        with _timed(seconds, "sync_weights"):
            self._sync_weights()
        self.step += 1
        evaluated, improved = {}, False
        if self.step == self._rar.steps or (self._rar.evaluate_every and self.step % self._rar.evaluate_every == 0):
            with _timed(seconds, "evaluate"):
                evaluation = self._evaluate()
            self._selection = self._selection.add(evaluation)
            evaluated, improved = evaluation.metrics(), self._selection.best is evaluation
        metrics = {
            **rollout_metrics(batch, context.attribute_names),
            **self._service_log.step(context.rewards.stats(), context.rewards.failures),
            **actor,
            **evaluated,
            "rollout/staleness": float(step - batch.groups[0].version),
            "actor/restarts": float(context.learners.restarts),
            **{f"time/{name}": value for name, value in seconds.items()},
        }
        context.metrics.log(step, metrics)
        self._write_samples(step, batch, advantages)
        self._recent = [*self._recent, metrics][-_RECENT_STEPS:]
        if self.done or self.step % self._rar.checkpoint_every == 0 or (improved and self._rar.keep_best):
            self.save()
        return metrics

    def save(self) -> None:
        """Write a checkpoint from which training continues as it would have; after `finish` there is none to write."""
        if self._finished:
            return
        self._context.metrics.flush()
        following = self._context.prefetcher.wait()
        next_batch = following.as_dict() if following is not None else None
        manifest = {"recent_metrics": self._recent, "next_batch": next_batch, "selection": self._selection.as_dict()}
        keep = self._selection.best.step if self._rar.keep_best else None
        self._context.learners.save(self.step, manifest, keep=keep)

    def finish(self) -> dict[str, Any]:
        """Write the policy that is kept and measure it on the held-out prompts; see `train_rar` for the result.

        The learners hold that policy afterwards, so no step may follow.
        """
        context, prompts = self._context, self._context.prompts["train"]
        self._finished = True
        kept = self._selection.best if self._rar.keep_best else self._selection.last
        if kept.step != self.step:
            log.info("the policy after step %d is kept, whose greedy held-out reward is the highest", kept.step)
            context.learners.revert(kept.step)
            self._sync_weights()
        context.learners.save_model(storage.join(context.job.directory, "model"))
        averaged = ("reward/mean", "rollout/invalid_fraction")
        return {
            **compare(self._heldout_before, self._heldout(), seed=context.config.run.seed),
            **self._leverage,
            **self._selection.result(kept, seed=context.config.run.seed),
            **{name: float(np.mean([metrics[name] for metrics in self._recent])) for name in averaged},
            "data/prompts": len(prompts.rows),
            "data/dropped_prompts": prompts.dropped,
            "data/prompts_with_duplicates": len(context.left_out["train"]),
            "rollout/restarts": context.rollouts.restarts,
        }

    def _advantages(self, batch: RolloutBatch) -> np.ndarray:
        rar = self._rar
        return group_advantages(
            torch.from_numpy(batch.rewards),
            scale=rar.reward_scaling,
            eps=rar.advantage_eps,
            baseline=rar.grpo.baseline,
        ).numpy()

    def _write_samples(self, step: int, batch: RolloutBatch, advantages: np.ndarray) -> None:
        """The table of a step's rollouts, every `rar.samples_every` steps."""
        if not self._rar.samples_every or step % self._rar.samples_every:
            return
        rows = [group.row for group in batch.groups]
        item_ids = [self._catalogue.item(row).item_id for row in rows]
        write_samples(storage.join(self._context.job.directory, "samples"), step, batch, advantages, item_ids)

    def _columns(self, batch: RolloutBatch, advantages: np.ndarray) -> dict[str, np.ndarray]:
        """The learners' batch: rollouts with the advantages of their rewards."""
        rar = self._rar
        return batch_columns(
            batch.groups,
            advantages,
            batch.rewards,
            loss_aggregation=rar.grpo.loss_aggregation,
            max_tokens=self._context.policy.generator.max_new_tokens,
            mask_truncated_completions=rar.grpo.mask_truncated_completions,
            exclude_zero_variance=rar.grpo.exclude_zero_variance,
            minibatches=rar.minibatches,
        )

    def _sync_weights(self) -> None:
        """Push the learners' weights to the rollout actors; exported again if the learner that held them has died."""
        while True:
            try:
                return self._context.rollouts.push(self._context.learners.weights())
            except WeightsLostError as error:
                log.warning("%s; exporting them again", error)

    def _check_rollout_logprobs(self, batch: RolloutBatch, difference: float) -> None:
        """Raises RuntimeError if sampler and learner disagree on the log-probabilities of fresh rollouts."""
        fresh = all(group.version == self.step for group in batch.groups)
        if fresh and difference > self._rar.rollout_logprob_diff_limit:
            raise RuntimeError(
                f"step {self.step}: sampler and learner differ by {difference:.4f} nats per token on fresh rollouts, "
                f"more than rar.rollout_logprob_diff_limit {self._rar.rollout_logprob_diff_limit:g}; "
                "the policies are not the same"
            )

    def _load_heldout_before(self) -> HeldOut:
        """Held-out rewards of the initial policy; kept beside the checkpoints, since a resumed policy has changed."""
        path = storage.join(self._context.job.directory, "heldout_before.json")
        if self.step == 0 or not storage.exists(path):
            storage.write_json(path, self._heldout().as_dict())
        return HeldOut(**storage.read_json(path))

    def _evaluate(self) -> Evaluation:
        """Greedy completions of the held-out prompts by the policy of the rollout actors."""
        context = self._context
        rows = context.prompts["heldout"].rows.tolist()
        evaluation = Evaluation.of(context.collector.collect(rows, None, context.request("heldout", 1)), self.step)
        log.info(
            "step %d: %s", self.step, ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics().items())
        )
        return evaluation

    def _heldout(self) -> HeldOut:
        """Sample and score the held-out prompts, with the same seeds before and after."""
        context, rows = self._context, self._context.prompts["heldout"].rows
        request = context.request("heldout", self._rar.heldout_samples)
        seeds = group_seeds(context.config.run.seed, -1, len(rows))
        batch = context.collector.collect(rows.tolist(), seeds, request)
        return summarise(batch.rewards, batch.parsed)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to `seconds`."""
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
