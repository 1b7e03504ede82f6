"""Search over a round's index together with everything that was put in and taken out since: plain code without Ray."""

from __future__ import annotations

import getpass
import os
import sqlite3
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.attributes.text import stored_attributes
from afmrl_ray.cit.stages.index import ITEMS, VECTORS, ItemRecord, write_items
from afmrl_ray.retrieval.ann import build_index, open_index, save_index, search_index, stored_vectors
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.store import ItemStore, State, UpsertedItem

_MERGE_LEASE_S = 3600
_COLUMNS = "item_id, title, category, product_id, attributes, thumbnail"


@dataclass(frozen=True)
class Filters:
    """What hits must be.

    Attributes:
        category: their category; none = any.
        attributes: (name, value) pairs in normal form that each of them has.
    """

    category: str | None = None
    attributes: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return self.category is not None or bool(self.attributes)


@dataclass(frozen=True)
class Hit:
    """An item that was found; `score` is the cosine of the vectors."""

    item_id: str
    score: float
    title: str
    category: str | None
    product_id: str | None
    attributes: str


@dataclass
class _Fresh:
    """Items put in since the index was built, as columns that grow."""

    items: dict[str, UpsertedItem] = field(default_factory=dict)
    vectors: np.ndarray | None = None

    def matrix(self) -> np.ndarray:
        if self.vectors is None:
            self.vectors = np.stack([item.vector for item in self.items.values()])
        return self.vectors


class RoundIndex:
    """The index of one bundle, memory-mapped, under what the store says of later changes.

    Args:
        bundle: whose index.
        store: the shared record; both are used from one thread.
        index_path: folder of `vectors.faiss` and `items.sqlite`; a URI's copy is made by the caller.
        since: sequence number up to which the index has everything.
    """

    def __init__(self, bundle: Bundle, store: ItemStore, index_path: str, since: int = 0) -> None:
        self.bundle, self._store = bundle, store
        self._index = open_index(os.path.join(index_path, VECTORS))
        file = os.path.join(index_path, ITEMS)
        self._items = sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True, check_same_thread=False)
        self._seq = since
        self._hidden = np.zeros(self._index.ntotal, dtype=bool)
        self._fresh = _Fresh()

    def __len__(self) -> int:
        """Items that can be found."""
        return int(self._index.ntotal - self._hidden.sum()) + len(self._fresh.items)

    @property
    def unmerged(self) -> int:
        """Items put in that are not in the index itself."""
        return len(self._fresh.items)

    def refresh(self) -> None:
        """Take in what the store was told since the last time."""
        for one in self._store.news(self.bundle.key, self._seq):
            self._seq = one.seq
            row = self._row(one.item_id)
            if row is not None:
                self._hidden[row] = True
            self._fresh.items.pop(one.item_id, None)
            if one.upsert is not None:
                self._fresh.items[one.item_id] = one.upsert
            self._fresh.vectors = None

    def _row(self, item_id: str) -> int | None:
        found = self._items.execute("SELECT row FROM items WHERE item_id = ?", (item_id,)).fetchone()
        return int(found[0]) if found else None

    def search(self, vector: np.ndarray, k: int, filters: Filters) -> list[Hit]:
        """The best `k` items by cosine; equal scores in the order of their ids.

        Args:
            vector: [D] float32, of unit length.
        """
        hits = [*self._search_index(vector, k, filters), *self._search_fresh(vector, k, filters)]
        return sorted(hits, key=lambda hit: (-hit.score, hit.item_id))[:k]

    def _search_index(self, vector: np.ndarray, k: int, filters: Filters) -> Iterator[Hit]:
        allowed = None if not self._hidden.any() else ~self._hidden
        if filters:
            wanted = self._matching(filters)
            allowed = wanted if allowed is None else wanted & allowed
        if not self._index.ntotal or (allowed is not None and not allowed.any()):
            return
        scores, rows = search_index(
            self._index, vector[None], min(k, self._index.ntotal), self.bundle.index, allowed=allowed
        )
        for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True):
            if row >= 0:
                record = self._record(row)
                yield Hit(record.item_id, score, record.title, record.category, record.product_id, record.attributes)

    def _record(self, row: int) -> ItemRecord:
        found = self._items.execute(f"SELECT {_COLUMNS} FROM items WHERE row = ?", (row,)).fetchone()
        return ItemRecord(*found)

    def _matching(self, filters: Filters) -> np.ndarray:
        """[N] bool."""
        found = np.ones(self._index.ntotal, dtype=bool)
        queries: list[tuple[str, tuple[str, ...]]] = []
        if filters.category is not None:
            queries.append(("SELECT row FROM items WHERE category = ?", (filters.category,)))
        queries += [("SELECT row FROM pairs WHERE name = ? AND value = ?", pair) for pair in filters.attributes]
        for query, values in queries:
            rows = np.fromiter((row[0] for row in self._items.execute(query, values)), dtype=np.int64)
            one = np.zeros(len(found), dtype=bool)
            one[rows] = True
            found &= one
        return found

    def _search_fresh(self, vector: np.ndarray, k: int, filters: Filters) -> Iterator[Hit]:
        if not self._fresh.items:
            return
        items = list(self._fresh.items.values())
        scores = self._fresh.matrix() @ vector
        if filters:
            scores = np.where([_matches(item, filters) for item in items], scores, -np.inf)
        for place in np.argsort(-scores, kind="stable")[: k + _ties(scores, k)].tolist():
            if np.isfinite(scores[place]):
                item = items[place]
                yield Hit(
                    item.item_id,
                    float(scores[place]),
                    item.title,
                    item.category,
                    item.product_id,
                    item.attributes,
                )

    def get(self, item_id: str) -> ItemRecord | None:
        """An item that can be found."""
        fresh = self._fresh.items.get(item_id)
        if fresh is not None:
            stored = self._store.item(item_id)
            small = stored.thumbnail if stored is not None else None
            return ItemRecord(item_id, fresh.title, fresh.category, fresh.product_id, fresh.attributes, small)
        row = self._row(item_id)
        return self._record(row) if row is not None and not self._hidden[row] else None

    def merge(self, folder: str) -> int:
        """Write the index with everything taken in to a new folder.

        Returns:
            Sequence number up to which it has everything.
        """
        rows, fresh, seq = np.flatnonzero(~self._hidden), list(self._fresh.items), self._seq
        vectors = stored_vectors(self._index, rows)
        if fresh:
            vectors = np.concatenate([vectors, self._fresh.matrix()])

        def records() -> Iterator[ItemRecord]:
            for row in rows.tolist():
                yield self._record(row)
            yield from filter(None, map(self.get, fresh))

        partial = f"{folder}.{uuid.uuid4().hex}.partial"
        os.makedirs(partial)
        save_index(build_index(vectors, self.bundle.index), os.path.join(partial, VECTORS))
        write_items(os.path.join(partial, ITEMS), records())
        os.replace(partial, folder)
        return seq

    def close(self) -> None:
        self._items.close()


