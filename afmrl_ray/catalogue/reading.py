"""Reading a catalogue: schema, images, quarantine, fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections import Counter

import pyarrow as pa
import pyarrow.dataset as ds

from afmrl_ray import storage
from afmrl_ray.catalogue.checks import bad_rows
from afmrl_ray.catalogue.schema import IMAGE_COLUMNS, NULLABLE, REQUIRED, write_catalogue
from afmrl_ray.catalogue.table import CatalogueTable
from afmrl_ray.config.catalogue import CatalogueConfig
from afmrl_ray.errors import CatalogueError, StorageError


class Catalogue(CatalogueTable):
    """The usable rows of a catalogue, and the quarantine of the others."""

    def __init__(self, table: pa.Table, name: str, quarantine: pa.Table) -> None:
        super().__init__(table, name, fingerprint(table))
        self.quarantine = quarantine
        """item_id, row and reason of every quarantined row."""

    @property
    def counts(self) -> dict[str, object]:
        """Numbers of rows, of kept rows, and of quarantined rows by reason."""
        reasons = dict(Counter(self.quarantine["reason"].to_pylist()))
        return {"rows": len(self) + len(self.quarantine), "kept": len(self), "quarantined": reasons}

    def write_quarantine(self, path: str) -> None:
        """Write the quarantine as Parquet, even if it is empty."""
        write_catalogue(self.quarantine, path)


def open_catalogue(path: str, *, config: CatalogueConfig | None = None) -> Catalogue:
    """Read a Parquet file or directory, on any filesystem, and quarantine its unusable rows.

    Raises:
        CatalogueError: it is missing, lacks columns, has no usable row, or a greater fraction of unusable rows than
            `catalogue.max_bad_fraction`.
    """
    return check_table(_read(path), path, config=config)


def check_table(table: pa.Table, path: str, *, config: CatalogueConfig | None = None) -> Catalogue:
    """Quarantine the unusable rows of a table.

    Args:
        table: the catalogue's columns, see `catalogue.schema`.
        path: of the catalogue; relative image URIs start from its folder, and messages name it.
        config: limits; none = their defaults.

    Raises:
        CatalogueError: see `open_catalogue`.
    """
    config = config or CatalogueConfig()
    table = _with_images(_normalised(table, path), path)
    bad = bad_rows(table, config.max_image_pixels)
    rows = sorted(bad)
    quarantine = pa.table(
        {
            "item_id": pa.array([table["item_id"][row].as_py() for row in rows], pa.string()),
            "row": pa.array(rows, pa.int64()),
            "reason": pa.array([bad[row] for row in rows], pa.string()),
        }
    )
    if len(rows) > config.max_bad_fraction * len(table):
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(bad.values()).most_common())
        raise CatalogueError(
            f"{path}: {len(rows)} of {len(table)} rows are bad ({reasons}), more than catalogue.max_bad_fraction "
            f"{config.max_bad_fraction:g} allows; fix them or raise it"
        )
    good = table.filter(pa.array([row not in bad for row in range(len(table))])) if bad else table
    if not len(good):
        raise CatalogueError(f"{path}: the catalogue has no rows")
    return Catalogue(good, path, quarantine)


def fingerprint(table: pa.Table) -> str:
    """SHA-256 of column names, types and values in order; independent of the file's row groups."""
    total = hashlib.sha256()
    for name in sorted(table.column_names):
        column = table[name]
        total.update(f"{name}:{column.type}:{len(column)}".encode())
        for chunk in column.chunks:
            for value in chunk.to_pylist():
                encoded = value if isinstance(value, bytes) else repr(value).encode()
                total.update(f":{len(encoded)}:".encode())
                total.update(encoded)
    return total.hexdigest()


def _read(path: str) -> pa.Table:
    filesystem, inner = storage.resolve(path)
    if not storage.exists(path):
        raise CatalogueError(f"catalogue.path: {path} does not exist")
    try:
        files: str | list[str] = inner
        if storage.is_dir(path):
            # The folder may also contain the images.
            files = [storage.join(inner, name) for name in storage.list_files(path) if name.endswith(".parquet")]
        if not files:
            raise CatalogueError(f"catalogue.path: {path} contains no .parquet file")
        return ds.dataset(files, filesystem=filesystem, format="parquet").to_table()
    except (OSError, pa.ArrowException) as error:
        raise CatalogueError(f"catalogue.path: {path} is no Parquet ({' '.join(str(error).split())[:160]})") from error


def _normalised(table: pa.Table, path: str) -> pa.Table:
    missing = [name for name in REQUIRED if name not in table.column_names]
    if not any(name in table.column_names for name in IMAGE_COLUMNS):
        missing.append("image or image_uri")
    if missing:
        raise CatalogueError(
            f"{path}: the catalogue lacks the columns {', '.join(missing)}; it has: {', '.join(table.column_names)}"
        )
    for name in NULLABLE:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), pa.string()))
    for name in ("item_id", "split", "product_id", "category", "title", "role"):
        index = table.column_names.index(name)
        try:
            table = table.set_column(index, name, table[name].cast(pa.string()))
        except pa.ArrowException as error:
            raise CatalogueError(f"{path}: column {name} is {table[name].type}, it must be text") from error
    return table


def _with_images(table: pa.Table, path: str) -> pa.Table:
    """The table with encoded images in `image`; images given by URI are read, relative ones from its folder."""
    if "image" in table.column_names:
        if not pa.types.is_binary(table["image"].type) and not pa.types.is_large_binary(table["image"].type):
            raise CatalogueError(
                f"{path}: column image is {table['image'].type}, it must contain encoded images (binary)"
            )
        return table
    folder = path if storage.is_dir(path) else os.path.dirname(path)
    images = [_read_image(uri, folder) for uri in table["image_uri"].to_pylist()]
    return table.append_column("image", pa.array(images, pa.binary()))


def _read_image(uri: str | None, folder: str) -> bytes | None:
    if not uri:
        return None
    full = uri if "://" in uri or os.path.isabs(uri) else storage.join(folder or ".", uri)
    try:
        return storage.read_bytes(full) if storage.exists(full) else None
    except (StorageError, OSError, ValueError):
        # One unreadable image is one quarantined row; the counts show if no image can be read.
        return None
