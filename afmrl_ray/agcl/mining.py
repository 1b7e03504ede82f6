"""Groups of products with similar attributes, for batches of hard negatives; an inverted index, never N x N.

In-batch negatives are only as hard as the batch is: a uniform batch of a large catalogue holds next to no product that
is hard to tell from the query. Groups of lexical neighbours bring such products together, as BM25-mined negatives do in
dense retrieval (Karpukhin et al. 2020, arXiv 2004.04906), without extra encoder passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

from afmrl_ray.attributes.text import stored_attributes

MAX_POSTINGS = 1024
"""Products looked at for one attribute pair of a seed product; longer posting lists are cut at a random place."""


class AttributeNeighbours:
    """Products and the `name: value` pairs that describe them, as an inverted index.

    Args:
        pairs: [P, V] CSR, product to its pairs; stored values are ignored.
        max_similarity: a product whose shared pairs weigh more than this fraction of the seed's own is not grouped
            with it, as it is probably the same product under another id; 1 = no limit.
    """

    def __init__(self, pairs: sparse.csr_array, *, max_similarity: float = 1.0) -> None:
        self._pairs = sparse.csr_array(pairs)
        self._pairs.sum_duplicates()
        self._postings = sparse.csc_array(self._pairs)
        self._max_similarity = max_similarity
        frequency = np.diff(self._postings.indptr)
        # Lucene's idf of BM25, which is never negative.
        self._idf = np.log1p((len(self) - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)

    def __len__(self) -> int:
        return self._pairs.shape[0]

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], products: Sequence[int], *, count: int, max_similarity: float = 1.0
    ) -> AttributeNeighbours:
        """Describe each product by the pairs of its items that at least half of its annotated items have.

        Args:
            texts: attribute text of each item.
            products: code of each item's product; negative = none.
            count: number of products.
            max_similarity: see the class.
        """
        codes: dict[tuple[str, str], int] = {}
        rows, columns, items = [], [], np.zeros(count)
        for text, product in zip(texts, products, strict=True):
            pairs = stored_attributes(text) if product >= 0 else ()
            if pairs:
                items[product] += 1
                rows += [product] * len(pairs)
                columns += [codes.setdefault(pair, len(codes)) for pair in pairs]
        counts = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(count, max(1, len(codes))))
        counts.sum_duplicates()
        counts.data[counts.data < np.repeat(items, np.diff(counts.indptr)) / 2] = 0
        counts.eliminate_zeros()
        return cls(counts, max_similarity=max_similarity)

    @property
    def any_shared(self) -> bool:
        """Whether any pair describes two products."""
        return bool((np.diff(self._postings.indptr) > 1).any())

    def groups(self, size: int, draw: np.random.Generator, free: np.ndarray) -> Iterator[np.ndarray]:
        """Disjoint groups of at most `size` free products, a seed first and its best neighbours by BM25 after it.

        A seed without a free neighbour makes no group. A function of the index, the state of `draw` and `free`. Costs
        O(pairs of a product x `MAX_POSTINGS`) for each group, when it is taken.

        Args:
            size: of a group, seed included.
            draw: random numbers: seeds are visited in random order, equally similar neighbours are chosen at random.
            free: [P] bool, products that may be grouped; whoever takes a group clears it before taking the next.
        """
        scores = np.zeros(len(self), dtype=np.float32)
        for seed in draw.permutation(len(self)).tolist():
            if not free[seed]:
                continue
            neighbours = self._nearest(seed, size - 1, free, scores, draw)
            if len(neighbours):
                yield np.concatenate([[seed], neighbours])

    def _nearest(
        self, seed: int, count: int, free: np.ndarray, scores: np.ndarray, draw: np.random.Generator
    ) -> np.ndarray:
        """The best free neighbours of a product, best first; `scores` is zero before and after."""
        start, stop = self._pairs.indptr[seed : seed + 2]
        touched = [self._products_with(column, draw) for column in self._pairs.indices[start:stop].tolist()]
        if not touched:
            return np.empty(0, dtype=np.int64)
        for column, products in zip(self._pairs.indices[start:stop].tolist(), touched, strict=True):
            scores[products] += self._idf[column]  # a product is in a posting list once
        candidates = np.concatenate(touched)
        candidates = candidates[free[candidates] & (candidates != seed)]
        values = scores[candidates]
        for products in touched:
            scores[products] = 0
        own = float(self._idf[self._pairs.indices[start:stop]].sum())
        kept = values <= self._max_similarity * own * (1 + 1e-6)
        candidates, values = candidates[kept], values[kept]
        # A candidate occurs once for each pair that it shares, so that many of the best are enough to find `count`.
        most = count * len(touched)
        # Ties are broken at random: equal neighbours of many seeds take turns over the epochs.
        values = values + draw.random(len(values), dtype=np.float32) * np.float32(1e-4)
        if len(values) > most:
            best = np.argpartition(-values, most)[:most]
            candidates, values = candidates[best], values[best]
        ordered = candidates[np.argsort(-values, kind="stable")]
        _, first = np.unique(ordered, return_index=True)
        return ordered[np.sort(first)][:count].astype(np.int64)

    def _products_with(self, column: int, draw: np.random.Generator) -> np.ndarray:
        """Products with a pair, at most `MAX_POSTINGS` of them."""
        postings = self._postings.indices[self._postings.indptr[column] : self._postings.indptr[column + 1]]
        if len(postings) > MAX_POSTINGS:
            cut = int(draw.integers(len(postings) - MAX_POSTINGS + 1))
            postings = postings[cut : cut + MAX_POSTINGS]
        return postings
