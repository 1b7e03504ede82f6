"""Attribute tables: the attributes of many items in one Parquet file, with the fingerprint of their generator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from afmrl_ray import storage
from afmrl_ray.attributes.text import Attributes, InvalidAttributes, format_attributes, stored_attributes
from afmrl_ray.errors import CatalogueError

_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("attributes", pa.string(), nullable=False),
        pa.field("valid", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("generator", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class AttributeRow:
    """One item's attributes.

    Attributes:
        item_id: the item.
        text: canonical attribute text; empty if invalid.
        reason: why the text is invalid; none (or empty) if it is valid.
    """

    item_id: str
    text: str
    reason: str | None = None

    @classmethod
    def of(cls, item_id: str, result: Attributes | InvalidAttributes) -> AttributeRow:
        """The row for a result of a parser or teacher."""
        if isinstance(result, InvalidAttributes):
            return cls(item_id, "", result.reason)
        return cls(item_id, format_attributes(result))


class MeanLength(NamedTuple):
    """Mean size of valid attributes: number of pairs, and number of words of the text."""

    pairs: float
    words: float


class AttributeStore:
    """Attribute texts by item, in memory.

    Attributes:
        fingerprint: of the generator or teacher that wrote them.
    """

    def __init__(self, texts: dict[str, str], reasons: dict[str, str], fingerprint: str) -> None:
        self._texts = texts
        self._reasons = reasons
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._texts) + len(self._reasons)

    def text(self, item_id: str) -> str:
        """Canonical attribute text of an item; empty if it is invalid or the table lacks the item."""
        return self._texts.get(item_id, "")

    def get(self, item_id: str) -> Attributes:
        """Attributes of an item; empty if they are invalid or the table lacks the item."""
        return stored_attributes(self.text(item_id))

    @property
    def invalid_fraction(self) -> float:
        """Fraction of the rows that are invalid."""
        return len(self._reasons) / max(1, len(self))

    @property
    def reasons(self) -> dict[str, int]:
        """Number of invalid rows by reason."""
        return dict(Counter(self._reasons.values()))

    @property
    def mean_length(self) -> MeanLength:
        """Mean size over the valid rows; zero if there are none."""
        count = max(1, len(self._texts))
        pairs = sum(text.count(";") + 1 for text in self._texts.values())
        words = sum(len(text.split()) for text in self._texts.values())
        return MeanLength(pairs / count, words / count)


def write_attributes(path: str, rows: Iterable[AttributeRow], *, fingerprint: str) -> None:
    """Write an attribute table to `path`, one Parquet file on any filesystem.

    Args:
        path: local or URI.
        rows: one per item.
        fingerprint: of the generator or teacher.

    Raises:
        CatalogueError: `rows` is empty, contains an item twice, or contains a text that is not canonical.
        StorageError: the path cannot be written.
    """
    rows = list(rows)
    if not rows:
        raise CatalogueError(f"{path}: no item to write attributes of; check annotate.items and distill.items")
    ids = [row.item_id for row in rows]
    if len(set(ids)) < len(ids):
        raise CatalogueError(f"{path}: item {Counter(ids).most_common(1)[0][0]!r} has attributes more than once")
    for row in rows:
        if bool(row.text) == bool(row.reason) or format_attributes(stored_attributes(row.text)) != row.text:
            raise CatalogueError(
                f"{path}: item {row.item_id!r} needs either canonical attribute text or a reason, "
                f"got {row.text!r} and {row.reason!r}"
            )
    columns = {
        "item_id": ids,
        "attributes": [row.text for row in rows],
        "valid": [bool(row.text) for row in rows],
        "reason": [row.reason or None for row in rows],
        "generator": [fingerprint] * len(rows),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink)
    storage.write_bytes(path, sink.getvalue().to_pybytes())


def read_attributes(path: str, *, expect_fingerprint: str | None = None) -> AttributeStore:
    """Read a table of `write_attributes`.

    Args:
        path: local or URI.
        expect_fingerprint: of the generator that must have written the table; none = any.

    Raises:
        CatalogueError: the table is missing, lacks columns, or was written by another generator.
    """
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(path)))
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise CatalogueError(f"{path}: no attribute table ({reason}); write it with jobs/annotate.py") from error
    missing = [name for name in _SCHEMA.names if name not in table.column_names]
    if missing:
        raise CatalogueError(f"{path}: the attribute table lacks {', '.join(missing)}; write it with jobs/annotate.py")
    generators = table["generator"].unique().to_pylist()
    if len(generators) != 1:
        raise CatalogueError(
            f"{path}: attributes of {len(generators)} generators in one table; keep one table for each"
        )
    if expect_fingerprint is not None and generators[0] != expect_fingerprint:
        raise CatalogueError(
            f"{path}: written by generator {generators[0]}, not by {expect_fingerprint}; annotate again with the latter"
        )
    texts: dict[str, str] = {}
    reasons: dict[str, str] = {}
    columns = (table[name].to_pylist() for name in ("item_id", "attributes", "valid", "reason"))
    for item_id, text, valid, reason in zip(*columns, strict=True):
        if valid:
            texts[item_id] = text
        else:
            reasons[item_id] = reason
    return AttributeStore(texts, reasons, generators[0])
