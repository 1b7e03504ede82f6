"""Importers of other layouts: CSV or JSONL with a folder of images, and M5Product as published."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from afmrl_ray import storage
from afmrl_ray.errors import CatalogueError

_COLUMNS = ("item_id", "product_id", "category", "title", "attributes", "split", "role")
SCHEMA = pa.schema([*((name, pa.string()) for name in _COLUMNS), ("image", pa.binary())])


@dataclass(frozen=True)
class ImportResult:
    """Result of an import.

    Attributes:
        table: the columns of `catalogue.schema`, and the source's further columns.
        counts: items, missing images and the like, by name.
    """

    table: pa.Table
    counts: dict[str, int]


def import_rows(
    path: str, images: str, *, columns: Mapping[str, str] | None = None, split: str = "train"
) -> ImportResult:
    """Read a `.csv` or `.jsonl` file whose rows name image files in a folder.

    Args:
        path: the file.
        images: folder of the images.
        columns: canonical column name to the file's name of it, where they differ; `image` is the column of file names.
        split: of rows that name none.

    Raises:
        CatalogueError: the file is missing, of another type, not UTF-8, or lacks the columns of item id and image;
            or `columns` names a column that no catalogue has.
    """
    unknown = sorted(set(columns or {}) - {*_COLUMNS, "image"})
    if unknown:
        raise CatalogueError(f"--column {unknown[0]}: a catalogue's columns are {', '.join((*_COLUMNS, 'image'))}")
    names = {name: (columns or {}).get(name, name) for name in (*_COLUMNS, "image")}
    rows = list(_read(path))
    if not rows:
        raise CatalogueError(f"{path}: no rows")
    missing = [names[name] for name in ("item_id", "image") if names[name] not in rows[0]]
    if missing:
        raise CatalogueError(f"{path}: no column {', '.join(missing)}; map it with --column canonical=own")
    known = set(names.values())
    counts = {"rows": len(rows), "images_missing": 0}
    made = []
    for row in rows:
        image = _image(images, _text(row.get(names["image"])) or "")
        counts["images_missing"] += image is None
        extra = {name: value for name, value in row.items() if name not in known}
        made.append(
            {
                **extra,
                **{name: _text(row.get(names[name])) for name in _COLUMNS},
                "split": _text(row.get(names["split"])) or split,
                "image": image,
            }
        )
    return ImportResult(_table(made), counts)


def import_m5product(
    metadata: str, images: str, *, lists: Mapping[tuple[str, str], str], labels: str | None = None
) -> ImportResult:
    """Read M5Product: a JSON object of items and text files of ids.

    Args:
        metadata: JSON file `{id: {"title", "pv": "k#:#v#;#k#:#v", "label"}}`.
        images: folder with `<id>.jpg`.
        lists: (split, role) to a file with one id per line; ids in no list go to split train.
        labels: JSON file `{id: label}` of the instance labels of fine-grained retrieval, which become product ids;
            none = the items' own labels become product ids.

    Raises:
        CatalogueError: a file is missing or has another layout.
    """
    items = _json_object(metadata)
    instances = _json_object(labels) if labels is not None else None
    places: dict[str, tuple[str, str]] = {}
    for place, path in lists.items():
        for line in _text_of(path).split():
            places[line] = place
    counts = {"items": len(items), "listed_but_absent": len(places.keys() - items.keys()), "images_missing": 0}
    made = []
    for item_id, item in items.items():
        split, role = places.get(item_id, ("train", ""))
        image = _image(images, f"{item_id}.jpg")
        counts["images_missing"] += image is None
        counts[f"{split} {role}".strip()] = counts.get(f"{split} {role}".strip(), 0) + 1
        label = _text(item.get("label"))
        made.append(
            {
                "item_id": item_id,
                "product_id": _text(instances.get(item_id)) if instances is not None else label,
                "category": label,
                "title": _text(item.get("title")),
                "attributes": json.dumps(parse_pv(item.get("pv") or ""), ensure_ascii=False),
                "split": split,
                "role": role or None,
                "image": image,
            }
        )
    return ImportResult(_table(made), counts)


def parse_pv(text: str) -> dict[str, str]:
    """M5Product's property string `k#:#v#;#k#:#v` as an ordered dict; of a repeated name the first value counts."""
    found: dict[str, str] = {}
    for pair in text.split("#;#"):
        name, separator, value = pair.partition("#:#")
        if separator and name.strip():
            found.setdefault(name.strip(), value.strip())
    return found


def _read(path: str) -> Iterator[dict[str, Any]]:
    if not path.endswith((".csv", ".jsonl", ".ndjson")):
        raise CatalogueError(f"{path}: not a .csv or .jsonl file")
    text = _text_of(path)
    if path.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            if None in row:
                raise CatalogueError(f"{path}:{reader.line_num}: more fields than the header names")
            yield row
        return
    # Not splitlines(): a title may contain U+2028 and other line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CatalogueError(f"{path}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise CatalogueError(f"{path}:{number}: a JSON object is needed")
            yield row


def _text_of(path: str) -> str:
    try:
        return storage.read_bytes(_existing(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CatalogueError(f"{path}: not UTF-8 (byte {error.start})") from error


def _json_object(path: str) -> dict[str, Any]:
    try:
        value = json.loads(_text_of(path))
    except ValueError as error:
        raise CatalogueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CatalogueError(f"{path}: an object of items by id is needed")
    return value


def _existing(path: str) -> str:
    if not storage.exists(path):
        raise CatalogueError(f"{path} does not exist")
    return path


def _image(folder: str, name: str) -> bytes | None:
    path = storage.join(folder, name)
    return storage.read_bytes(path) if name and storage.exists(path) else None


def _text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    rows = list(rows)
    extra = {name: None for row in rows for name in row if name not in SCHEMA.names}
    schema = pa.schema([*SCHEMA, *((name, pa.string()) for name in extra)])
    return pa.Table.from_pylist([{**row, **{name: _text(row.get(name)) for name in extra}} for row in rows], schema)
