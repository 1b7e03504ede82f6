"""Exact ranks of the positives of many queries in a gallery, in little memory.

The rank of a positive is how many gallery scores exceed its own, plus the equal ones of items that come earlier in the
tie order; counts over tiles of the gallery add up, and nothing is sorted across tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock, local

import numpy as np
import torch

# Every score comes from a torch product of exactly this shape, padded with zeros: the last bit of a result depends on
# the shape (with numpy's OpenBLAS even on the place in it), and equal embeddings must get equal scores. A tile of
# scores is 2 MiB.
_QUERY_TILE = 256
_GALLERY_TILE = 2048


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
    starts, positives = _positive_columns(
        np.asarray(query_labels), np.asarray(gallery_labels)[columns], own=(own := _own_columns(query_rows, rows))
    )
    counts = np.diff(starts)
    asked = counts > 0
    own, counts = own[asked], counts[asked]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    state = _State(
        torch.from_numpy(np.ascontiguousarray(queries[asked], dtype=np.float32)), own, offsets, positives, depth
    )
    gallery = np.asarray(gallery, dtype=np.float32)
    with _single_threaded_workers() as pool:
        list(pool.map(lambda tile: state.take_positive_scores(tile, gallery, columns), state.tiles))
        starts_of_tiles = range(0, len(columns), _GALLERY_TILE)
        list(
            pool.map(lambda start: state.count(start, columns[start : start + _GALLERY_TILE], gallery), starts_of_tiles)
        )
    state.finish()
    labels = np.asarray(gallery_labels)[columns]
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


@contextmanager
def _single_threaded_workers() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads, each multiplying with one: nothing waits for the slowest part of a product,
    and its bits do not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _own_columns(query_rows: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[Q] gallery column of each query's own item, -1 where the gallery has none."""
    order = np.argsort(rows)
    place = np.searchsorted(rows, query_rows, sorter=order).clip(max=len(rows) - 1)
    return np.where(rows[order[place]] == query_rows, order[place], -1)


def _positive_columns(
    query_labels: np.ndarray, labels: np.ndarray, *, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [Q + 1] and columns of each query's positives, flat and ascending within a query."""
    by_label = np.argsort(labels, kind="stable")
    low = np.searchsorted(labels, query_labels, "left", sorter=by_label)
    high = np.where(query_labels < 0, low, np.searchsorted(labels, query_labels, "right", sorter=by_label))
    found = [by_label[a:b] for a, b in zip(low, high, strict=True)]
    found = [columns[columns != mine] for columns, mine in zip(found, own, strict=True)]
    offsets = np.concatenate([[0], np.cumsum([len(columns) for columns in found])]).astype(np.int64)
    return offsets, np.concatenate([*found, np.empty(0, dtype=np.int64)]).astype(np.int64)


def _tile(gallery: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    """[_GALLERY_TILE, D] gallery items at up to as many places."""
    # Neighbours in the gallery need no copy.
    side_by_side = columns[-1] - columns[0] == len(columns) - 1 and bool((np.diff(columns) == 1).all())
    found = gallery[columns[0] : columns[-1] + 1] if side_by_side else gallery[columns]
    return _padded(torch.from_numpy(found), _GALLERY_TILE)


class _Scratch(local):
    """A worker's own tiles of scores, written over and over instead of asking for fresh memory each time."""

    def __init__(self) -> None:
        self.scores, self.sorted = (torch.empty(_QUERY_TILE, _GALLERY_TILE) for _ in range(2))

    def product(self, queries: torch.Tensor, tile: torch.Tensor) -> np.ndarray:
        """[queries, tile] scores, until the worker's next product."""
        return torch.mm(queries, tile.T, out=self.scores).numpy()

    def ascending(self, scores: np.ndarray) -> np.ndarray:
        """Each row sorted, until the worker's next call."""
        out = self.sorted.numpy()[: scores.shape[0], : scores.shape[1]]
        np.copyto(out, scores)
        out.sort(axis=1)
        return out


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, length - len(x))) if len(x) < length else x


