"""Search over a round's index and the upserts and deletions since it was built: plain code without Ray."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from afmrl_ray.attributes.text import stored_attributes
from afmrl_ray.retrieval.ann import build_index, open_index, save_index, search_index, stored_vectors
from afmrl_ray.retrieval.item_table import ITEMS, VECTORS, ItemRecord, ItemTable, write_items
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.records import DeltaItem
from afmrl_ray.serving.store import ItemStore


@dataclass(frozen=True)
class Filters:
    """Conditions that every hit meets.

    Attributes:
        category: of the item; None = any.
        attributes: (name, value) pairs in normal form that the item has.
    """

    category: str | None = None
    attributes: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return self.category is not None or bool(self.attributes)

    def match(self, item: DeltaItem) -> bool:
        """Whether an item meets them."""
        if self.category is not None and item.category != self.category:
            return False
        return set(self.attributes) <= set(stored_attributes(item.attributes))


@dataclass(frozen=True)
class Hit:
    """A search result; `score` is the cosine similarity to the query."""

    item_id: str
    score: float
    title: str
    category: str | None
    product_id: str | None
    attributes: str


@dataclass
class _Delta:
    """Items upserted since the index was built; their vectors are stacked when they are searched."""

    items: dict[str, DeltaItem] = field(default_factory=dict)
    vectors: np.ndarray | None = None

    def matrix(self) -> np.ndarray:
        """[M, D] float32 in the order of `items`."""
        if self.vectors is None:
            self.vectors = np.stack([item.vector for item in self.items.values()])
        return self.vectors


class RoundIndex:
    """The memory-mapped index of one bundle, with the store's later changes applied.

    Args:
        bundle: whose index it is.
        store: the shared store; used from the same thread as the index.
        index_path: local folder of the index files.
        since: sequence number up to which the index files contain all changes.
    """

    def __init__(self, bundle: Bundle, store: ItemStore, index_path: str, since: int = 0) -> None:
        self.bundle, self._store = bundle, store
        self._index = open_index(os.path.join(index_path, VECTORS))
        self._table = ItemTable(os.path.join(index_path, ITEMS))
        self._seq = since
        self._hidden = np.zeros(self._index.ntotal, dtype=bool)
        self._delta = _Delta()

    def __len__(self) -> int:
        """Number of items that can be found."""
        return int(self._index.ntotal - self._hidden.sum()) + len(self._delta.items)

    @property
    def delta_items(self) -> int:
        """Number of upserted items that the index files do not contain."""
        return len(self._delta.items)

    def refresh(self) -> None:
        """Apply the store's changes since the last call."""
        for change in self._store.changes(self.bundle.key, self._seq):
            self._seq = change.seq
            row = self._table.row(change.item_id)
            if row is not None:
                self._hidden[row] = True
            self._delta.items.pop(change.item_id, None)
            if change.item is not None:
                self._delta.items[change.item_id] = change.item
            self._delta.vectors = None

    def search(self, vector: np.ndarray, k: int, filters: Filters) -> list[Hit]:
        """The best `k` items by cosine similarity; equal scores are ordered by item id.

        Args:
            vector: [D] float32, of unit length.
            k: number of hits wanted.
            filters: what every hit must meet.
        """
        hits = [*self._search_index(vector, k, filters), *self._search_delta(vector, k, filters)]
        return sorted(hits, key=lambda hit: (-hit.score, hit.item_id))[:k]

    def _search_index(self, vector: np.ndarray, k: int, filters: Filters) -> Iterator[Hit]:
        allowed = None if not self._hidden.any() else ~self._hidden
        if filters:
            matching = self._matching(filters)
            allowed = matching if allowed is None else matching & allowed
        if not self._index.ntotal or (allowed is not None and not allowed.any()):
            return
        scores, rows = search_index(
            self._index, vector[None], min(k, self._index.ntotal), self.bundle.index, allowed=allowed
        )
        for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True):
            if row >= 0:
                record = self._table.record(row)
                yield Hit(record.item_id, score, record.title, record.category, record.product_id, record.attributes)

    def _matching(self, filters: Filters) -> np.ndarray:
        """[N] bool, the rows of the index that meet the filters."""
        conditions = [self._table.rows_with_attribute(*pair) for pair in filters.attributes]
        if filters.category is not None:
            conditions.append(self._table.rows_of_category(filters.category))
        found = np.ones(self._index.ntotal, dtype=bool)
        for rows in conditions:
            meets = np.zeros(len(found), dtype=bool)
            meets[rows] = True
            found &= meets
        return found

    def _search_delta(self, vector: np.ndarray, k: int, filters: Filters) -> Iterator[Hit]:
        if not self._delta.items:
            return
        items = list(self._delta.items.values())
        scores = self._delta.matrix() @ vector
        if filters:
            scores = np.where([filters.match(item) for item in items], scores, -np.inf)
        for position in np.argsort(-scores, kind="stable")[: k + _ties(scores, k)].tolist():
            if np.isfinite(scores[position]):
                item, score = items[position], float(scores[position])
                yield Hit(item.item_id, score, item.title, item.category, item.product_id, item.attributes)

    def get(self, item_id: str) -> ItemRecord | None:
        """An item that can be found, or None."""
        item = self._delta.items.get(item_id)
        if item is not None:
            stored = self._store.item(item_id)
            small = stored.thumbnail if stored is not None else None
            return ItemRecord(item_id, item.title, item.category, item.product_id, item.attributes, small)
        row = self._table.row(item_id)
        return self._table.record(row) if row is not None and not self._hidden[row] else None

    def write_merged(self, folder: str) -> int:
        """Write index files with all changes applied to a new local folder.

        Returns:
            Sequence number up to which they contain all changes.
        """
        rows, upserted, seq = np.flatnonzero(~self._hidden), list(self._delta.items), self._seq
        vectors = stored_vectors(self._index, rows)
        if upserted:
            vectors = np.concatenate([vectors, self._delta.matrix()])

        def records() -> Iterator[ItemRecord]:
            for row in rows.tolist():
                yield self._table.record(row)
            yield from filter(None, map(self.get, upserted))

        partial = f"{folder}.{uuid.uuid4().hex}.partial"
        os.makedirs(partial)
        save_index(build_index(vectors, self.bundle.index), os.path.join(partial, VECTORS))
        write_items(os.path.join(partial, ITEMS), records())
        os.replace(partial, folder)
        return seq

    def close(self) -> None:
        self._table.close()


def _ties(scores: np.ndarray, k: int) -> int:
    """How many scores beyond the first k equal the k-th best, so that the item id can decide between them."""
    if len(scores) <= k:
        return 0
    edge = np.partition(-scores, k - 1)[k - 1]
    return int((-scores <= edge).sum()) - k
