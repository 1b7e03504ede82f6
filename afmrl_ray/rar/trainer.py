"""Retrieval-aware attribute reinforcement: the driver of rollouts, rewards and learners.

Prompts and seeds of a step are functions of the run's seed and the step; rollouts are functions of weights, prompts and
seeds. So a run that is resumed from a checkpoint goes on exactly as it would have. With `max_staleness` 1 the
checkpoint holds the rollouts of the next step too, since the weights that sampled them are gone.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from afmrl_ray import storage
from afmrl_ray.attributes.quality import NAME_SHARE, common_names, name_shares
from afmrl_ray.attributes.text import Attributes, InvalidAttributes, format_attributes, normalise_attributes
from afmrl_ray.catalogue import CatalogueRef
from afmrl_ray.config import Config
from afmrl_ray.errors import WeightsLostError
from afmrl_ray.models.annotate import GeneratorRef
from afmrl_ray.models.model_settings import generator_settings
from afmrl_ray.rar.checkpoint import Checkpoints
from afmrl_ray.rar.engine import engine_class
from afmrl_ray.rar.heldout import HeldOut, compare, summarise
from afmrl_ray.rar.learner_group import FaultTolerantLearnerGroup
from afmrl_ray.rar.loss import group_advantages
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.rar.prefetch import RolloutPrefetcher
from afmrl_ray.rar.prompts import batch_columns, group_seeds, usable_rows
from afmrl_ray.rar.reward import RewardPool
from afmrl_ray.rar.reward_log import ServiceLog
from afmrl_ray.rar.reward_spec import Gallery, RewardSpec, parts_of
from afmrl_ray.rar.rollout import RolloutPool
from afmrl_ray.rar.rollout_batch import Collector, RolloutBatch, RolloutRequest
from afmrl_ray.retrieval.embed import EncoderRef, load_embeddings
from afmrl_ray.training.metrics_log import MetricsLog

log = logging.getLogger(__name__)

_TAIL = 10
_NAMES = 12


@dataclass(frozen=True)
class RARJob:
    """What a RAR starts from.

    Attributes:
        generator: the policy at the round's start.
        encoder: the frozen encoder.
        catalogue: the catalogue.
        gallery: file of `save_embeddings` that training queries search.
        heldout_gallery: the same for held-out queries.
        gallery_version: pinned for the whole RAR and checked on every reply of the reward service.
        directory: attempt directory; the policy is written to `<directory>/model`.
        name: of the stage; part of the reward actors' names.
        upstream: fingerprints of the stages that it reads, by name, for the settings beside the policy.
    """

    generator: GeneratorRef
    encoder: EncoderRef
    catalogue: CatalogueRef
    gallery: str
    heldout_gallery: str
    gallery_version: str
    directory: str
    name: str
    upstream: Mapping[str, str] = field(default_factory=dict)


OnStep = Callable[[int, dict[str, float]], None]
"""Called after every step with its number and its numbers."""


def train_rar(config: Config, job: RARJob, on_step: OnStep | None = None) -> dict[str, Any]:
    """Reinforce the generator; resumes from the latest checkpoint below `job.directory`.

    A learner that dies costs a rebuilt learner group, and the updates since the last checkpoint once more from the same
    rollouts.

    Args:
        on_step: called after every step.

    Returns:
        Held-out reward before, after and gained with intervals, and means over the last steps.

    Raises:
        CatalogueError: no query can be used.
        ConfigError: `rar.rollout.engine` is not installed.
        RewardServiceError, WeightSyncError: see `rar.reward` and `rar.rollout`.
        LearnerLostError: learners died more often than they are replaced.
        RuntimeError: log-probabilities of sampler and learner differ by more than `rar.rollout_logprob_diff_limit`.
    """
    trainer = RARTrainer(config, job)
    try:
        return trainer.run(on_step)
    finally:
        trainer.close()


class RARTrainer:
    """Owns learners, rollout pool and reward pool of one RAR; `close` releases them."""

    def __init__(self, config: Config, job: RARJob) -> None:
        self._config, self._rar, self._job = config, config.rar, job
        self._engine = engine_class(config.rar.rollout)
        catalogue = job.catalogue.open()
        galleries = {
            "train": load_embeddings(job.gallery),
            "heldout": load_embeddings(job.heldout_gallery),
        }
        task = self._rar.task
        sides = {"train": task.query, "heldout": task.heldout_query}
        self.prompts = {
            name: usable_rows(catalogue, job.generator, sides[name], galleries[name][0]) for name in galleries
        }
        # Which of the catalogue's attribute names survive is logged; completions may have others.
        self._names = common_names(
            (normalise_attributes(catalogue.item(row).attributes) for row in self.prompts["train"][0].tolist()),
            most=_NAMES,
        )
        self._policy = PolicySpec(
            start=job.generator.path,
            generator=job.generator.config,
            adapter=self._rar.adapter,
            catalogue=job.catalogue,
            temperature=self._rar.rollout.temperature,
            with_reference=self._rar.kl_coef > 0,
            seed=config.run.seed,
        )
        self._rewards_spec = RewardSpec(
            encoder=job.encoder,
            catalogue=job.catalogue,
            queries=sides,
            galleries={
                name: Gallery.put(catalogue, rows, embeddings, parts=parts_of(self._rar.reward))
                for name, (rows, embeddings) in galleries.items()
            },
            version=job.gallery_version,
        )
        self._checkpoints = Checkpoints(storage.join(job.directory, "checkpoints"))
        self._learners: FaultTolerantLearnerGroup | None = None
        self._rollouts: RolloutPool | None = None
        self._rewards: RewardPool | None = None
        self._service_log = ServiceLog()
        self._ahead = RolloutPrefetcher(self._collect, lag=self._rar.max_staleness, steps=self._rar.steps)
        self._tail: list[dict[str, float]] = []
        self.step = 0
        """Steps done."""

    def run(self, on_step: OnStep | None = None) -> dict[str, Any]:
        """From the last checkpoint, or from the start, to the last step; see `train_rar`."""
        self.begin()
        steps = tqdm(range(self.step, self._rar.steps), desc=self._job.name, initial=self.step, total=self._rar.steps)
        for step in steps:
            values = self.train_step()
            if on_step is not None:
                on_step(step, values)
        return self.finish()

    def begin(self) -> None:
        """Start actors and learners, and go to where the last checkpoint was taken."""
        # Unique, since another run, or the actors of a killed one, may still hold the plain name.
        name = f"{self._config.run.name}-{self._job.name}-{uuid.uuid4().hex[:8]}"
        self._learners = FaultTolerantLearnerGroup(self._rar, self._policy, self._checkpoints)
        self._rewards = RewardPool(self._rewards_spec, self._rar.reward, name=name)
        self._rollouts = RolloutPool(self._policy, self._rar.rollout, self._engine)
        self._collector = Collector(self._rollouts, self._rewards)
        manifest = {"next": None, **(self._checkpoints.latest() or {"step": 0, "tail": []})}
        self.step, self._tail = int(manifest["step"]), manifest["tail"]
        self._learners.restore(self.step)
        self._sync()
        self._rewards.wait_until_ready()
        self._before = self._heldout_before()
        if manifest["next"] is not None:
            found = RolloutBatch.from_dict(manifest["next"], max_attributes=self._policy.generator.max_attributes)
            self._ahead.put(found)
        folder = storage.join(self._job.directory, "log")
        self._metrics = MetricsLog(folder, resume_step=self.step, training=self._job.name)

    def train_step(self) -> dict[str, float]:
        """One step: rollouts, rewards, update, weights to the rollout actors; returns its numbers."""
        assert self._learners is not None
        assert self._rollouts is not None
        assert self._rewards is not None
        rar, step = self._rar, self.step
        seconds: dict[str, float] = {}
        with timed(seconds, "wait"):
            found = self._ahead.take(step)
        advantages = group_advantages(
            torch.from_numpy(found.rewards),
            scale=rar.scale_rewards,
            eps=rar.advantage_eps,
            baseline=rar.grpo.baseline,
        ).numpy()
        columns = batch_columns(
            found.groups,
            advantages,
            found.rewards,
            loss_aggregation=rar.grpo.loss_aggregation,
            max_tokens=self._policy.generator.max_new_tokens,
            mask_truncated_completions=rar.grpo.mask_truncated_completions,
        )
        with timed(seconds, "learn"):
            stats = self._learners.update(columns)
        self._check_gap(step, found, stats["rollout_logprob_diff"])
        # Rollout actors must not change weights amid their rollouts.
        with timed(seconds, "wait_ahead"):
            self._ahead.wait()
        with timed(seconds, "sync"):
            self._sync()
        self.step += 1
        values = {
            **numbers_of(found, self._names),
            **self._service_log.step(self._rewards),
            **stats,
            "staleness": float(step - found.groups[0].version),
            "learner_restarts": float(self._learners.restarts),
            **{f"seconds_{name}": value for name, value in seconds.items()},
        }
        self._metrics.log(step, values)
        self._tail = [*self._tail, values][-_TAIL:]
        if self.step % rar.checkpoint_every == 0 or self.step == rar.steps:
            self.save()
        return values

    def save(self) -> None:
        """Write a checkpoint from which everything goes on as it would have."""
        assert self._learners is not None
        self._metrics.flush()
        following = self._ahead.wait()
        self._learners.save(self.step, {"tail": self._tail, "next": following and following.as_dict()})

    def finish(self) -> dict[str, Any]:
        """Write the policy and measure it on the held-out prompts; see `train_rar` for what is returned."""
        assert self._learners is not None
        assert self._rollouts is not None
        self._metrics.close()
        job = self._job
        self._learners.save_model(storage.join(job.directory, "model"))
        settings = generator_settings(job.generator.config, catalogue=job.catalogue.fingerprint, upstream=job.upstream)
        settings.write(storage.join(job.directory, "model"))
        names = ("reward_mean", "invalid_fraction")
        return {
            **compare(self._before, self._heldout(), seed=self._config.run.seed),
            **{name: float(np.mean([values[name] for values in self._tail])) for name in names},
            "prompts": len(self.prompts["train"][0]),
            "dropped_prompts": self.prompts["train"][1],
            "rollout_restarts": self._rollouts.restarts,
        }

    def close(self) -> None:
        """Release actors and learners; nothing of this RAR holds resources afterwards."""
        for part in (self._rollouts, self._rewards):
            if part is not None:
                part.close()
        self._ahead.close()
        if self._learners is not None:
            self._learners.shutdown()

    def _sync(self) -> None:
        """Weights of the learners to the rollout actors, exported again where the learner that held them died."""
        assert self._learners is not None
        assert self._rollouts is not None
        while True:
            try:
                return self._rollouts.push(self._learners.weights())
            except WeightsLostError as error:
                log.warning("%s; exporting them again", error)

    def _collect(self, step: int) -> RolloutBatch:
        return self._collector.collect_step(
            self.prompts["train"][0],
            step,
            count=self._rar.prompts_per_step,
            seed=self._config.run.seed,
            ask=self._ask("train", self._rar.group_size),
            dynamic_sampling_rounds=self._rar.dynamic_sampling_rounds,
        )

    def _ask(self, gallery: str, group_size: int) -> RolloutRequest:
        return RolloutRequest(gallery, group_size, self._policy.generator.max_attributes, self._rar.reward.invalid)

    def _check_gap(self, step: int, found: RolloutBatch, gap: float) -> None:
        """Raises RuntimeError where rollouts are fresh and yet the learner's log-probabilities are others."""
        fresh = all(group.version == step for group in found.groups)
        if fresh and gap > self._rar.rollout_logprob_diff_limit:
            raise RuntimeError(
                f"step {step}: sampler and learner differ by {gap:.4f} nats per token on fresh rollouts, more "
                f"than rar.rollout_logprob_diff_limit {self._rar.rollout_logprob_diff_limit:g}; "
                "the policies are not the same"
            )

    def _heldout_before(self) -> HeldOut:
        """Held-out rewards of the round's start, kept beside the checkpoints, since a resumed policy has moved on."""
        path = storage.join(self._job.directory, "heldout_before.json")
        if self.step == 0 or not storage.exists(path):
            storage.write_json(path, self._heldout().as_dict())
        return HeldOut(**storage.read_json(path))

    def _heldout(self) -> HeldOut:
        """Sample and score the held-out prompts, with the same seeds before and after."""
        rows, samples = self.prompts["heldout"][0], self._rar.heldout_samples
        seeds = group_seeds(self._config.run.seed, -1, len(rows))
        found = self._collector.collect(rows.tolist(), seeds, self._ask("heldout", samples))
        return summarise(found.rewards.reshape(-1), found.parsed, group_size=samples)


