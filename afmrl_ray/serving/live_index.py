"""What a replica of the index does: the indexes of the bundles that it has open, over the shared store."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.records import State
from afmrl_ray.serving.round_index import Filters, Hit, RoundIndex
from afmrl_ray.serving.store import ItemStore

_MERGE_LOCK_S = 3600


class LiveIndex:
    """Answers from the index of the served bundle; every call first looks for changes by other replicas.

    Args:
        state_dir: folder of the store.
        bundle: served if nothing has been served from this `state_dir` before.
        rounds_kept: number of indexes that stay open.
        max_delta_items: number of upserted items above which they should be merged into the index files.
    """

    def __init__(self, state_dir: str, bundle: Bundle, *, rounds_kept: int, max_delta_items: int) -> None:
        self._rounds_kept, self._max_delta_items = rounds_kept, max_delta_items
        self.store = ItemStore(state_dir)
        self._state = self.store.start(bundle)
        self._version = self.store.version()
        self._open: dict[str, tuple[tuple[str, int], RoundIndex]] = {}
        self.current()

    @property
    def state(self) -> State:
        """What is served, the same for all replicas."""
        version = self.store.version()
        if version != self._version:
            self._refresh()
            self._version = version
        return self._state

    def _refresh(self) -> None:
        state = self.store.state()
        assert state is not None
        self._state = state
        for _, index in self._open.values():
            index.refresh()

    def current(self) -> RoundIndex:
        """The index of the served bundle."""
        return self.prepare(self.state.current)

    def prepare(self, bundle: Bundle) -> RoundIndex:
        """Open the index of a bundle: its latest merged one, or that of its stage."""
        merged = self.store.merged(bundle.key)
        source = merged if merged is not None else (bundle.index_path, 0)
        held = self._open.pop(bundle.key, None)
        if held is None or held[0] != source:
            held = source, RoundIndex(bundle, self.store, local_index(source[0]), source[1])
            held[1].refresh()
        self._open[bundle.key] = held
        while len(self._open) > self._rounds_kept:
            oldest = next(iter(self._open))
            self._open.pop(oldest)[1].close()
        return held[1]

    def search(self, key: str, vector: np.ndarray, k: int, filters: Filters) -> list[Hit] | None:
        """See `RoundIndex.search`; None if another bundle than `key` is served, whose vectors are not comparable."""
        index = self.current()
        return index.search(vector, k, filters) if index.bundle.key == key else None

    def write(self, change: Callable[[ItemStore], Any]) -> Any:
        """Change the store and apply the change at once; returns what `change` returns."""
        found = change(self.store)
        self._refresh()
        return found

    def delete(self, item_id: str) -> bool:
        """Delete an item; whether it existed."""
        exists = self.current().get(item_id) is not None
        if exists:
            self.write(lambda store: store.delete(item_id))
        return exists

    @property
    def merge_is_due(self) -> bool:
        """Whether more than `max_delta_items` were upserted since the index files were written."""
        return self.current().delta_items > self._max_delta_items


def merge(state_dir: str, bundle: Bundle) -> str | None:
    """Write index files of a bundle with all upserts and deletions applied, and let all replicas open them.

    Uses a connection and an index of its own, so that searches go on meanwhile.

    Returns:
        The new folder; None if another replica is merging.
    """
    store = ItemStore(state_dir)
    try:
        if not store.acquire_lock("merge", _MERGE_LOCK_S):
            return None
        source, since = store.merged(bundle.key) or (bundle.index_path, 0)
        index = RoundIndex(bundle, store, local_index(source), since)
        index.refresh()
        folder = os.path.join(state_dir, "merged", f"{bundle.key}-{uuid.uuid4().hex[:8]}")
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        store.set_merged(bundle.key, folder, index.write_merged(folder))
        index.close()
        store.release_lock("merge")
        return folder
    finally:
        store.close()


def local_index(path: str) -> str:
    """The local folder of an index; one at a URI is copied once per node."""
    return storage.localise(path, storage.user_cache("index"))
