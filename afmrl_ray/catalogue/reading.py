"""Reading a catalogue: schema, images, quarantine, fingerprint."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.dataset as ds

from afmrl_ray import storage
from afmrl_ray.catalogue.checks import bad_rows
from afmrl_ray.catalogue.image_columns import with_images
from afmrl_ray.catalogue.schema import IMAGE_COLUMNS, NULLABLE, REQUIRED, write_catalogue
from afmrl_ray.catalogue.table import CatalogueTable
from afmrl_ray.catalogue.values import text_column
from afmrl_ray.config.catalogue import CatalogueConfig
from afmrl_ray.errors import CatalogueError

_SUFFIXES = (".parquet", ".pq", ".parq")
_TEXT = ("item_id", "split", "product_id", "category", "title", "role")


class Catalogue(CatalogueTable):
    """The usable rows of a catalogue, and the quarantine of the others."""

    def __init__(self, table: pa.Table, name: str, quarantine: pa.Table) -> None:
        super().__init__(table, name, fingerprint(table))
        self.quarantine = quarantine
        """item_id, row, reason and detail (in words) of every quarantined row."""

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

    Of a directory all files count whose names end with .parquet, .pq or .parq and, like their folders, do not begin
    with `.` or `_`; folders named `column=value` add the column.

    Raises:
        CatalogueError: it is missing, lacks columns, has no usable row, or a greater fraction of unusable rows than
            `catalogue.max_bad_fraction`.
    """
    return check_table(_read(path), path, config=config)


def check_table(
    table: pa.Table,
    path: str,
    *,
    config: CatalogueConfig | None = None,
    known: Mapping[int, tuple[str, str]] | None = None,
) -> Catalogue:
    """Quarantine the unusable rows of a table.

    Args:
        table: the catalogue's columns, see `catalogue.schema`.
        path: of the catalogue; relative image URIs start from its folder, and messages name it.
        config: limits; none = their defaults.
        known: reason and detail of rows that an importer found unusable.

    Raises:
        CatalogueError: see `open_catalogue`.
    """
    config = config or CatalogueConfig()
    table, unread = with_images(_normalised(table, path), path)
    bad = bad_rows(table, config.max_image_pixels, known={**unread, **(known or {})})
    rows = sorted(bad)
    quarantine = pa.table(
        {
            "item_id": pa.array([table["item_id"][row].as_py() for row in rows], pa.string()),
            "row": pa.array(rows, pa.int64()),
            "reason": pa.array([bad[row][0] for row in rows], pa.string()),
            "detail": pa.array([bad[row][1] for row in rows], pa.string()),
        }
    )
    reasons = example = ""
    if rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(r for r, _ in bad.values()).most_common())
        example = next((f", such as row {row} ({bad[row][1]})" for row in rows if bad[row][1]), "")
    if len(rows) > config.max_bad_fraction * len(table):
        raise CatalogueError(
            f"{path}: {len(rows)} of {len(table)} rows are bad ({reasons}){example}: more than "
            f"catalogue.max_bad_fraction {config.max_bad_fraction:g} allows; fix them or raise it"
        )
    good = table.filter(pa.array([row not in bad for row in range(len(table))])) if bad else table
    if not len(good):
        found = f"all {len(rows)} rows are bad ({reasons}){example}" if rows else "the catalogue has no rows"
        raise CatalogueError(f"{path}: {found}")
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
        if not storage.is_dir(path):
            return ds.dataset(inner, filesystem=filesystem, format="parquet").to_table()
        files = [storage.join(inner, name) for name in sorted(storage.list_files(path)) if _holds_rows(name)]
        if not files:
            raise CatalogueError(f"catalogue.path: {path} contains no .parquet file")
        empty = [info.path for info in filesystem.get_file_info(files) if info.size == 0]
        if empty:
            raise CatalogueError(
                f"catalogue.path: {empty[0]} is empty, as an interrupted job leaves it; write it again, or remove it"
            )
        found = ds.dataset(
            files, filesystem=filesystem, format="parquet", partitioning="hive", partition_base_dir=inner
        )
        schemas = [found.schema, *(fragment.physical_schema for fragment in found.get_fragments())]
        # The first file's schema would drop the columns that only others have.
        return found.replace_schema(pa.unify_schemas(schemas, promote_options="permissive")).to_table()
    except (OSError, pa.ArrowException) as error:
        raise CatalogueError(f"catalogue.path: {path} is no Parquet ({' '.join(str(error).split())[:200]})") from error


def _holds_rows(name: str) -> bool:
    """Whether a file of a folder is data: not what writers, notebooks or operating systems keep beside it."""
    hidden = any(part.startswith((".", "_")) and "=" not in part for part in name.split("/"))
    return not hidden and name.lower().endswith(_SUFFIXES)


def _normalised(table: pa.Table, path: str) -> pa.Table:
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise CatalogueError(f"{path}: the catalogue has two columns {twice[0]!r}; rename one of them")
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
    for name in _TEXT:
        index = table.column_names.index(name)
        try:
            table = table.set_column(index, name, text_column(table[name]))
        except pa.ArrowException as error:
            raise CatalogueError(f"{path}: column {name} is {table[name].type}, it must be text") from error
        except ValueError as error:
            raise CatalogueError(f"{path}: column {name}: {error}; write it as text or as integers") from error
    return table