class _State:
    """What is known of every query so far: rank of each positive, and the best `depth` columns."""

    def __init__(
        self, queries: torch.Tensor, own: np.ndarray, offsets: np.ndarray, positives: np.ndarray, depth: int
    ) -> None:
        self._own, self._offsets, self._positives = own, offsets, positives
        self.tiles = [
            (start, min(start + _QUERY_TILE, len(queries)), _padded(queries[start : start + _QUERY_TILE], _QUERY_TILE))
            for start in range(0, len(queries), _QUERY_TILE)
        ]
        self._depth = depth
        self._scores = np.empty(len(positives), dtype=np.float32)
        self._ranks = np.zeros(len(positives), dtype=np.int64)
        # Guards what tiles add up in; everything else is a tile's own.
        self._lock = Lock()
        self._scratch = _Scratch()
        self._waiting: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self.top_rows = np.full((len(queries), depth), -1, dtype=np.int64)
        self.top_scores = np.full((len(queries), depth), -np.inf, dtype=np.float32)

    def take_positive_scores(
        self, tile: tuple[int, int, torch.Tensor], gallery: np.ndarray, columns: np.ndarray
    ) -> None:
        """Scores of the positives of a tile of queries; needed before anything is counted."""
        start, stop, queries = tile
        first, last = self._offsets[start], self._offsets[stop]
        needed, place = np.unique(self._positives[first:last], return_inverse=True)
        query = np.repeat(np.arange(stop - start), np.diff(self._offsets[start : stop + 1]))
        for begin in range(0, len(needed), _GALLERY_TILE):
            here = (place >= begin) & (place < begin + _GALLERY_TILE)
            scores = self._scratch.product(queries, _tile(gallery, columns[needed[begin : begin + _GALLERY_TILE]]))
            self._scores[first:last][here] = scores[query[here], place[here] - begin]

    def count(self, begin: int, columns: np.ndarray, gallery: np.ndarray) -> None:
        """Add what a tile says about ranks and best columns; tiles may come in any order, and side by side.

        Args:
            begin: the tile's first column.
            columns: places in the gallery of its columns.
            gallery: [N, D].
        """
        tile = _tile(gallery, columns)
        for start, stop, queries in self.tiles:
            scores = self._scratch.product(queries, tile)[: stop - start, : len(columns)]
            own = self._own[start:stop] - begin
            here = np.flatnonzero((own >= 0) & (own < scores.shape[1]))
            scores[here, own[here]] = -np.inf
            ascending = self._scratch.ascending(scores)
            self._count_positives(start, stop, begin, scores, ascending)
            self._note_best(start, stop, begin, scores, ascending)

    def _count_positives(self, start: int, stop: int, begin: int, scores: np.ndarray, ascending: np.ndarray) -> None:
        """Add to each positive's rank the columns that stand before it: in tie order, equal scores of earlier ones."""
        first, last, width = self._offsets[start], self._offsets[stop], scores.shape[1]
        mine, columns = self._scores[first:last], self._positives[first:last] - begin
        # At least as great in earlier tiles than the positive's, greater in its own and in later ones.
        least = np.where(columns >= width, mine, np.nextafter(mine, np.float32(np.inf)))
        ends = (self._offsets[start : stop + 1] - first).tolist()
        below = np.empty(len(mine), dtype=np.int64)
        for row, (low, high) in enumerate(pairwise(ends)):
            below[low:high] = ascending[row].searchsorted(least[low:high])
        ranks = width - below
        query = np.repeat(np.arange(stop - start), np.diff(ends))
        for index in np.flatnonzero((columns >= 0) & (columns < width)):
            ranks[index] += np.count_nonzero(scores[query[index], : columns[index]] == mine[index])
        with self._lock:
            self._ranks[first:last] += ranks

    def _note_best(self, start: int, stop: int, begin: int, scores: np.ndarray, ascending: np.ndarray) -> None:
        """Keep what may be among the best of its query; sorted in once there is as much of it as there are places."""
        least = np.maximum(ascending[:, -min(self._depth, scores.shape[1])], self.top_scores[start:stop, -1])
        least = np.maximum(least, np.finfo(np.float32).min)  # an excluded item has score -inf
        query, column = np.divmod(np.flatnonzero(scores >= least[:, None]), scores.shape[1])
        with self._lock:
            waiting = self._waiting.setdefault(start, [])
            waiting.append((query, column + begin, scores[query, column]))
            if sum(len(found) for found, _, _ in waiting) >= self._depth * (stop - start):
                self._sort_in(start, stop)

    def _sort_in(self, start: int, stop: int) -> None:
        old_query, old_place = np.nonzero(self.top_rows[start:stop] >= 0)
        old = (
            old_query,
            self.top_rows[start:stop][old_query, old_place],
            self.top_scores[start:stop][old_query, old_place],
        )
        query, column, score = (np.concatenate(parts) for parts in zip(old, *self._waiting.pop(start, []), strict=True))
        order = np.lexsort((column, -score, query))
        query, column, score = query[order], column[order], score[order]
        place = np.arange(len(query)) - np.searchsorted(query, query)
        best = place < self._depth
        self.top_rows[start + query[best], place[best]] = column[best]
        self.top_scores[start + query[best], place[best]] = score[best]

    def finish(self) -> None:
        """Sort in what is still waiting; call it after the last tile."""
        for start, stop, _ in self.tiles:
            self._sort_in(start, stop)

    def sorted_ranks(self) -> np.ndarray:
        query = np.repeat(np.arange(len(self._offsets) - 1), np.diff(self._offsets))
        return self._ranks[np.lexsort((self._ranks, query))]
