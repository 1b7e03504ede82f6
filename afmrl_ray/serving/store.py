"""The write-ahead record of what was put in and taken out: one SQLite file that all replicas of the index share.

A write is durable when it returns (`synchronous=FULL`), and searches see it: replicas look for news before they answer.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from afmrl_ray.serving.bundle import Bundle

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


@dataclass(frozen=True)
class StoredItem:
    """An item as it was put in.

    Attributes:
        item_id: unique.
        title: the seller's text.
        category: coarse label.
        product_id: identity.
        given: attribute text that came with the item; none = the generator writes it, for every round anew.
        image: encoded.
        thumbnail: small JPEG.
    """

    item_id: str
    title: str
    category: str | None
    product_id: str | None
    given: str | None
    image: bytes | None
    thumbnail: bytes | None


@dataclass(frozen=True)
class Embedded:
    """An item's attributes and vector under a bundle; `vector` is [D] float32."""

    attributes: str
    vector: np.ndarray


@dataclass(frozen=True)
class UpsertedItem:
    """An item as searches see it; `vector` is [D] float32."""

    item_id: str
    title: str
    category: str | None
    product_id: str | None
    attributes: str
    vector: np.ndarray


@dataclass(frozen=True)
class News:
    """A change since a sequence number.

    Attributes:
        seq: of the change.
        item_id: which item.
        put: as it is now, under the bundle that was asked for; none = it was taken out.
    """

    seq: int
    item_id: str
    upsert: UpsertedItem | None


@dataclass(frozen=True)
class State:
    """What is served.

    Attributes:
        current: answers searches.
        rolling: is being made ready to take over; none = nothing is.
        history: bundles that were served before, the last one last.
    """

    current: Bundle
    rolling: Bundle | None
    history: tuple[Bundle, ...]

    @property
    def needed(self) -> dict[str, Bundle]:
        """Bundles under which a new item must be embedded, by key."""
        return {bundle.key: bundle for bundle in (self.current, self.rolling) if bundle is not None}


