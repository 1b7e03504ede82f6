"""Exact ranks and log-probabilities in a gallery whose items are spread over several shards.

Two passes: the shards that hold positives return their scores, then every shard counts how many of its items rank
before each of them, and sums the exponentials of its items' scores. Every score comes from a product of the same shape,
so the sum of the counts is the rank in the whole gallery, ties included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        candidates: [Q] number of gallery items, the query's own and those left out for it not counted.
    """

    offsets: np.ndarray
    scores: np.ndarray
    orders: np.ndarray
    candidates: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """How the items of a shard compare with the positives of Q queries.

    Attributes:
        before: int64, how many items rank before each positive, in the flat order of `Positives`.
        log_sum_exp: [Q] float64, `log(sum(exp(score / temperature)))` over the items, -inf if there are none.
    """

    before: np.ndarray
    log_sum_exp: np.ndarray


class GalleryShard:
    """Part of a gallery, prepared once and searched often.

    Args:
        embeddings: [N, D]; not copied if it is float32.
        rows: [N] catalogue rows, each in one shard.
        labels: [N] integer labels, negative for none.
        order: [N] integers, each in one shard: of equal scores the smaller ranks first.
        left_out: catalogue rows of the gallery items that are left out for a query, by the query's catalogue row; none
            of them may be a positive of it.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray,
        order: np.ndarray,
        left_out: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        self._embeddings = np.asarray(embeddings, dtype=np.float32)
        self._rows, self._labels, self._order = rows, labels, order
        self._by_row, self._by_label = np.argsort(rows), np.argsort(labels, kind="stable")
        columns = {query: self._own(others) for query, others in (left_out or {}).items()}
        self._left_out = {query: found[found >= 0] for query, found in columns.items()}

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
        left_out = np.array([len(self._left_out.get(query, ())) for query in query_rows.tolist()], dtype=np.int64)
        return Positives(offsets, scores, self._order[columns], len(self) - (own >= 0) - left_out)

    def compare(
        self, queries: np.ndarray, query_rows: np.ndarray, positives: Positives, *, temperature: float
    ) -> Comparison:
        """Compare the items of this shard with the positives; the query's own item and those left out do not count.

        Args:
            queries: [Q, D] embeddings.
            query_rows: [Q] catalogue rows.
            positives: of all shards.
            temperature: divisor of the scores in the exponent.
        """
        before = np.zeros(len(positives.scores), dtype=np.int64)
        sums = np.full(len(queries), -np.inf)

        def compare_row(query: int, row: np.ndarray) -> None:
            left_out = self._left_out.get(int(query_rows[query]))
            if left_out is not None:
                row[left_out] = -np.inf
            span = slice(positives.offsets[query], positives.offsets[query + 1])
            before[span] = count_before(row, self._order, positives.scores[span], positives.orders[span])
            sums[query] = _log_sum_exp(row, temperature)

        for_each_row(queries, self._embeddings, self._own(query_rows), compare_row, query_tile=QUERY_TILE)
        return Comparison(before, sums)

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


def positive_log_probabilities(
    positives: Positives, comparisons: Sequence[Comparison], *, temperature: float
) -> np.ndarray:
    """Log-probability of the positives under the softmax over the gallery, in float64.

    `log(sum over positives of exp(score / temperature) / sum over the gallery of exp(score / temperature))`, as in
    InfoNCE with several positives in the numerator; the query's own item and those left out are in neither sum.

    Args:
        positives: of all shards.
        comparisons: of every shard, at the same temperature.
        temperature: divisor of the scores.

    Returns:
        [Q], at most 0 up to rounding; NaN for a query without a positive.
    """
    starts, ends = positives.offsets[:-1], positives.offsets[1:]
    found = np.array([_log_sum_exp(positives.scores[a:b], temperature) for a, b in zip(starts, ends, strict=True)])
    total = np.logaddexp.reduce([each.log_sum_exp for each in comparisons], axis=0)
    return np.where(ends > starts, found, np.nan) - total


def _log_sum_exp(scores: np.ndarray, temperature: float) -> float:
    """`log(sum(exp(scores / temperature)))` in float64; scores that are no numbers count as -inf."""
    finite = scores[scores > -np.inf].astype(np.float64) / temperature
    if not len(finite):
        return -np.inf
    largest = finite.max()
    return float(largest + np.log(np.exp(finite - largest).sum()))


def ranking_of(query_rows: np.ndarray, positives: Positives, comparisons: Sequence[Comparison]) -> Ranking:
    """The ranking in the whole gallery, without lists of the best items.

    Args:
        query_rows: [Q] catalogue rows; queries without a positive are left out of the ranking.
        positives: of all shards.
        comparisons: of every shard, from `GalleryShard.compare`.
    """
    found = np.diff(positives.offsets)
    has_positive = found > 0
    query = np.repeat(np.arange(len(found)), found)
    ranks = np.sum([each.before for each in comparisons], axis=0)
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
