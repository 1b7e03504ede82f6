"""Retrieval as a reward: frozen encoder and galleries behind named Ray actors.

Only the parser gives `rar.reward.invalid`. What fails for reasons of infrastructure is NaN: not a bad answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError

from afmrl_ray.attributes.text import Attributes, InvalidAttributes, format_attributes, parse_attributes
from afmrl_ray.catalogue import CatalogueRef
from afmrl_ray.config.catalogue import SideConfig
from afmrl_ray.config.train import RewardConfig
from afmrl_ray.errors import RewardServiceError
from afmrl_ray.retrieval import metrics
from afmrl_ray.retrieval.embed import Encoder, EncoderRef
from afmrl_ray.retrieval.evaluate import label_codes
from afmrl_ray.retrieval.ranking import rank_gallery
from afmrl_ray.training.cluster import torch_threads

log = logging.getLogger(__name__)

Query = tuple[int, str]
"""Catalogue row of the query, and the attribute text that it is shown with."""


@dataclass(frozen=True)
class Gallery:
    """What is searched.

    Attributes:
        rows: [N] catalogue rows.
        embeddings: reference to [N, D] float32 in the object store, in a list, so that actors map it without a copy.
    """

    rows: np.ndarray
    embeddings: list[Any]


@dataclass(frozen=True)
class RewardSpec:
    """The service as plain data.

    Attributes:
        encoder: the frozen encoder.
        catalogue: the catalogue.
        queries: what of a query the encoder sees, by gallery name.
        galleries: by name.
        version: of the galleries; every reply carries it.
    """

    encoder: EncoderRef
    catalogue: CatalogueRef
    queries: dict[str, SideConfig]
    galleries: dict[str, Gallery]
    version: str


class Scorer:
    """Scores enriched queries; plain code inside the actor."""

    def __init__(self, spec: RewardSpec, config: RewardConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self._spec, self._config = spec, config
        self._encoder = Encoder(spec.encoder, spec.catalogue)
        catalogue = spec.catalogue.open()
        self._labels = np.array(label_codes(catalogue.column("product_id")))
        items = np.array(catalogue.column("item_id"), dtype=object)
        self._order = np.argsort(np.argsort(items, kind="stable"))
        self._embeddings = {name: ray.get(gallery.embeddings[0]) for name, gallery in spec.galleries.items()}

    def score(self, gallery: str, queries: Sequence[Query]) -> tuple[str, list[float]]:
        """Version of the galleries, and hit@k or recall@k of every query.

        Raises:
            ValueError: a query has no positive in the gallery.
        """
        rows = np.array([row for row, _ in queries])
        side, there = self._spec.queries[gallery], self._spec.galleries[gallery].rows
        embedded = self._encoder.embed(
            rows.tolist(), [text for _, text in queries], inputs=side.inputs, title_columns=side.title_columns
        )
        ranking = rank_gallery(
            embedded,
            self._embeddings[gallery],
            query_rows=rows,
            gallery_rows=there,
            query_labels=self._labels[rows],
            gallery_labels=self._labels[there],
            gallery_order=self._order[there],
            depth=1,
        )
        if ranking.excluded:
            raise ValueError(f"{ranking.excluded} queries have no positive in gallery {gallery!r}")
        measure = metrics.hit_at_k if self._config.kind == "hit" else metrics.recall_at_k
        return self._spec.version, measure(ranking, self._config.k).tolist()


class RewardPool:
    """Named, restartable reward actors and the client that spreads calls over them.

    Args:
        spec: encoder and galleries.
        config: `rar.reward`.
        name: prefix of the actors' names.
    """

    def __init__(self, spec: RewardSpec, config: RewardConfig, *, name: str) -> None:
        self._spec, self._config = spec, config
        pool = config.pool
        made = ray.remote(
            num_cpus=pool.cpus_per_worker, num_gpus=pool.gpus_per_worker, max_restarts=-1, max_task_retries=0
        )(Scorer)
        self._threads = ThreadPoolExecutor(2 * pool.num_workers, thread_name_prefix="reward")
        self.actors = [
            made.options(name=f"{name}-reward-{index}").remote(spec, config, torch_threads(pool.cpus_per_worker))
            for index in range(pool.num_workers)
        ]

    def submit(self, gallery: str, queries: Sequence[Query]) -> Future[np.ndarray]:
        """`score` in the background."""
        return self._threads.submit(self.score, gallery, list(queries))

    def score(self, gallery: str, queries: Sequence[Query]) -> np.ndarray:
        """Reward of every query, in order; equal queries are scored once.

        Returns:
            [len(queries)] float64; NaN where the service failed.

        Raises:
            RewardServiceError: more than `max_failed_share` failed.
        """
        unique = list(dict.fromkeys(queries))
        size = self._config.pool.batch_size
        chunks = [unique[start : start + size] for start in range(0, len(unique), size)]
        found: dict[Query, float] = {}
        todo = [(index, chunk) for index, chunk in enumerate(chunks)]
        for attempt in range(self._config.max_retries + 1):
            todo = self._round(gallery, todo, attempt, found)
            if not todo:
                break
        failed = sum(query not in found for query in queries)
        if failed > self._config.max_failed_share * len(queries):
            raise RewardServiceError(
                f"{failed} of {len(queries)} rewards failed after {self._config.max_retries} retries, more than "
                f"rar.reward.max_failed_share {self._config.max_failed_share:g} allows; look at the reward actors' logs"
            )
        return np.array([found.get(query, math.nan) for query in queries])

    def _round(
        self, gallery: str, todo: list[tuple[int, list[Query]]], attempt: int, found: dict[Query, float]
    ) -> list[tuple[int, list[Query]]]:
        """Ask for all chunks, each from the next actor than last time; returns those that failed."""
        calls = []
        for index, chunk in todo:
            actor = (index + attempt) % len(self.actors)
            calls.append((index, chunk, actor, self.actors[actor].score.remote(gallery, chunk)))
        failed = []
        for index, chunk, actor, call in calls:
            try:
                version, scores = ray.get(call, timeout=self._config.timeout_s)
            except RayError as error:
                if isinstance(error, ValueError):
                    raise  # the catalogue's fault, and trying again would not mend it
                log.warning("reward actor %d failed (%s), attempt %d", actor, type(error).__name__, attempt + 1)
                if isinstance(error, GetTimeoutError):
                    ray.cancel(call, recursive=False)
                failed.append((index, chunk))
                continue
            if version != self._spec.version:
                raise RewardServiceError(f"reward actor {actor} searched gallery {version}, not {self._spec.version}")
            found.update(zip(chunk, scores, strict=True))
        return failed

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for actor in self.actors:
            ray.kill(actor)


def parse_completions(
    texts: Sequence[tuple[str, bool]], *, max_attributes: int
) -> list[Attributes | InvalidAttributes]:
    """What the strict parser makes of completions (text, whether it ended by itself)."""
    return [parse_attributes(text, max_attributes=max_attributes, complete=complete) for text, complete in texts]


def reward_completions(
    rows: Sequence[int],
    parsed: Sequence[Attributes | InvalidAttributes],
    score: Callable[[Sequence[Query]], np.ndarray],
    *,
    invalid: float,
) -> np.ndarray:
    """Rewards of completions: `invalid` where the parser refused, else what the retrieval of the enriched query gives.

    Args:
        rows: catalogue row of each completion's prompt.
        parsed: what the parser made of each completion.
        score: scores queries (row, attribute text); refused completions never reach it.

    Returns:
        [len(rows)] float64, NaN where scoring failed.
    """
    rewards = np.full(len(rows), invalid, dtype=np.float64)
    valid = [index for index, attributes in enumerate(parsed) if not isinstance(attributes, InvalidAttributes)]
    if valid:
        rewards[valid] = score([(rows[index], format_attributes(parsed[index])) for index in valid])  # type: ignore[arg-type]
    return rewards
