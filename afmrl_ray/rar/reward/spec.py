"""Plain data of the reward service, which travels between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.rar import RewardConfig
from afmrl_ray.retrieval.embed import EncoderRef

Query = tuple[int, str]
"""Catalogue row of a query item, and the attribute text that is added to it."""

METRICS = ("hit_1", "hit", "recall", "reciprocal_rank", "ndcg", "log_softmax")
"""Retrieval metrics of a query, the columns of every reply; `rar.reward.kind` says which one is the reward. `hit_1` is
hit@1, whatever `rar.reward.k`."""


@dataclass(frozen=True)
class Gallery:
    """A gallery in the object store. References are wrapped in lists, so that they travel as references.

    Attributes:
        rows: reference to [N] catalogue rows, ascending by item id.
        parts: references to the embeddings [n, D], float32, of the parts that `np.array_split` makes of the rows.
    """

    rows: list[Any]
    parts: list[Any]

    @classmethod
    def put(cls, catalogue: StagedCatalogue, rows: np.ndarray, embeddings: np.ndarray, *, parts: int = 1) -> Gallery:
        """Sort a gallery by item id, the order that is searched fastest, and put it into the object store.

        Args:
            catalogue: catalogue of the rows.
            rows: [N] catalogue rows, in any order.
            embeddings: [N, D] float32.
            parts: see `num_parts`.
        """
        items = catalogue.column("item_id")
        order = np.array(sorted(range(len(rows)), key=lambda place: items[rows[place]]))
        put = [ray.put(np.ascontiguousarray(part)) for part in np.array_split(embeddings[order], parts)]
        return cls([ray.put(rows[order])], put)


def num_parts(config: RewardConfig) -> int:
    """Parts of a gallery: one per actor when galleries are sharded, else one that all actors share."""
    return config.pool.num_workers if config.gallery_placement == "sharded" else 1


@dataclass(frozen=True)
class RewardSpec:
    """What the service needs to score queries.

    Attributes:
        encoder: the frozen encoder.
        catalogue: the catalogue.
        queries: which inputs of a query item the encoder gets, by gallery name.
        galleries: by name.
        version: version of the galleries; every reply carries it.
        left_out: by gallery name, catalogue rows of the items that are left out for a query, by the query's row.
    """

    encoder: EncoderRef
    catalogue: CatalogueRef
    queries: dict[str, ItemSelector]
    galleries: dict[str, Gallery]
    version: str
    left_out: Mapping[str, Mapping[int, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """Reply of an actor to a request of Q queries.

    Attributes:
        version: version of the gallery that was searched.
        metrics: [Q, len(METRICS)] float64.
    """

    version: str
    metrics: np.ndarray


@dataclass(frozen=True)
class Scores:
    """Scores of Q queries, NaN where the service failed.

    Attributes:
        rewards: [Q] float64, the metric of `rar.reward.kind`.
        metrics: [Q] float64 for each of `METRICS`.
    """

    rewards: np.ndarray
    metrics: dict[str, np.ndarray]

    def means(self) -> dict[str, float]:
        """`reward/<metric>`: mean of each metric over the queries that were scored; empty if none was."""
        known = ~np.isnan(self.rewards)
        if not known.any():
            return {}
        return {f"reward/{name}": float(values[known].mean()) for name, values in self.metrics.items()}
