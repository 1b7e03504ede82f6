"""Counting over tiles of scores: how many columns of a gallery stand before given scores, and the best columns.

Counts over tiles of the gallery add up, and nothing is sorted across tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from threading import Lock, local

import numpy as np
import torch

# Every score comes from a torch product of exactly this shape, padded with zeros: the last bit of a result depends on
# the shape (with numpy's OpenBLAS even on the place in it), and equal embeddings must get equal scores. A tile of
# scores is 2 MiB.
QUERY_TILE = 256
GALLERY_TILE = 2048


@contextmanager
def single_threaded_workers() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads, each multiplying with one: nothing waits for the slowest part of a product,
    and its bits do not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _tile(gallery: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    """[GALLERY_TILE, D] gallery items at up to as many places."""
    # Neighbours in the gallery need no copy.
    side_by_side = columns[-1] - columns[0] == len(columns) - 1 and bool((np.diff(columns) == 1).all())
    found = gallery[columns[0] : columns[-1] + 1] if side_by_side else gallery[columns]
    return _padded(torch.from_numpy(found), GALLERY_TILE)


class _Scratch(local):
    """A worker's own tiles of scores, written over and over instead of asking for fresh memory each time."""

    def __init__(self, query_tile: int) -> None:
        self.scores, self.sorted = (torch.empty(query_tile, GALLERY_TILE) for _ in range(2))

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


class Tally:
    """What is known of every query so far: rank of each positive, and the best `depth` columns.

    Args:
        queries: [Q, D] float32.
        own: [Q] column of each query's own item, which is left out; -1 where there is none.
        offsets: [Q + 1] start of each query in `places`.
        places: flat; columns of the positives, or before which column they would stand if they are not among them.
        depth: best columns that are kept of each query.
        query_tile: queries of a product; scores of other tiles may differ in the last bit.
        scores: of the positives, where they are known already.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        own: np.ndarray,
        offsets: np.ndarray,
        places: np.ndarray,
        *,
        depth: int,
        query_tile: int,
        scores: np.ndarray | None = None,
    ) -> None:
        self._own, self._offsets, self._positives = own, offsets, places
        self._tiles = [
            (start, min(start + query_tile, len(queries)), _padded(queries[start : start + query_tile], query_tile))
            for start in range(0, len(queries), query_tile)
        ]
        self._depth = depth
        self.scores = np.empty(len(places), dtype=np.float32) if scores is None else scores
        self.ranks = np.zeros(len(places), dtype=np.int64)
        # Guards what tiles add up in; everything else is a tile's own.
        self._lock = Lock()
        self._scratch = _Scratch(query_tile)
        self._waiting: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self.top_rows = np.full((len(queries), depth), -1, dtype=np.int64)
        self.top_scores = np.full((len(queries), depth), -np.inf, dtype=np.float32)

    def take_positive_scores(self, workers: ThreadPoolExecutor, gallery: np.ndarray, columns: np.ndarray) -> None:
        """Fill `scores`; needed before anything is counted.

        Args:
            workers: from `single_threaded_workers`.
            gallery: [N, D].
            columns: [N] places in the gallery of the columns.
        """
        list(workers.map(lambda tile: self._take_positive_scores(tile, gallery, columns), self._tiles))

    def count_all(self, workers: ThreadPoolExecutor, gallery: np.ndarray, columns: np.ndarray) -> None:
        """Fill `ranks`, with the number of columns before each positive, and the best columns."""
        starts = range(0, len(columns), GALLERY_TILE)
        list(workers.map(lambda start: self._count(start, columns[start : start + GALLERY_TILE], gallery), starts))
        for start, stop, _ in self._tiles:
            self._sort_in(start, stop)

    def _take_positive_scores(
        self, tile: tuple[int, int, torch.Tensor], gallery: np.ndarray, columns: np.ndarray
    ) -> None:
        start, stop, queries = tile
        first, last = self._offsets[start], self._offsets[stop]
        needed, place = np.unique(self._positives[first:last], return_inverse=True)
        query = np.repeat(np.arange(stop - start), np.diff(self._offsets[start : stop + 1]))
        for begin in range(0, len(needed), GALLERY_TILE):
            here = (place >= begin) & (place < begin + GALLERY_TILE)
            scores = self._scratch.product(queries, _tile(gallery, columns[needed[begin : begin + GALLERY_TILE]]))
            self.scores[first:last][here] = scores[query[here], place[here] - begin]

    def _count(self, begin: int, columns: np.ndarray, gallery: np.ndarray) -> None:
        """Add what a tile says about ranks and best columns; tiles may come in any order, and side by side.

        Args:
            begin: the tile's first column.
            columns: places in the gallery of its columns.
            gallery: [N, D].
        """
        tile = _tile(gallery, columns)
        for start, stop, queries in self._tiles:
            scores = self._scratch.product(queries, tile)[: stop - start, : len(columns)]
            own = self._own[start:stop] - begin
            here = np.flatnonzero((own >= 0) & (own < scores.shape[1]))
            scores[here, own[here]] = -np.inf
            ascending = self._scratch.ascending(scores)
            self._count_positives(start, stop, begin, scores, ascending)
            if self._depth:
                self._note_best(start, stop, begin, scores, ascending)

    def _count_positives(self, start: int, stop: int, begin: int, scores: np.ndarray, ascending: np.ndarray) -> None:
        """Add to each positive's rank the columns that stand before it: in tie order, equal scores of earlier ones."""
        first, last, width = self._offsets[start], self._offsets[stop], scores.shape[1]
        mine, columns = self.scores[first:last], self._positives[first:last] - begin
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
            self.ranks[first:last] += ranks

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

    def sorted_ranks(self) -> np.ndarray:
        """Ranks, ascending within a query."""
        return ascending_ranks(self.ranks, self._offsets)


def ascending_ranks(ranks: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Flat ranks of queries, sorted within each.

    Args:
        ranks: flat.
        offsets: [Q + 1] start of each query in `ranks`.
    """
    return ranks[np.lexsort((ranks, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))))]
