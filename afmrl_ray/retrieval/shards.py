"""Exact ranks in a gallery whose rows are spread over several holders: each counts on its own rows, and counts add up.

Two rounds: the holders of positives tell their scores, then every holder counts what stands before each of them. Every
score comes from a product of the same shape, so the sum is the rank in the whole gallery, ties included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from afmrl_ray.retrieval.ranking import Ranking, own_columns, positive_columns
from afmrl_ray.retrieval.tiles import Tally, ascending_ranks, single_threaded_workers

QUERY_TILE = 32
"""Queries of a product: a service is asked for few at once."""


@dataclass(frozen=True)
class Positives:
    """Positives of Q queries, of one shard or of all.

    Attributes:
        offsets: [Q + 1] start of each query in the flat arrays.
        scores: flat, float32.
        orders: flat, their places in the tie order.
        candidates: [Q] gallery items without the query's own.
    """

    offsets: np.ndarray
    scores: np.ndarray
    orders: np.ndarray
    candidates: np.ndarray


class GalleryShard:
    """Some rows of a gallery, made ready once for being searched often.

    Args:
        embeddings: [N, D]; not copied if it is float32. Searching is fastest in tie order.
        rows: [N] catalogue rows, each once in all shards.
        labels: [N] integer labels, negative for none.
        order: [N] integers, each once in all shards: of equal scores the smaller stands first.
    """

    def __init__(self, embeddings: np.ndarray, rows: np.ndarray, labels: np.ndarray, order: np.ndarray) -> None:
        self._embeddings = np.asarray(embeddings, dtype=np.float32)
        self._columns = np.argsort(order)
        self._rows, self._labels, self._order = rows[self._columns], labels[self._columns], order[self._columns]
        self._by_row, self._by_label = np.argsort(self._rows), np.argsort(self._labels, kind="stable")

    def __len__(self) -> int:
        return len(self._rows)

    def positives(self, queries: np.ndarray, query_rows: np.ndarray, query_labels: np.ndarray) -> Positives:
        """The queries' positives among these rows, the query's own item left out.

        Args:
            queries: [Q, D] embeddings.
            query_rows: [Q] catalogue rows.
            query_labels: [Q] integer labels, negative for none.
        """
        own = self._own(query_rows)
        offsets, columns = positive_columns(query_labels, self._labels, self._by_label, own=own)
        tally = self._tally(queries, own, offsets, columns)
        with single_threaded_workers() as workers:
            tally.take_positive_scores(workers, self._embeddings, self._columns)
        return Positives(offsets, tally.scores, self._order[columns], len(self) - (own >= 0))

    def count_before(self, queries: np.ndarray, query_rows: np.ndarray, positives: Positives) -> np.ndarray:
        """How many of these rows stand before each positive, in the flat order of `positives`; int64.

        Args:
            queries: [Q, D] embeddings.
            query_rows: [Q] catalogue rows.
            positives: of all shards.
        """
        places = np.searchsorted(self._order, positives.orders)
        tally = self._tally(queries, self._own(query_rows), positives.offsets, places, positives.scores)
        with single_threaded_workers() as workers:
            tally.count_all(workers, self._embeddings, self._columns)
        return tally.ranks

    def _own(self, query_rows: np.ndarray) -> np.ndarray:
        if not len(self):
            return np.full(len(query_rows), -1)
        return own_columns(query_rows, self._rows, self._by_row)

    def _tally(
        self,
        queries: np.ndarray,
        own: np.ndarray,
        offsets: np.ndarray,
        places: np.ndarray,
        scores: np.ndarray | None = None,
    ) -> Tally:
        wanted = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
        return Tally(wanted, own, offsets, places, depth=0, query_tile=QUERY_TILE, scores=scores)


def merged(parts: Sequence[Positives]) -> Positives:
    """Positives of all shards, in the tie order within a query."""
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
    asked = found > 0
    offsets = np.concatenate([[0], np.cumsum(found[asked])])
    nothing = np.empty((int(asked.sum()), 0))
    return Ranking(
        query_rows=query_rows[asked],
        excluded=int((~asked).sum()),
        positives=found[asked],
        candidates=positives.candidates[asked],
        ranks=ascending_ranks(np.sum(counts, axis=0), offsets),
        offsets=offsets,
        top_rows=nothing.astype(np.int64),
        top_scores=nothing.astype(np.float32),
        top_right=nothing.astype(bool),
    )