class LiveIndex:
    """What an index replica does: indexes of the bundles it has seen, one store, and the answers of the API.

    Args:
        state_dir: of the store.
        bundle: served where nothing was served before.
        rounds_kept: indexes that stay open.
        max_delta_items: items put in, above which they are merged.
    """

    def __init__(self, state_dir: str, bundle: Bundle, *, rounds_kept: int, max_delta_items: int) -> None:
        self._rounds_kept, self._merge_above = rounds_kept, max_delta_items
        self.store = ItemStore(state_dir)
        self._state = self.store.start(bundle)
        self._version = self.store.version()
        self._open: dict[str, tuple[tuple[str, int], RoundIndex]] = {}
        self.current()

    @property
    def state(self) -> State:
        """What is served, as every replica sees it."""
        self._look()
        return self._state

    def _look(self) -> None:
        version = self.store.version()
        if version != self._version:
            self._news()
            self._version = version

    def _news(self) -> None:
        state = self.store.state()
        assert state is not None
        self._state = state
        for _, index in self._open.values():
            index.refresh()

    def current(self) -> RoundIndex:
        """The index that answers."""
        return self.prepare(self.state.current)

    def prepare(self, bundle: Bundle) -> RoundIndex:
        """Open the index of a bundle, or what its news were merged into since."""
        merged = self.store.merged(bundle.key)
        source = merged if merged is not None else (bundle.index_path, 0)
        held = self._open.pop(bundle.key, None)
        if held is None or held[0] != tuple(source):
            held = (source[0], source[1]), RoundIndex(bundle, self.store, localised(source[0]), source[1])
            held[1].refresh()
        self._open[bundle.key] = held
        while len(self._open) > self._rounds_kept:
            oldest = next(iter(self._open))
            self._open.pop(oldest)[1].close()
        return held[1]

    def search(self, key: str, vector: np.ndarray, k: int, filters: Filters) -> list[Hit] | None:
        """See `RoundIndex.search`; none where another bundle is served by now, so that the vector says nothing."""
        index = self.current()
        return index.search(vector, k, filters) if index.bundle.key == key else None

    def write(self, change: Callable[[ItemStore], Any]) -> Any:
        """Change the store, and see the change at once."""
        found = change(self.store)
        self._news()
        return found

    @property
    def merge_is_due(self) -> bool:
        """Whether much was put in since the index was built."""
        return self.current().unmerged > self._merge_above


def merge(state_dir: str, bundle: Bundle) -> str | None:
    """Write a bundle's index with everything that was put in since, for all replicas to go over to.

    Has a connection and an index of its own, so that searches go on meanwhile.

    Returns:
        The new index's folder; none if another replica is at it.
    """
    store = ItemStore(state_dir)
    try:
        if not store.acquire_lock("merge", _MERGE_LEASE_S):
            return None
        source, since = store.merged(bundle.key) or (bundle.index_path, 0)
        index = RoundIndex(bundle, store, localised(source), since)
        index.refresh()
        folder = os.path.join(state_dir, "merged", f"{bundle.key}-{uuid.uuid4().hex[:8]}")
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        store.set_merged(bundle.key, folder, index.merge(folder))
        index.close()
        store.release("merge")
        return folder
    finally:
        store.close()


def localised(path: str) -> str:
    """A local folder with an index, copied once per node."""
    return storage.localise(path, os.path.join(tempfile.gettempdir(), f"afmrl_ray-{getpass.getuser()}", "index"))


def _ties(scores: np.ndarray, k: int) -> int:
    """How many further scores equal the k-th best, so that none is left out by its place."""
    if len(scores) <= k:
        return 0
    edge = np.partition(-scores, k - 1)[k - 1]
    return int((-scores <= edge).sum()) - k


def _matches(item: UpsertedItem, filters: Filters) -> bool:
    if filters.category is not None and item.category != filters.category:
        return False
    return set(filters.attributes) <= set(stored_attributes(item.attributes))
