"""Importers of other layouts: text files with a folder of images, and M5Product as published."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from afmrl_ray.catalogue.image_columns import UnreadImageError, read_named_image
from afmrl_ray.catalogue.text_tables import read_text, read_text_table
from afmrl_ray.catalogue.values import text_value
from afmrl_ray.errors import CatalogueError

_COLUMNS = ("item_id", "product_id", "category", "title", "attributes", "split", "role")
_WITHOUT_IMAGE = ("missing_image", "image_not_fetched", "undecodable_image")
SCHEMA = pa.schema([*((name, pa.string()) for name in _COLUMNS), ("image", pa.binary())])


@dataclass(frozen=True)
class ImportResult:
    """Result of an import.

    Attributes:
        table: the columns of `catalogue.schema`, and the source's further columns.
        counts: items, missing images and the like, by name.
        faults: reason and detail of the rows that are unusable for what they were read from.
    """

    table: pa.Table
    counts: dict[str, int]
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)


def import_rows(
    path: str,
    images: str,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    delimiter: str | None = None,
    encoding: str | None = None,
) -> ImportResult:
    """Read a text file (see `text_tables.read_text_table`) whose rows name image files in a folder.

    Args:
        path: the file.
        images: folder of the images.
        columns: canonical column name to the file's name of it, where they differ; `image` is the column of file names.
        split: of rows that name none.
        delimiter, encoding: see `read_text_table`.

    Raises:
        CatalogueError: the file cannot be read, or no row has the columns of item id and image; or `columns` names a
            column that no catalogue has.
    """
    unknown = sorted(set(columns or {}) - {*_COLUMNS, "image"})
    if unknown:
        raise CatalogueError(f"--column {unknown[0]}: a catalogue's columns are {', '.join((*_COLUMNS, 'image'))}")
    names = {name: (columns or {}).get(name, name) for name in (*_COLUMNS, "image")}
    source = read_text_table(path, delimiter=delimiter, encoding=encoding)
    if not source.rows:
        raise CatalogueError(f"{path}: no rows")
    missing = [names[name] for name in ("item_id", "image") if names[name] not in source.columns]
    if missing and source.columns:
        raise CatalogueError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(source.columns)[:400]}; map one with --column "
            "canonical=own"
        )
    known = set(names.values())
    faults = dict(source.faults)
    made = []
    for place, row in enumerate(source.rows):
        image = None
        if place not in faults:
            image, fault = _image(images, text_value(row.get(names["image"])))
            if fault is not None:
                faults[place] = fault
        extra = {name: value for name, value in row.items() if name not in known}
        made.append(
            {
                **extra,
                **{name: text_value(row.get(names[name])) for name in _COLUMNS},
                "split": text_value(row.get(names["split"])) or split,
                "image": image,
            }
        )
    missing_images = sum(reason in _WITHOUT_IMAGE for reason, _ in faults.values())
    return ImportResult(_table(made), {"rows": len(made), "images_missing": missing_images}, faults)


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
        for line in read_text(path).split():
            places[line] = place
    counts = {"items": len(items), "listed_but_absent": len(places.keys() - items.keys()), "images_missing": 0}
    made: list[dict[str, Any]] = []
    faults: dict[int, tuple[str, str]] = {}
    for item_id, item in items.items():
        split, role = places.get(item_id, ("train", ""))
        image, fault = _image(images, f"{item_id}.jpg")
        if fault is not None:
            faults[len(made)] = fault
            counts["images_missing"] += 1
        counts[f"{split} {role}".strip()] = counts.get(f"{split} {role}".strip(), 0) + 1
        label = text_value(item.get("label"))
        made.append(
            {
                "item_id": item_id,
                "product_id": text_value(instances.get(item_id)) if instances is not None else label,
                "category": label,
                "title": text_value(item.get("title")),
                "attributes": json.dumps(parse_pv(item.get("pv") or ""), ensure_ascii=False),
                "split": split,
                "role": role or None,
                "image": image,
            }
        )
    return ImportResult(_table(made), counts, faults)


def is_m5product(path: str) -> bool:
    """Whether a `.json` file is an object of items by id, as M5Product's is; any other file is one of rows."""
    if not path.lower().endswith(".json"):
        return False
    try:
        value = json.loads(read_text(path))
    except ValueError:
        return False
    return isinstance(value, dict) and bool(value) and all(isinstance(item, dict) for item in value.values())


def parse_pv(text: str) -> dict[str, str]:
    """M5Product's property string `k#:#v#;#k#:#v` as an ordered dict; of a repeated name the first value counts."""
    found: dict[str, str] = {}
    for pair in text.split("#;#"):
        name, separator, value = pair.partition("#:#")
        if separator and name.strip():
            found.setdefault(name.strip(), value.strip())
    return found


def _json_object(path: str) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise CatalogueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CatalogueError(f"{path}: an object of items by id is needed")
    return value


def _image(folder: str, name: str | None) -> tuple[bytes | None, tuple[str, str] | None]:
    """An encoded image, or why there is none."""
    if name is None:
        return None, ("missing_image", "the row names no image")
    try:
        return read_named_image(folder, name), None
    except UnreadImageError as error:
        return None, (error.reason, str(error))


def _table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    rows = list(rows)
    extra = {name: None for row in rows for name in row if name not in SCHEMA.names}
    schema = pa.schema([*SCHEMA, *((name, pa.string()) for name in extra)])
    return pa.Table.from_pylist(
        [{**row, **{name: text_value(row.get(name)) for name in extra}} for row in rows], schema
    )
