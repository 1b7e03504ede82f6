"""Exact ranks of the positives of many queries in a gallery, in little memory.

The rank of a positive is how many gallery scores exceed its own, plus the equal ones of items that come earlier in the
tie order; counts over tiles of the gallery add up, and nothing is sorted across tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from afmrl_ray.retrieval.tiles import QUERY_TILE, Tally, single_threaded_workers


@dataclass(frozen=True)
class Ranking:
    """Where the positives of Q queries stand; metrics are functions of it.

    Attributes:
        query_rows: [Q] catalogue rows of the queries that have a positive.
        excluded: queries without a positive in the gallery, left out of everything.
        positives: [Q] number of positives in the gallery, the query's own item not counted.
        candidates: [Q] gallery items without the query's own.
        ranks: [sum(positives)] ranks from 0, ascending within a query, query after query.
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
) -> Ranking:
    """Rank a gallery for every query by dot product in float32.

    The result depends neither on the order of the gallery nor on which queries are asked together.

    Args:
        queries: [Q, D] embeddings.
        gallery: [N, D] embeddings.
        query_rows: [Q] catalogue rows; the gallery item with the same row is the query's own and is excluded.
        gallery_rows: [N] catalogue rows, each once.
        query_labels: [Q] integer labels; gallery items with an equal label are positives, a negative label has none.
        gallery_labels: [N] integer labels.
        gallery_order: [N] integers, each once, ascending by item_id: of equal scores the smaller stands first.
        depth: length of the ranked list that is returned; the ranks themselves are exact at any depth.
    """
    columns = np.argsort(gallery_order)
    rows = np.asarray(gallery_rows)[columns]
    labels = np.asarray(gallery_labels)[columns]
    own = own_columns(query_rows, rows, np.argsort(rows))
    starts, positives = positive_columns(np.asarray(query_labels), labels, np.argsort(labels, kind="stable"), own=own)
    counts = np.diff(starts)
    asked = counts > 0
    own, counts = own[asked], counts[asked]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    state = Tally(
        torch.from_numpy(np.ascontiguousarray(queries[asked], dtype=np.float32)),
        own,
        offsets,
        positives,
        depth=depth,
        query_tile=QUERY_TILE,
    )
    gallery = np.asarray(gallery, dtype=np.float32)
    with single_threaded_workers() as workers:
        state.take_positive_scores(workers, gallery, columns)
        state.count_all(workers, gallery, columns)
    found = state.top_rows >= 0
    return Ranking(
        query_rows=np.asarray(query_rows)[asked],
        excluded=int((~asked).sum()),
        positives=counts,
        candidates=len(columns) - (own >= 0),
        ranks=state.sorted_ranks(),
        offsets=offsets,
        top_rows=np.where(found, rows[state.top_rows], -1),
        top_scores=state.top_scores,
        top_right=found & (labels[state.top_rows] == np.asarray(query_labels)[asked][:, None]),
    )


def own_columns(query_rows: np.ndarray, rows: np.ndarray, by_row: np.ndarray) -> np.ndarray:
    """[Q] gallery column of each query's own item, -1 where the gallery has none.

    Args:
        query_rows: [Q] catalogue rows.
        rows: [N] catalogue row of each column, N at least 1.
        by_row: [N] columns in the order of their rows.
    """
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