def numbers_of(found: RolloutBatch, names: Sequence[str] = ()) -> dict[str, float]:
    """Of the rollouts and rewards of a step; `names` = attribute names whose shares are wanted."""
    valid = [attributes for attributes in found.parsed if not isinstance(attributes, InvalidAttributes)]
    complete = ~np.isnan(found.rewards).any(1)
    return {
        "reward_mean": float(np.nanmean(found.rewards)),
        "reward_failed_fraction": float(np.isnan(found.rewards).mean()),
        "invalid_fraction": 1 - len(valid) / len(found.parsed),
        "zero_variance_fraction": float(found.zero_variance()[complete].mean()) if complete.any() else 1.0,
        "attribute_pairs": float(np.mean([len(attributes) for attributes in valid])) if valid else 0.0,
        "attribute_words": mean_words(valid),
        "completion_tokens": float(np.mean([group.mask.sum(1).mean() for group in found.groups])),
        **{f"{NAME_SHARE}{name}": share for name, share in name_shares(valid, names).items()},
        **found.numbers,
    }


def mean_words(valid: Sequence[Attributes]) -> float:
    """Mean words of attribute texts, 0 where there are none."""
    return float(np.mean([len(format_attributes(attributes).split()) for attributes in valid])) if valid else 0.0


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block took."""
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
