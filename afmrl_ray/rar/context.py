"""Everything that a RAR runs on: prompts, galleries, learners, actors and logs, opened and closed together."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.attributes.quality import common_names
from afmrl_ray.attributes.text import normalise_attributes
from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue
from afmrl_ray.config import Config
from afmrl_ray.models.annotate import GeneratorRef
from afmrl_ray.rar.checkpoint import Checkpoints
from afmrl_ray.rar.duplicates import known_duplicates
from afmrl_ray.rar.engine import engine_class
from afmrl_ray.rar.learner_group import FaultTolerantLearnerGroup
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.rar.prefetch import RolloutPrefetcher
from afmrl_ray.rar.prompts import UsablePrompts, usable_prompts
from afmrl_ray.rar.reward.client import RewardPool
from afmrl_ray.rar.reward.spec import Gallery, RewardSpec, num_parts
from afmrl_ray.rar.rollout import RolloutPool
from afmrl_ray.rar.rollout_batch import Collector, RolloutRequest
from afmrl_ray.retrieval.embed import EncoderRef, load_embeddings
from afmrl_ray.retrieval.evaluate import label_codes
from afmrl_ray.training.metrics_log import MetricsLog

_LOGGED_NAMES = 12
"""Attribute names whose fraction of completions is logged: the most frequent ones of the catalogue."""


@dataclass(frozen=True)
class RARJob:
    """Inputs of a RAR.

    Attributes:
        generator: the policy at the round's start.
        encoder: the frozen encoder.
        catalogue: the catalogue.
        gallery: file of `save_embeddings` that training queries search.
        heldout_gallery: the same for held-out queries.
        gallery_version: version of both; every reply of the reward service is checked against it.
        directory: attempt directory; the policy is written to `<directory>/model`.
        name: name of the stage, part of the reward actors' names.
        heldout_truth: true attribute texts of held-out queries by catalogue row, for `eval/leverage`; may lack some.
    """

    generator: GeneratorRef
    encoder: EncoderRef
    catalogue: CatalogueRef
    gallery: str
    heldout_gallery: str
    gallery_version: str
    directory: str
    name: str
    heldout_truth: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RARContext:
    """The open parts of a RAR, see `open_context`.

    Attributes:
        config: the run's config.
        job: inputs.
        policy: the policy as plain data.
        prompts: usable prompts, `train` and `heldout`.
        attribute_names: attribute names whose fraction of completions is logged.
        manifest: manifest of the checkpoint to resume from, that of step 0 if there is none.
        learners: the learner group.
        rollouts: rollout actors.
        rewards: reward actors.
        collector: samples and scores with both.
        prefetcher: rollouts of training steps.
        metrics: metrics of training steps.
        gallery_sizes: number of items of the galleries, `train` and `heldout`.
        left_out: known duplicates that are left out of the galleries, see `RewardSpec`.
    """

    config: Config
    job: RARJob
    policy: PolicySpec
    prompts: dict[str, UsablePrompts]
    attribute_names: list[str]
    manifest: dict[str, Any]
    learners: FaultTolerantLearnerGroup
    rollouts: RolloutPool
    rewards: RewardPool
    collector: Collector
    prefetcher: RolloutPrefetcher
    metrics: MetricsLog
    gallery_sizes: dict[str, int]
    left_out: dict[str, dict[int, np.ndarray]]

    def request(self, gallery: str, group_size: int) -> RolloutRequest:
        """How completions are sampled and scored, with `group_size` of them per prompt."""
        return _request(self.config, self.policy, gallery, group_size, items=self.gallery_sizes[gallery])


@contextmanager
def open_context(config: Config, job: RARJob) -> Iterator[RARContext]:
    """Start learners and actors; at the end, or on an error, everything is closed in reverse order.

    Raises:
        CatalogueError: no query can be used.
        ConfigError: `rar.rollout.engine` is not installed.
        LearnerLostError: learners died more often than they are replaced.
    """
    rar = config.rar
    engine = engine_class(rar.rollout)
    catalogue = job.catalogue.open()
    galleries = {"train": load_embeddings(job.gallery), "heldout": load_embeddings(job.heldout_gallery)}
    queries = {"train": rar.task.query, "heldout": rar.task.heldout_query}
    prompts = {
        name: usable_prompts(catalogue, job.generator, queries[name], rows) for name, (rows, _) in galleries.items()
    }
    rows = prompts["train"].rows
    attributes = [normalise_attributes(catalogue.item(row).attributes) for row in rows.tolist()]
    policy = _policy(config, job)
    checkpoints = Checkpoints(storage.join(job.directory, "checkpoints"))
    manifest = {"step": 0, "recent_metrics": [], "next_batch": None, "selection": None, **(checkpoints.latest() or {})}
    left_out = {name: _left_out(config, catalogue, prompts[name].rows, *galleries[name]) for name in galleries}
    reward_spec = RewardSpec(
        encoder=job.encoder,
        catalogue=job.catalogue,
        queries=queries,
        galleries={
            name: Gallery.put(catalogue, own, embeddings, parts=num_parts(rar.reward))
            for name, (own, embeddings) in galleries.items()
        },
        version=job.gallery_version,
        left_out=left_out,
    )
    # Unique, since another run, or the actors of a killed one, may still hold the plain name.
    actor_name = f"{config.run.name}-{job.name}-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        learners = FaultTolerantLearnerGroup(rar, policy, checkpoints)
        stack.callback(learners.shutdown)
        rewards = stack.enter_context(closing(RewardPool(reward_spec, rar.reward, name=actor_name)))
        rollouts = stack.enter_context(closing(RolloutPool(policy, rar.rollout, engine)))
        collector = Collector(rollouts, rewards)
        collect = partial(
            collector.collect_step,
            rows,
            count=rar.prompts_per_step,
            seed=config.run.seed,
            request=_request(config, policy, "train", rar.group_size, items=len(galleries["train"][0])),
            dynamic_sampling_rounds=rar.dynamic_sampling_rounds,
        )
        prefetcher = RolloutPrefetcher(collect, lag=rar.max_staleness, steps=rar.steps)
        log = MetricsLog(storage.join(job.directory, "log"), resume_step=manifest["step"], training=job.name)
        yield RARContext(
            config=config,
            job=job,
            policy=policy,
            prompts=prompts,
            attribute_names=common_names(attributes, most=_LOGGED_NAMES),
            manifest=manifest,
            learners=learners,
            rollouts=rollouts,
            rewards=rewards,
            collector=collector,
            prefetcher=stack.enter_context(closing(prefetcher)),
            metrics=stack.enter_context(closing(log)),
            left_out=left_out,
            gallery_sizes={name: len(own) for name, (own, _) in galleries.items()},
        )


def _left_out(
    config: Config, catalogue: StagedCatalogue, queries: np.ndarray, rows: np.ndarray, embeddings: np.ndarray
) -> dict[int, np.ndarray]:
    """Known duplicates of the queries in a gallery; none without a threshold."""
    threshold = config.rar.reward.duplicate_threshold
    if threshold is None:
        return {}
    wanted = np.union1d(queries, rows).tolist()
    return known_duplicates(
        queries.tolist(),
        rows,
        embeddings,
        labels=label_codes(catalogue.column("product_id")),
        attributes={row: normalise_attributes(catalogue.item(row).attributes) for row in wanted},
        threshold=threshold,
    )


def _policy(config: Config, job: RARJob) -> PolicySpec:
    return PolicySpec(
        start=job.generator.path,
        generator=job.generator.config,
        adapter=config.rar.adapter,
        catalogue=job.catalogue,
        temperature=config.rar.rollout.temperature,
        with_reference=config.rar.kl_coef > 0,
        seed=config.run.seed,
    )


def _request(config: Config, policy: PolicySpec, gallery: str, group_size: int, *, items: int) -> RolloutRequest:
    """How completions are sampled and scored in a gallery of so many items."""
    reward = config.rar.reward
    chance = -math.log(items) if reward.kind == "log_softmax" else None
    return RolloutRequest(gallery, group_size, policy.generator.max_attributes, reward.invalid, chance)
