"""Retrieval-aware attribute reinforcement: the driver of rollouts, rewards and learners.

Prompts and seeds of a step are functions of the run's seed and the step; rollouts are functions of weights, prompts and
seeds. So a run that is resumed from a checkpoint goes on exactly as it would have.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray.exceptions import RayError
from tqdm.auto import tqdm

from afmrl_ray import storage
from afmrl_ray.attributes.text import Attributes, InvalidAttributes, format_attributes
from afmrl_ray.catalogue import CatalogueRef
from afmrl_ray.config import Config
from afmrl_ray.errors import UserError
from afmrl_ray.models.annotate import GeneratorRef
from afmrl_ray.rar.checkpoint import Checkpoints
from afmrl_ray.rar.completions import parse_completions, reward_completions
from afmrl_ray.rar.heldout import HeldOut, compare, summarise
from afmrl_ray.rar.learner import build_learners, learner_batch
from afmrl_ray.rar.loss import group_advantages
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.rar.prompts import batch_columns, group_seeds, prompts_of_step, usable_rows
from afmrl_ray.rar.reward import RewardPool
from afmrl_ray.rar.reward_log import ServiceLog
from afmrl_ray.rar.reward_spec import Gallery, Query, RewardSpec, parts_of
from afmrl_ray.rar.rollout import Group, RolloutPool, Weights
from afmrl_ray.retrieval.embed import EncoderRef, load_embeddings
from afmrl_ray.training.metrics_log import MetricsLog

log = logging.getLogger(__name__)

_LEARNER_RESTARTS = 3
_TAIL = 10


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
    """

    generator: GeneratorRef
    encoder: EncoderRef
    catalogue: CatalogueRef
    gallery: str
    heldout_gallery: str
    gallery_version: str
    directory: str
    name: str


def train_rar(config: Config, job: RARJob) -> dict[str, Any]:
    """Reinforce the generator; resumes from the latest checkpoint below `job.directory`.

    A learner that dies costs a rebuilt learner group and the steps since the last checkpoint.

    Returns:
        Held-out reward before, after and gained with intervals, and means over the last steps.

    Raises:
        CatalogueError: no query can be used.
        RewardServiceError, WeightSyncError: see `rar.reward` and `rar.rollout`.
        RuntimeError: the sampler's and the learner's log-probabilities differ by more than `rar.logprob_gap_limit`.
    """
    for restart in range(_LEARNER_RESTARTS + 1):
        trainer = RARTrainer(config, job)
        try:
            return trainer.run()
        except LearnerLostError as error:
            if restart == _LEARNER_RESTARTS:
                raise
            log.warning("%s; rebuilding the learners from the last checkpoint", error)
        finally:
            trainer.close()
    raise AssertionError("unreachable")


class LearnerLostError(RuntimeError):
    """A learner died in an update."""