class ItemStore:
    """One connection; to be used from one thread at a time."""

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
        """A number that changes when another connection has written."""
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
        """What is served; none before the first start."""
        current, rolling = self._get("current"), self._get("rolling")
        if current is None:
            return None
        history = json.loads(self._get("history") or "[]")
        return State(
            Bundle.model_validate_json(current),
            Bundle.model_validate_json(rolling) if rolling is not None else None,
            tuple(Bundle.model_validate(one) for one in history),
        )

    def start(self, bundle: Bundle) -> State:
        """What is served: `bundle`, unless something is already."""
        with self._writing():
            if self._get("current") is None:
                self._set("current", bundle.model_dump_json())
        found = self.state()
        assert found is not None
        return found

    def begin_switch(self, bundle: Bundle) -> None:
        """From now on every item that is put in is embedded under `bundle` too; replaces a switch under way."""
        with self._writing():
            self._set("rolling", bundle.model_dump_json())

    def finish_switch(self, key: str) -> bool:
        """Serve the bundle that is rolling, unless it is another one by now or an item lacks a vector under it."""
        with self._writing():
            state = self.state()
            if state is None or state.rolling is None or state.rolling.key != key or self._lacking(key, 1):
                return False
            before = [one.model_dump(mode="json") for one in (*state.history, state.current) if one.key != key]
            self._set("history", json.dumps(before[-8:]))
            self._set("current", state.rolling.model_dump_json())
            self._set("rolling", None)
        return True

    def _lacking(self, key: str, limit: int) -> list[str]:
        found = self._db.execute(
            "SELECT item_id FROM items WHERE NOT deleted AND item_id NOT IN "
            "(SELECT item_id FROM vectors WHERE bundle = ?) ORDER BY seq LIMIT ?",
            (key, limit),
        )
        return [row[0] for row in found]

    def lacking(self, key: str, limit: int) -> list[StoredItem]:
        """Items that have no vector under a bundle."""
        return [item for item_id in self._lacking(key, limit) if (item := self.item(item_id)) is not None]

    def upsert(self, item: StoredItem, embedded: Mapping[str, Embedded]) -> dict[str, Bundle] | None:
        """Put an item in, over one of the same id.

        Args:
            embedded: by bundle key.

        Returns:
            None once it is durable; else nothing was written, and these bundles are needed too.
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
                # Vectors under other bundles are of the item as it was.
                self._db.execute("DELETE FROM vectors WHERE item_id = ?", (item.item_id,))
                for key, each in embedded.items():
                    self._put_vector(item.item_id, key, seq, each)
        return missing or None

    def add_vector(self, item: StoredItem, key: str, embedded: Embedded) -> None:
        """Add what an item is under a further bundle, unless the item was replaced or taken out meanwhile."""
        with self._writing():
            if self.item(item.item_id) == item:
                self._put_vector(item.item_id, key, self._next_seq(), embedded)

    def _put_vector(self, item_id: str, key: str, seq: int, embedded: Embedded) -> None:
        vector = np.ascontiguousarray(embedded.vector, dtype=np.float32).tobytes()
        self._db.execute(
            "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?, ?)", (item_id, key, seq, embedded.attributes, vector)
        )

    def delete(self, item_id: str) -> None:
        """Take an item out for good, from every round's index too."""
        with self._writing():
            self._db.execute("DELETE FROM vectors WHERE item_id = ?", (item_id,))
            self._db.execute(
                "INSERT OR REPLACE INTO items VALUES (?, ?, 1, '', NULL, NULL, NULL, NULL, NULL)",
                (item_id, self._next_seq()),
            )

    def item(self, item_id: str) -> StoredItem | None:
        """An item that was put in and not taken out."""
        row = self._db.execute(
            "SELECT item_id, title, category, product_id, given, image, thumbnail FROM items "
            "WHERE item_id = ? AND NOT deleted",
            (item_id,),
        ).fetchone()
        return StoredItem(*row) if row else None

    def known(self, item_id: str) -> bool | None:
        """True = it is in, False = it was taken out, none = nothing was ever said about it."""
        row = self._db.execute("SELECT deleted FROM items WHERE item_id = ?", (item_id,)).fetchone()
        return None if row is None else not row[0]

    def news(self, key: str, since: int) -> list[News]:
        """What changed after a sequence number, in order."""
        upsert = self._db.execute(
            "SELECT v.seq, i.item_id, i.title, i.category, i.product_id, v.attributes, v.vector "
            "FROM vectors v JOIN items i USING (item_id) WHERE v.bundle = ? AND v.seq > ?",
            (key, since),
        )
        found = [
            News(
                seq,
                item_id,
                UpsertedItem(item_id, title, category, product_id, text, np.frombuffer(vector, np.float32)),
            )
            for seq, item_id, title, category, product_id, text, vector in upsert
        ]
        gone = self._db.execute("SELECT seq, item_id FROM items WHERE deleted AND seq > ?", (since,))
        found += [News(seq, item_id, None) for seq, item_id in gone]
        return sorted(found, key=lambda one: one.seq)

    def merged(self, key: str) -> tuple[str, int] | None:
        """Folder of the last index that news were merged into, and the sequence number up to which they are in it."""
        found = self._get(f"merged:{key}")
        if found is None:
            return None
        folder, seq = json.loads(found)
        return folder, seq

    def set_merged(self, key: str, folder: str, seq: int) -> None:
        """Tell all replicas of an index that news were merged into."""
        with self._writing():
            self._set(f"merged:{key}", json.dumps([folder, seq]))

    def acquire_lock(self, name: str, seconds: float) -> bool:
        """Take a task that one replica does at a time; a lock that was not released ends by itself."""
        with self._writing():
            until = self._get(f"lock:{name}")
            if until is not None and float(until) > time.time():
                return False
            self._set(f"lock:{name}", str(time.time() + seconds))
        return True

    def release(self, name: str) -> None:
        """Release a lock."""
        with self._writing():
            self._set(f"lock:{name}", None)

    def close(self) -> None:
        self._db.close()
