"""Scores of queries against a gallery, and how many items rank before a given score.

Every score comes from a torch product of one fixed shape, padded with zeros. The last bit of a score depends on the
shape of the product (with numpy's OpenBLAS even on the position in it), and equal embeddings must get equal scores in
whichever shard of a gallery they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

GALLERY_TILE = 2048
"""Gallery items of one product."""
_SORT_FROM = 100
"""Positives of a query from which sorting its scores once is faster than passing over them for each positive."""


def for_each_row(
    queries: np.ndarray,
    gallery: np.ndarray,
    own: np.ndarray,
    work: Callable[[int, np.ndarray], None],
    *,
    query_tile: int,
) -> None:
    """Call `work(query, scores)` for every query, with its dot products [N] with the gallery, in float32.

    Calls run in as many threads as torch uses. Each product runs in one thread, so that its bits do not depend on the
    number of threads. The scores are overwritten after the call.

    Args:
        queries: [Q, D] embeddings.
        gallery: [N, D] float32 embeddings.
        own: [Q] gallery column of each query's own item, whose score is set to -inf; -1 where the gallery has none.
        work: called with a query's index and its scores; must be safe to call from several threads.
        query_tile: queries of one product.
    """
    wanted = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
    starts = range(0, len(gallery), GALLERY_TILE)
    scores = torch.empty(query_tile, len(starts) * GALLERY_TILE)
    rows = scores.numpy()[:, : len(gallery)]
    with _single_threaded_workers() as (workers, threads):
        for first in range(0, len(wanted), query_tile):
            block = _padded(wanted[first : first + query_tile], query_tile)
            count = min(query_tile, len(wanted) - first)

            def multiply(start: int, block: torch.Tensor = block) -> None:
                tile = _padded(torch.from_numpy(gallery[start : start + GALLERY_TILE]), GALLERY_TILE)
                torch.mm(block, tile.T, out=scores[:, start : start + GALLERY_TILE])

            def handle(part: int, first: int = first, count: int = count) -> None:
                for place in range(part, count, threads):
                    if own[first + place] >= 0:
                        rows[place, own[first + place]] = -np.inf
                    work(first + place, rows[place])

            list(workers.map(multiply, starts))
            list(workers.map(handle, range(threads)))


def count_before(row: np.ndarray, order: np.ndarray, scores: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """How many items rank before each of P (score, order) pairs: those with a greater score, and those with an equal
    score and a smaller order. A score that is not a number ranks last.

    Args:
        row: [N] scores of the items.
        order: [N] their places in the tie order.
        scores: [P] float32.
        orders: [P] places in the tie order.

    Returns:
        [P] int64.
    """
    if len(scores) < _SORT_FROM:
        counts = (
            len(row) - np.count_nonzero(row <= score) + np.count_nonzero(order[row == score] < place)
            for score, place in zip(scores, orders, strict=True)
        )
        return np.fromiter(counts, dtype=np.int64, count=len(scores))
    by_score = np.argsort(-row)
    descending = -row[by_score]
    greater, others = (np.searchsorted(descending, -scores, side) for side in ("left", "right"))
    equal_before = (
        np.count_nonzero(order[by_score[first:last]] < place)
        for first, last, place in zip(greater, others, orders, strict=True)
    )
    return greater + np.fromiter(equal_before, dtype=np.int64, count=len(scores))


def best_columns(row: np.ndarray, order: np.ndarray, depth: int) -> np.ndarray:
    """[min(depth, items)] columns of the best items, best first; of equal scores the smaller order comes first.

    Args:
        row: [N] scores; items with score -inf are left out.
        order: [N] places in the tie order.
        depth: number of items.
    """
    least = torch.topk(torch.from_numpy(row), min(depth, len(row))).values[-1].item()
    columns = np.flatnonzero((row >= least) & (row > -np.inf))
    return columns[np.lexsort((order[columns], -row[columns]))[:depth]]


@contextmanager
def _single_threaded_workers() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """As many workers as torch has threads, each of which multiplies with one thread; and their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, threads
    finally:
        torch.set_num_threads(threads)


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, length - len(x))) if len(x) < length else x
