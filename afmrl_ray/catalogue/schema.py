"""The columns of a catalogue, one row per item.

Required are item_id (string, unique), split (train, val, test or gallery), and image (encoded bytes) or image_uri.
product_id (identity of the product; null = unknown), category, title, attributes (a map, a list of pairs or JSON, as
the source gives them, see `values.parse_source_attributes`) and role (query or gallery, for evaluation) may be null or
missing. Further columns are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from afmrl_ray import storage

REQUIRED = ("item_id", "split")
IMAGE_COLUMNS = ("image", "image_uri")
NULLABLE = ("product_id", "category", "title", "attributes", "role")


@dataclass(frozen=True)
class Item:
    """One item.

    Attributes:
        row: its row in the catalogue.
        item_id: its unique id.
        product_id: identity of the product; items with the same one are positives of each other; none = unknown.
        category: coarse label.
        title: the seller's text.
        attributes: of the source, in its order.
        split: train, val, test or gallery.
        role: query or gallery, for evaluation.
        extra: the catalogue's further columns.
    """

    row: int
    item_id: str
    product_id: str | None
    category: str | None
    title: str | None
    attributes: dict[str, str]
    split: str
    role: str | None
    extra: dict[str, Any] = field(default_factory=dict)


def write_catalogue(table: pa.Table, path: str) -> None:
    """Write a catalogue as one Parquet file, atomically, on any filesystem.

    Raises:
        StorageError: the path cannot be written.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=1024)
    storage.write_bytes(path, sink.getvalue().to_pybytes())
