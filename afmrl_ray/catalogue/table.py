"""Access to the rows of a catalogue's table, in memory or memory-mapped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from afmrl_ray.catalogue.images import decode_image
from afmrl_ray.catalogue.schema import NULLABLE, REQUIRED, Item
from afmrl_ray.catalogue.values import parse_source_attributes, text_value
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.errors import CatalogueError

_KNOWN = {*REQUIRED, *NULLABLE, "image"}


class CatalogueTable:
    """Random access to a table of usable rows.

    Args:
        table: the columns of `catalogue.schema`, with encoded images in `image`.
        name: of the catalogue, for messages.
        fingerprint: digest of the rows' content.
    """

    def __init__(self, table: pa.Table, name: str, fingerprint: str) -> None:
        self.table = table
        self.name = name
        self.fingerprint = fingerprint
        self._columns: dict[str, list[Any]] = {}
        self._batches = table.select(["image"]).to_batches()
        self._starts = np.cumsum([0, *[len(batch) for batch in self._batches]])

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> list[Any]:
        """Values of a column, in row order.

        Raises:
            CatalogueError: there is no such column.
        """
        if name not in self._columns:
            if name not in self.table.column_names:
                known = ", ".join(column for column in self.table.column_names if column != "image")
                raise CatalogueError(f"{self.name} has no column {name!r}; it has: {known}")
            self._columns[name] = self.table[name].to_pylist()
        return self._columns[name]

    def rows(self, selector: ItemSelector) -> np.ndarray:
        """Indices [N] int64 of the rows that a selector matches, ascending.

        Raises:
            CatalogueError: a column of `where` or `title_columns` is missing, or no row matches.
        """
        keep = np.isin(np.array(self.column("split"), dtype=object).astype(str), list(selector.split))
        wanted = {**({"role": selector.role} if selector.role is not None else {}), **selector.where}
        for name, value in wanted.items():
            keep &= np.array([value in (str(found), text_value(found)) for found in self.column(name)])
        if selector.inputs != "image":
            for name in selector.title_columns:
                self.column(name)
        found = np.flatnonzero(keep)
        if not len(found):
            conditions = "".join(f", {name} {value!r}" for name, value in wanted.items())
            raise CatalogueError(
                f"{self.name} has no row of split {' or '.join(selector.split)}{conditions}; it has the splits: "
                + ", ".join(sorted({str(split) for split in self.column("split")}))
            )
        return found.astype(np.int64)

    def rows_of_any(self, selectors: Iterable[ItemSelector]) -> np.ndarray:
        """Indices [N] int64 of the rows that at least one selector matches, each once, ascending.

        Raises:
            CatalogueError: see `rows`.
        """
        return np.unique(np.concatenate([self.rows(selector) for selector in selectors]))

    def item(self, row: int) -> Item:
        """One item without its image."""
        values = {name: self.column(name)[row] for name in self.table.column_names if name != "image"}
        return Item(
            row=row,
            item_id=values["item_id"],
            product_id=values["product_id"],
            category=values["category"],
            title=values["title"],
            attributes=parse_source_attributes(values["attributes"]),
            split=values["split"],
            role=values["role"],
            extra={name: value for name, value in values.items() if name not in _KNOWN},
        )

    def title(self, row: int, columns: tuple[str, ...] = ("title",)) -> str:
        """Texts of the given columns, joined by a space; nulls are skipped."""
        return " ".join(text for name in columns if (text := self.column(name)[row]))

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row."""
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[batch].column(0)[row - int(self._starts[batch])].as_py()

    def image(self, row: int) -> Image.Image:
        """The decoded image of a row, RGB, see `decode_image`."""
        return decode_image(self.image_bytes(row))


def check_positives(
    catalogue: CatalogueTable, query: ItemSelector, gallery: ItemSelector, label: str = "product_id"
) -> None:
    """Check that some query has a positive: another item with the same `label` in the gallery.

    Raises:
        CatalogueError: a selector matches no row, or no query has a positive.
    """
    labels = catalogue.column(label)
    rows_of_label: dict[Any, set[int]] = {}
    for row in catalogue.rows(gallery).tolist():
        if labels[row] is not None:
            rows_of_label.setdefault(labels[row], set()).add(row)
    if not any(rows_of_label.get(labels[row], set()) - {row} for row in catalogue.rows(query).tolist()):
        raise CatalogueError(
            f"{catalogue.name}: no query of split {' or '.join(query.split)} shares its {label} with another item of "
            f"split {' or '.join(gallery.split)}, so there are no positives; check split and role of both"
        )