class RARTrainer:
    """Owns learners, rollout pool and reward pool of one RAR; `close` releases them."""

    def __init__(self, config: Config, job: RARJob) -> None:
        self._config, self._rar, self._job = config, config.rar, job
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
        self._learners: Any = None
        self._rollouts: RolloutPool | None = None
        self._rewards: RewardPool | None = None
        self._service_log = ServiceLog()

    def run(self) -> dict[str, Any]:
        """From the last checkpoint, or from the start, to the last step."""
        rar = self._rar
        self._learners = build_learners(rar, self._policy)
        # Unique, since another run, or the actors of a killed one, may still hold the plain name.
        name = f"{self._config.run.name}-{self._job.name}-{uuid.uuid4().hex[:8]}"
        self._rewards = RewardPool(self._rewards_spec, rar.reward, name=name)
        self._rollouts = RolloutPool(self._policy, rar.rollout)
        start, tail = self._restore()
        self._push()
        self._rewards.wait_until_ready()
        before = self._before(start)
        metrics = MetricsLog(storage.join(self._job.directory, "log"), resume_step=start)
        for step in tqdm(range(start, rar.steps), desc=self._job.name, initial=start, total=rar.steps, mininterval=5):
            values = self._step(step)
            metrics.log(step, values)
            tail = [*tail, values][-_TAIL:]
            if (step + 1) % rar.checkpoint_every == 0 or step + 1 == rar.steps:
                metrics.flush()
                self._save(step + 1, tail)
        metrics.close()
        model = storage.join(self._job.directory, "model")
        self._on_learners(lambda learner: learner.save_model(model))
        after = self._heldout()
        return {
            **compare(before, after, seed=self._config.run.seed),
            **{name: float(np.mean([values[name] for values in tail])) for name in ("reward_mean", "invalid_share")},
            "prompts": len(self.prompts["train"][0]),
            "dropped_prompts": self.prompts["train"][1],
            "rollout_restarts": self._rollouts.restarts,
        }

    def close(self) -> None:
        """Release actors and learners; nothing of this RAR holds resources afterwards."""
        for pool in (self._rollouts, self._rewards):
            if pool is not None:
                pool.close()
        if self._learners is not None:
            self._learners.shutdown()

    def _restore(self) -> tuple[int, list[dict[str, float]]]:
        """Load the latest checkpoint; returns the next step and the numbers of the last ones done."""
        manifest = self._checkpoints.latest()
        if manifest is None:
            return 0, []
        step = int(manifest["step"])
        path = self._checkpoints.engine_path(step)
        self._on_learners(lambda learner: learner.load_engine(path, step))
        return step, manifest["tail"]

    def _save(self, step: int, tail: list[dict[str, float]]) -> None:
        path = self._checkpoints.engine_path(step)
        self._on_learners(lambda learner: learner.save_engine(path))
        self._checkpoints.commit(step, {"tail": tail})

    def _on_learners(self, function: Any) -> list[Any]:
        """Call a function on every learner and return what they gave.

        The function is pickled with what it closes over: with `self` the learners would get a learner group of their
        own, and hang on its shutdown.

        Raises:
            LearnerLostError: one is gone.
        """
        results = self._learners.foreach_learner(function)
        failed = [result.get() for result in results if not result.ok]
        for error in failed:
            if isinstance(error, UserError):
                raise error
        if failed or not list(results):
            raise LearnerLostError(f"a learner failed: {failed[0] if failed else 'none is left'}")
        return [result.get() for result in results]

    def _push(self) -> float:
        """Give all rollout actors the learners' weights; returns the seconds it took."""
        assert self._rollouts is not None
        began = time.monotonic()
        exported = [found for found in self._on_learners(lambda learner: learner.export_weights()) if found]
        self._rollouts.push(Weights(*exported[0]))
        return time.monotonic() - began

    def _step(self, step: int) -> dict[str, float]:
        rar = self._rar
        assert self._rollouts is not None
        assert self._rewards is not None
        seconds: dict[str, float] = {}
        rows = prompts_of_step(self.prompts["train"][0], step, rar.prompts_per_step, self._config.run.seed)
        with timed(seconds, "rollout"):
            seeds = group_seeds(self._config.run.seed, step, len(rows))
            groups = self._rollouts.sample(rows.tolist(), seeds, group_size=rar.group_size)
        with timed(seconds, "reward"):
            rewards, parsed, measures = self._reward("train", groups)
        grouped = rewards.reshape(len(groups), rar.group_size)
        advantages = group_advantages(
            torch.from_numpy(grouped), scale=rar.advantage_scale, eps=rar.advantage_eps
        ).numpy()
        with timed(seconds, "learn"):
            stats = self._update(groups, advantages, ~np.isnan(grouped))
        if stats["logprob_gap"] > rar.logprob_gap_limit:
            raise RuntimeError(
                f"step {step}: sampler and learner differ by {stats['logprob_gap']:.4f} nats per token on fresh "
                f"rollouts, more than rar.logprob_gap_limit {rar.logprob_gap_limit:g}; the policies are not the same"
            )
        seconds["sync"] = self._push()
        valid = [attributes for attributes in parsed if not isinstance(attributes, InvalidAttributes)]
        known = grouped[~np.isnan(grouped).any(1)]
        return {
            "reward_mean": float(np.nanmean(rewards)),
            "reward_failed_share": float(np.isnan(rewards).mean()),
            "invalid_share": 1 - len(valid) / len(parsed),
            "zero_variance_share": float((np.ptp(known, axis=1) == 0).mean()) if len(known) else 1.0,
            "attribute_pairs": float(np.mean([len(attributes) for attributes in valid])) if valid else 0.0,
            "attribute_words": mean_words(valid),
            "completion_tokens": float(np.mean([mask.sum(1).mean() for mask in (group.mask for group in groups)])),
            **measures,
            **self._service_log.step(self._rewards),
            **stats,
            **{f"seconds_{name}": value for name, value in seconds.items()},
        }

    def _reward(self, gallery: str, groups: list[Group]) -> tuple[np.ndarray, list[Any], dict[str, float]]:
        """Rewards [groups * G] of all completions, what the parser made of them, and means of all measures."""
        assert self._rewards is not None
        pool, measures = self._rewards, dict[str, float]()

        def score(queries: Sequence[Query]) -> np.ndarray:
            scores = pool.submit(gallery, queries).result()
            measures.update(scores.means())
            return scores.rewards

        rows = [group.row for group in groups for _ in group.texts]
        texts = [text for group in groups for text in group.texts]
        parsed = parse_completions(texts, max_attributes=self._policy.generator.max_attributes)
        rewards = reward_completions(rows, parsed, score, invalid=self._rar.reward.invalid)
        return rewards, parsed, measures

    def _update(self, groups: list[Group], advantages: np.ndarray, known: np.ndarray) -> dict[str, float]:
        """One optimizer step of all learners on all groups."""
        try:
            self._learners.update(batch=learner_batch(batch_columns(groups, advantages, known)))
        except RayError as error:
            raise LearnerLostError(f"a learner died in an update ({type(error).__name__})") from error
        return self._on_learners(lambda learner: learner.stats)[0]

    def _before(self, start: int) -> HeldOut:
        """Held-out rewards of the round's start, kept beside the checkpoints, since a resumed policy has moved on."""
        path = storage.join(self._job.directory, "heldout_before.json")
        if start == 0 or not storage.exists(path):
            storage.write_json(path, self._heldout().as_dict())
        return HeldOut(**storage.read_json(path))

    def _heldout(self) -> HeldOut:
        """Sample and score the held-out prompts, with the same seeds before and after."""
        assert self._rollouts is not None
        rows, samples = self.prompts["heldout"][0], self._rar.heldout_samples
        seeds = group_seeds(self._config.run.seed, -1, len(rows))
        groups = self._rollouts.sample(rows.tolist(), seeds, group_size=samples)
        rewards, parsed, _ = self._reward("heldout", groups)
        return summarise(rewards, parsed, group_size=samples)


def mean_words(valid: Sequence[Attributes]) -> float:
    """Mean words of attribute texts, 0 where there are none."""
    return float(np.mean([len(format_attributes(attributes).split()) for attributes in valid])) if valid else 0.0


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block took."""
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
