"""The files of an index folder, and the SQLite table of what is shown of every item and filtered by."""

from __future__ import annotations

import io
import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from afmrl_ray.attributes.text import stored_attributes

VECTORS = "vectors.faiss"
"""File of the FAISS index; the id of a vector is the item's row in the table."""
ITEMS = "items.sqlite"
"""File of the item table."""

_SCHEMA = """
CREATE TABLE items (
    row INTEGER PRIMARY KEY, item_id TEXT NOT NULL UNIQUE, title TEXT NOT NULL, category TEXT, product_id TEXT,
    attributes TEXT NOT NULL, thumbnail BLOB
);
CREATE TABLE pairs (name TEXT NOT NULL, value TEXT NOT NULL, row INTEGER NOT NULL);
"""
_INDEXES = """
CREATE INDEX items_category ON items (category, row);
CREATE INDEX pairs_value ON pairs (name, value, row);
"""
_COLUMNS = "item_id, title, category, product_id, attributes, thumbnail"


class ItemRecord(NamedTuple):
    """An item as it is shown and filtered.

    Attributes:
        attributes: canonical attribute text.
        thumbnail: JPEG.
    """

    item_id: str
    title: str
    category: str | None
    product_id: str | None
    attributes: str
    thumbnail: bytes | None


def write_items(path: str, records: Iterable[ItemRecord]) -> None:
    """Write an item table to a new local file; an item's row is its position in `records`."""
    connection = sqlite3.connect(path)
    try:
        connection.executescript(_SCHEMA)
        for row, record in enumerate(records):
            connection.execute("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?)", (row, *record))
            pairs = [(*pair, row) for pair in stored_attributes(record.attributes)]
            connection.executemany("INSERT INTO pairs VALUES (?, ?, ?)", pairs)
        connection.executescript(_INDEXES)
        connection.commit()
    finally:
        connection.close()


class ItemTable:
    """Reads an item table; to be used from one thread at a time.

    Args:
        path: local file, which nobody changes while it is open.
    """

    def __init__(self, path: str) -> None:
        # Percent-encoded: SQLite would end the path at a `?` or `#`.
        uri = Path(os.path.abspath(path)).as_uri()
        self._db = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, check_same_thread=False)

    def row(self, item_id: str) -> int | None:
        """Row of an item, or None if it is not in the table."""
        found = self._db.execute("SELECT row FROM items WHERE item_id = ?", (item_id,)).fetchone()
        return int(found[0]) if found else None

    def record(self, row: int) -> ItemRecord:
        """The item at a row."""
        return ItemRecord(*self._db.execute(f"SELECT {_COLUMNS} FROM items WHERE row = ?", (row,)).fetchone())

    def rows_of_category(self, category: str) -> np.ndarray:
        """Rows [M] int64 of the items of a category."""
        return self._rows("SELECT row FROM items WHERE category = ?", (category,))

    def rows_with_attribute(self, name: str, value: str) -> np.ndarray:
        """Rows [M] int64 of the items that have an attribute, both parts in normal form."""
        return self._rows("SELECT row FROM pairs WHERE name = ? AND value = ?", (name, value))

    def _rows(self, query: str, values: Sequence[str]) -> np.ndarray:
        return np.fromiter((row for (row,) in self._db.execute(query, values)), dtype=np.int64)

    def close(self) -> None:
        self._db.close()


def thumbnail(image: Image.Image, longest_px: int) -> bytes:
    """A JPEG of an image, its longer side at most `longest_px` pixels."""
    small = image.convert("RGB")
    small.thumbnail((longest_px, longest_px))
    target = io.BytesIO()
    small.save(target, "JPEG", quality=85)
    return target.getvalue()
