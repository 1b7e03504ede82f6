"""What a reward service holds and is asked for, as plain data that travels between processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.train import RewardConfig
from afmrl_ray.retrieval.embed import EncoderRef

Query = tuple[int, str]
"""Catalogue row of the query, and the attribute text that it is shown with."""

KINDS = ("hit", "recall", "reciprocal_rank", "ndcg")
"""Columns of every reply; which one is the reward is `rar.reward.kind`."""


@dataclass(frozen=True)
class Gallery:
    """What is searched, in the object store: references in lists, so that they travel as references.

    Attributes:
        rows: reference to [N] catalogue rows, ascending by item id.
        parts: references to the embeddings [n, D] of `np.array_split` of the rows, float32.
    """

    rows: list[Any]
    parts: list[Any]

    @classmethod
    def put(cls, catalogue: StagedCatalogue, rows: np.ndarray, embeddings: np.ndarray, *, parts: int = 1) -> Gallery:
        """Put a gallery into the object store, in the order of item ids, in which it is searched fastest.

        Args:
            catalogue: the rows' catalogue.
            rows: [N] catalogue rows, in any order.
            embeddings: [N, D] float32.
            parts: see `parts_of`.
        """
        items = catalogue.column("item_id")
        order = np.array(sorted(range(len(rows)), key=lambda place: items[rows[place]]))
        put = [ray.put(np.ascontiguousarray(part)) for part in np.array_split(embeddings[order], parts)]
        return cls([ray.put(rows[order])], put)


def parts_of(config: RewardConfig) -> int:
    """Parts that a gallery is put in: one for all actors, or one for each."""
    return config.pool.num_workers if config.gallery_placement == "sharded" else 1


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
    queries: dict[str, ItemSelector]
    galleries: dict[str, Gallery]
    version: str


@dataclass(frozen=True)
class Reply:
    """What an actor answers.

    Attributes:
        version: of the gallery that was searched.
        measures: [Q, len(KINDS)] float64.
    """

    version: str
    measures: np.ndarray


@dataclass(frozen=True)
class Scores:
    """What a client gets for Q queries, NaN where the service failed.

    Attributes:
        rewards: [Q] float64, of `rar.reward.kind`.
        measures: [Q] float64 of each of `KINDS`.
    """

    rewards: np.ndarray
    measures: dict[str, np.ndarray]

    def means(self) -> dict[str, float]:
        """`reward_<kind>`, the mean of each measure over the queries that were scored; none if none was."""
        known = ~np.isnan(self.rewards)
        if not known.any():
            return {}
        return {f"reward_{kind}": float(values[known].mean()) for kind, values in self.measures.items()}
