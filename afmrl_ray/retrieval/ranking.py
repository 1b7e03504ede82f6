"""Exact ranks of the positives of many queries in a gallery, and each query's best items.

The rank of a positive is the number of items with a greater score, plus the number of items with an equal score that
come earlier in the tie order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from afmrl_ray.retrieval.scores import best_columns, count_before, for_each_row

QUERY_TILE = 128
"""Queries of one product; their scores, [QUERY_TILE, N] float32, are held in memory."""


@dataclass(frozen=True)
class Ranking:
    """Ranks of the positives of Q queries; the input of the retrieval metrics.

    Attributes:
        query_rows: [Q] catalogue rows of the queries that have a positive.
        excluded: number of queries without a positive in the gallery; they are left out.
        positives: [Q] number of positives in the gallery, the query's own item not counted.
        candidates: [Q] number of gallery items, the query's own item not counted.
        ranks: [sum(positives)] ranks counted from 0, query after query, ascending within a query.
        offsets: [Q + 1] start of each query in `ranks`.
        top_rows: [Q, depth] catalogue rows of the best gallery items, best first; -1 where there are fewer.
        top_scores: [Q, depth] float32 scores of `top_rows`; -inf where there are fewer.
        top_right: [Q, depth] bool, whether an item of `top_rows` is a positive.
    """

    query_rows: np.ndarray
    excluded: int
    positives: np.ndarray
    candidates: np.ndarray
    ranks: np.ndarray
    offsets: np.ndarray
    top_rows: np.ndarray
    top_scores: np.ndarray
    top_right: np.ndarray


def rank_gallery(
    queries: np.ndarray,
    gallery: np.ndarray,
    *,
    query_rows: np.ndarray,
    gallery_rows: np.ndarray,
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    gallery_order: np.ndarray,
    depth: int,
    query_groups: np.ndarray | None = None,
    gallery_groups: np.ndarray | None = None,
) -> Ranking:
    """Rank a gallery for every query by dot product in float32.

    The result depends neither on the order of the gallery nor on which queries are ranked together.

    Args:
        queries: [Q, D] embeddings.
        gallery: [N, D] embeddings.
        query_rows: [Q] catalogue rows; the gallery item with the same row is the query's own and is excluded.
        gallery_rows: [N] catalogue rows, each once.
        query_labels: [Q] integer labels; gallery items with an equal label are positives, a negative label has none.
        gallery_labels: [N] integer labels.
        gallery_order: [N] integers, each once, ascending by item_id: of equal scores the smaller ranks first.
        depth: number of best items returned for each query; ranks are exact at any depth.
        query_groups: [Q] integers: a query searches only the gallery items of its own group, and a negative group has
            none; None = all queries search all items.
        gallery_groups: [N] integers.
    """
    rows, labels = np.asarray(gallery_rows), np.asarray(gallery_labels)
    own = own_columns(query_rows, rows, np.argsort(rows))
    starts, columns = positive_columns(np.asarray(query_labels), labels, np.argsort(labels, kind="stable"), own=own)
    counts = np.diff(starts)
    if query_groups is not None and gallery_groups is not None:
        of_query = np.repeat(np.arange(len(counts)), counts)
        inside = (gallery_groups[columns] == query_groups[of_query]) & (query_groups[of_query] >= 0)
        columns, counts = columns[inside], np.bincount(of_query[inside], minlength=len(counts))
    has_positive = counts > 0
    own, counts = own[has_positive], counts[has_positive]
    groups = None if query_groups is None else query_groups[has_positive]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ranks = np.empty(len(columns), dtype=np.int64)
    top = np.full((len(own), depth), -1)
    top_scores = np.full((len(own), depth), -np.inf, dtype=np.float32)

    def rank_row(query: int, row: np.ndarray) -> None:
        if groups is not None:
            row[gallery_groups != groups[query]] = -np.inf
        mine = columns[offsets[query] : offsets[query + 1]]
        found = count_before(row, gallery_order, row[mine], gallery_order[mine])
        ranks[offsets[query] : offsets[query + 1]] = np.sort(found)
        best = best_columns(row, gallery_order, depth)
        top[query, : len(best)], top_scores[query, : len(best)] = best, row[best]

    for_each_row(queries[has_positive], np.asarray(gallery, dtype=np.float32), own, rank_row, query_tile=QUERY_TILE)
    return Ranking(
        query_rows=np.asarray(query_rows)[has_positive],
        excluded=int((~has_positive).sum()),
        positives=counts,
        candidates=_candidates(rows, own, groups, gallery_groups),
        ranks=ranks,
        offsets=offsets,
        top_rows=np.where(top >= 0, rows[top], -1),
        top_scores=top_scores,
        top_right=(top >= 0) & (labels[top] == np.asarray(query_labels)[has_positive][:, None]),
    )


def _candidates(
    rows: np.ndarray, own: np.ndarray, groups: np.ndarray | None, gallery_groups: np.ndarray | None
) -> np.ndarray:
    """[Q] number of gallery items that each query searches; a query's own item is in its own group."""
    if groups is None or gallery_groups is None:
        return np.asarray(len(rows) - (own >= 0))
    values, sizes = np.unique(gallery_groups, return_counts=True)
    return np.asarray(sizes[np.searchsorted(values, groups)] - (own >= 0))


def own_columns(query_rows: np.ndarray, rows: np.ndarray, by_row: np.ndarray) -> np.ndarray:
    """[Q] gallery column of each query's own item, -1 where the gallery has none.

    Args:
        query_rows: [Q] catalogue rows.
        rows: [N] catalogue row of each column.
        by_row: [N] columns in the order of their rows.
    """
    if not len(rows):
        return np.full(len(query_rows), -1)
    place = np.searchsorted(rows, query_rows, sorter=by_row).clip(max=len(rows) - 1)
    return np.where(rows[by_row[place]] == query_rows, by_row[place], -1)


def positive_columns(
    query_labels: np.ndarray, labels: np.ndarray, by_label: np.ndarray, *, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [Q + 1] and columns of each query's positives, flat and ascending within a query.

    Args:
        query_labels: [Q] integer labels, negative for none.
        labels: [N] label of each column.
        by_label: [N] columns in the order of their labels, equal ones ascending.
        own: [Q] from `own_columns`.
    """
    low = np.searchsorted(labels, query_labels, "left", sorter=by_label)
    high = np.where(query_labels < 0, low, np.searchsorted(labels, query_labels, "right", sorter=by_label))
    found = [by_label[a:b] for a, b in zip(low, high, strict=True)]
    found = [columns[columns != mine] for columns, mine in zip(found, own, strict=True)]
    offsets = np.concatenate([[0], np.cumsum([len(columns) for columns in found])]).astype(np.int64)
    return offsets, np.concatenate([*found, np.empty(0, dtype=np.int64)]).astype(np.int64)
