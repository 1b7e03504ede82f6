"""Exact ranks in a gallery whose items are spread over several shards: each shard counts among its own items, and the
counts add up.

Two passes: the shards that hold positives return their scores, then every shard counts how many of its items rank
before each of them. Every score comes from a product of the same shape, so the sum is the rank in the whole gallery,
ties included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from afmrl_ray.retrieval.ranking import Ranking, own_columns, positive_columns
from afmrl_ray.retrieval.scores import count_before, for_each_row

QUERY_TILE = 32
"""Queries of one product; a reward request has few."""


@dataclass(frozen=True)
class Positives:
    """Positives of Q queries, in one shard or in all.

    Attributes:
        offsets: [Q + 1] start of each query in the flat arrays.
        scores: flat, float32.
        orders: flat, their places in the tie order.
        candidates: [Q] number of gallery items, the query's own not counted.
    """

    offsets: np.ndarray
    scores: np.ndarray
    orders: np.ndarray
    candidates: np.ndarray


class GalleryShard:
    """Part of a gallery, prepared once and searched often.

    Args:
        embeddings: [N, D]; not copied if it is float32.
        rows: [N] catalogue rows, each in one shard.
        labels: [N] integer labels, negative for none.
        order: [N] integers, each in one shard: of equal scores the smaller ranks first.
    """

    def __init__(self, embeddings: np.ndarray, rows: np.ndarray, labels: np.ndarray, order: np.ndarray) -> None:
        self._embeddings = np.asarray(embeddings, dtype=np.float32)
        self._rows, self._labels, self._order = rows, labels, order
        self._by_row, self._by_label = np.argsort(rows), np.argsort(labels, kind="stable")

    def __len__(self) -> int:
        return len(self._rows)

    def positives(self, queries: np.ndarray, query_rows: np.ndarray, query_labels: np.ndarray) -> Positives:
        """Positives of the queries in this shard, the query's own item left out.

        Args:
            queries: [Q, D] embeddings.
            query_rows: [Q] catalogue rows.
            query_labels: [Q] integer labels, negative for none.
        """
        own = self._own(query_rows)
        offsets, columns = positive_columns(query_labels, self._labels, self._by_label, own=own)
        scores = np.empty(len(columns), dtype=np.float32)
        needed, places = np.unique(columns, return_inverse=True)

        def take(query: int, row: np.ndarray) -> None:
            span = slice(offsets[query], offsets[query + 1])
            scores[span] = row[places[span]]

        no_own = np.full(len(queries), -1)
        for_each_row(queries, self._embeddings[needed], no_own, take, query_tile=QUERY_TILE)
        return Positives(offsets, scores, self._order[columns], len(self) - (own >= 0))

    def count_before(self, queries: np.ndarray, query_rows: np.ndarray, positives: Positives) -> np.ndarray:
        """How many items of this shard rank before each positive, in the flat order of `positives`; int64.

        Args:
            queries: [Q, D] embeddings.
            query_rows: [Q] catalogue rows.
            positives: of all shards.
        """
        counts = np.zeros(len(positives.scores), dtype=np.int64)

        def count(query: int, row: np.ndarray) -> None:
            span = slice(positives.offsets[query], positives.offsets[query + 1])
            counts[span] = count_before(row, self._order, positives.scores[span], positives.orders[span])

        for_each_row(queries, self._embeddings, self._own(query_rows), count, query_tile=QUERY_TILE)
        return counts

    def _own(self, query_rows: np.ndarray) -> np.ndarray:
        return own_columns(query_rows, self._rows, self._by_row)


def merged(parts: Sequence[Positives]) -> Positives:
    """Positives of all shards, in tie order within a query."""
    query = np.concatenate([np.repeat(np.arange(len(p.offsets) - 1), np.diff(p.offsets)) for p in parts])
    orders = np.concatenate([p.orders for p in parts])
    sort = np.lexsort((orders, query))
    counts = np.sum([np.diff(p.offsets) for p in parts], axis=0)
    return Positives(
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        scores=np.concatenate([p.scores for p in parts])[sort],
        orders=orders[sort],
        candidates=np.sum([p.candidates for p in parts], axis=0),
    )


def ranking_of(query_rows: np.ndarray, positives: Positives, counts: Sequence[np.ndarray]) -> Ranking:
    """The ranking in the whole gallery, without lists of the best items.

    Args:
        query_rows: [Q] catalogue rows; queries without a positive are left out of the ranking.
        positives: of all shards.
        counts: of every shard, from `GalleryShard.count_before`.
    """
    found = np.diff(positives.offsets)
    has_positive = found > 0
    query = np.repeat(np.arange(len(found)), found)
    ranks = np.sum(counts, axis=0)
    empty = np.empty((int(has_positive.sum()), 0))
    return Ranking(
        query_rows=query_rows[has_positive],
        excluded=int((~has_positive).sum()),
        positives=found[has_positive],
        candidates=positives.candidates[has_positive],
        ranks=ranks[np.lexsort((ranks, query))],
        offsets=np.concatenate([[0], np.cumsum(found[has_positive])]),
        top_rows=empty.astype(np.int64),
        top_scores=empty.astype(np.float32),
        top_right=empty.astype(bool),
    )
