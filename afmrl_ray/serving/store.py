"""The record of upserts and deletions: one SQLite file that all replicas of the index share.

A write is durable when it returns (`synchronous=FULL`). Every replica looks for changes before it answers, so the next
search sees it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from pydantic import ValidationError

from afmrl_ray.errors import ConfigError
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.records import Change, DeltaItem, EmbeddedItem, State, StoredItem

_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    item_id TEXT PRIMARY KEY, seq INTEGER NOT NULL, deleted INTEGER NOT NULL, title TEXT NOT NULL, category TEXT,
    product_id TEXT, given TEXT, image BLOB, thumbnail BLOB
);
CREATE INDEX IF NOT EXISTS items_seq ON items (seq);
CREATE TABLE IF NOT EXISTS vectors (
    item_id TEXT NOT NULL, bundle TEXT NOT NULL, seq INTEGER NOT NULL, attributes TEXT NOT NULL, vector BLOB NOT NULL,
    PRIMARY KEY (item_id, bundle)
);
CREATE INDEX IF NOT EXISTS vectors_seq ON vectors (bundle, seq);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_BUSY_S = 20
_HISTORY = 8


class ItemStore:
    """One connection; to be used from one thread at a time.

    Args:
        state_dir: local folder of the file, created if it is missing.
    """

    def __init__(self, state_dir: str) -> None:
        os.makedirs(state_dir, exist_ok=True)
        self.path = os.path.join(state_dir, "items.sqlite")
        self._db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        # A rollback journal, since a shared network folder cannot hold SQLite's write-ahead log; as durable.
        self._db.execute("PRAGMA journal_mode=TRUNCATE")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def version(self) -> int:
        """A number that changes when another connection has written to the file."""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def _get(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def _set(self, key: str, value: str | None) -> None:
        if value is None:
            self._db.execute("DELETE FROM meta WHERE key = ?", (key,))
        else:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def _next_seq(self) -> int:
        seq = int(self._get("seq") or 0) + 1
        self._set("seq", str(seq))
        return seq

    def state(self) -> State | None:
        """What is served; None before the first start.

        Raises:
            ConfigError: the file was written by another version of the package.
        """
        current, target = self._get("current"), self._get("switching_to")
        if current is None:
            return None
        history = json.loads(self._get("history") or "[]")
        try:
            return State(
                Bundle.model_validate_json(current),
                Bundle.model_validate_json(target) if target is not None else None,
                tuple(Bundle.model_validate(bundle) for bundle in history),
            )
        except ValidationError as error:
            raise ConfigError(
                f"state_dir: {self.path} was written by another version of afmrl_ray; name a new folder, and upsert "
                "the items of the old one again"
            ) from error

    def start(self, bundle: Bundle) -> State:
        """Serve `bundle`, unless a bundle is served already; returns what is served."""
        with self._writing():
            if self._get("current") is None:
                self._set("current", bundle.model_dump_json())
        found = self.state()
        assert found is not None
        return found

    def begin_switch(self, bundle: Bundle) -> None:
        """Begin a switch to `bundle`, instead of one under way: every upsert now needs a vector under it too."""
        with self._writing():
            self._set("switching_to", bundle.model_dump_json())

    def finish_switch(self, key: str) -> bool:
        """Serve the bundle `key`, unless the switch is to another one by now or an item has no vector under it.

        Returns:
            Whether it is served.
        """
        with self._writing():
            state = self.state()
            if state is None or state.switching_to is None or state.switching_to.key != key:
                return False
            if self._without_vector(key, 1):
                return False
            before = [bundle.model_dump(mode="json") for bundle in (*state.history, state.current) if bundle.key != key]
            self._set("history", json.dumps(before[-_HISTORY:]))
            self._set("current", state.switching_to.model_dump_json())
            self._set("switching_to", None)
        return True

    def _without_vector(self, key: str, limit: int) -> list[str]:
        found = self._db.execute(
            "SELECT item_id FROM items WHERE NOT deleted AND item_id NOT IN "
            "(SELECT item_id FROM vectors WHERE bundle = ?) ORDER BY seq LIMIT ?",
            (key, limit),
        )
        return [row[0] for row in found]

    def without_vector(self, key: str, limit: int) -> list[StoredItem]:
        """Up to `limit` items that have no vector under a bundle, the oldest first."""
        return [item for item_id in self._without_vector(key, limit) if (item := self.item(item_id)) is not None]

    def upsert(self, item: StoredItem, embedded: Mapping[str, EmbeddedItem]) -> dict[str, Bundle] | None:
        """Insert an item, or replace the one of the same id.

        Args:
            item: the item.
            embedded: what each bundle's models make of it, by bundle key.

        Returns:
            None once it is durable; otherwise nothing was written, and these bundles, by key, are needed too.
        """
        with self._writing():
            state = self.state()
            assert state is not None
            missing = {key: bundle for key, bundle in state.needed.items() if key not in embedded}
            if not missing:
                seq = self._next_seq()
                self._db.execute(
                    "INSERT OR REPLACE INTO items VALUES (?, ?, 0, ?, ?, ?, ?, ?, ?)",
                    (
                        item.item_id,
                        seq,
                        *(item.title, item.category, item.product_id, item.given, item.image, item.thumbnail),
                    ),
                )
                # Vectors under other bundles belong to the replaced item.
                self._db.execute("DELETE FROM vectors WHERE item_id = ?", (item.item_id,))
                for key, each in embedded.items():
                    self._write_vector(item.item_id, key, seq, each)
        return missing or None

    def add_vector(self, item: StoredItem, key: str, embedded: EmbeddedItem) -> None:
        """Add the vector of an item under a further bundle, unless the item was replaced or deleted meanwhile."""
        with self._writing():
            if self.item(item.item_id) == item:
                self._write_vector(item.item_id, key, self._next_seq(), embedded)

    def _write_vector(self, item_id: str, key: str, seq: int, embedded: EmbeddedItem) -> None:
        vector = np.ascontiguousarray(embedded.vector, dtype=np.float32).tobytes()
        self._db.execute(
            "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?, ?)", (item_id, key, seq, embedded.attributes, vector)
        )

    def delete(self, item_id: str) -> None:
        """Delete an item, also from the index of every round."""
        with self._writing():
            self._db.execute("DELETE FROM vectors WHERE item_id = ?", (item_id,))
            self._db.execute(
                "INSERT OR REPLACE INTO items VALUES (?, ?, 1, '', NULL, NULL, NULL, NULL, NULL)",
                (item_id, self._next_seq()),
            )

    def item(self, item_id: str) -> StoredItem | None:
        """An item that was upserted and not deleted."""
        row = self._db.execute(
            "SELECT item_id, title, category, product_id, given, image, thumbnail FROM items "
            "WHERE item_id = ? AND NOT deleted",
            (item_id,),
        ).fetchone()
        return StoredItem(*row) if row else None

    def changes(self, key: str, since: int) -> list[Change]:
        """Upserts and deletions after a sequence number, in order; upserts with vectors under the bundle `key`."""
        upserted = self._db.execute(
            "SELECT v.seq, i.item_id, i.title, i.category, i.product_id, v.attributes, v.vector "
            "FROM vectors v JOIN items i USING (item_id) WHERE v.bundle = ? AND v.seq > ?",
            (key, since),
        )
        found = [
            Change(
                seq, item_id, DeltaItem(item_id, title, category, product_id, text, np.frombuffer(vector, np.float32))
            )
            for seq, item_id, title, category, product_id, text, vector in upserted
        ]
        deleted = self._db.execute("SELECT seq, item_id FROM items WHERE deleted AND seq > ?", (since,))
        found += [Change(seq, item_id, None) for seq, item_id in deleted]
        return sorted(found, key=lambda change: change.seq)

    def merged(self, key: str) -> tuple[str, int] | None:
        """Folder of the latest merged index of a bundle, and the sequence number up to which changes are in it."""
        found = self._get(f"merged:{key}")
        if found is None:
            return None
        folder, seq = json.loads(found)
        return folder, seq

    def set_merged(self, key: str, folder: str, seq: int) -> None:
        """Record a merged index, which all replicas open from then on; arguments as `merged` returns them."""
        with self._writing():
            self._set(f"merged:{key}", json.dumps([folder, seq]))

    def acquire_lock(self, name: str, seconds: float) -> bool:
        """Lock a task that one replica does at a time; a lock that is not released expires after `seconds`."""
        with self._writing():
            until = self._get(f"lock:{name}")
            if until is not None and float(until) > time.time():
                return False
            self._set(f"lock:{name}", str(time.time() + seconds))
        return True

    def release_lock(self, name: str) -> None:
        """Release a lock."""
        with self._writing():
            self._set(f"lock:{name}", None)

    def close(self) -> None:
        self._db.close()
