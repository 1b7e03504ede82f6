"""Images of a table's rows, however the source holds them: encoded, as Hugging Face structs, or by path or URI."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from afmrl_ray import storage
from afmrl_ray.errors import CatalogueError, StorageError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")
"""Tried where a picture's name has no suffix."""
_LONGEST_PATH = 1024


class UnreadImageError(Exception):
    """An image that cannot be read; `reason` is that of the quarantine, the message says why."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def with_images(table: pa.Table, path: str) -> tuple[pa.Table, dict[int, tuple[str, str]]]:
    """The table with encoded images in `image`, and reason and detail of the rows whose image cannot be read.

    Column `image` may hold bytes, structs of `bytes` and `path` as Hugging Face datasets write them, lists of either
    (the first counts), or paths and URIs, which column `image_uri` holds too; relative ones start from the catalogue's
    folder. Where `image` is null, `image_uri` counts.

    Raises:
        CatalogueError: column `image` holds something else.
    """
    folder = (path if storage.is_dir(path) else os.path.dirname(path)) or "."
    names = table.column_names
    complete = "image_uri" not in names or ("image" in names and not table["image"].null_count)
    if "image" in names and _is_binary(table["image"].type) and complete:
        return table, {}
    if "image" in names:
        _check_type(table["image"].type, path)
    given = table["image"].to_pylist() if "image" in names else [None] * len(table)
    uris = table["image_uri"].to_pylist() if "image_uri" in names else [None] * len(table)
    images, faults = [], {}
    for row, (value, uri) in enumerate(zip(given, uris, strict=True)):
        try:
            images.append(_encoded(value, folder) or _encoded(uri, folder))
        except UnreadImageError as error:
            images.append(None)
            faults[row] = error.reason, str(error)
    column = pa.array(images, pa.large_binary())
    if "image" in names:
        return table.set_column(names.index("image"), "image", column), faults
    return table.append_column("image", column), faults


def read_named_image(folder: str, name: str) -> bytes:
    """An image by its path below a folder, its absolute path, or its URI.

    Raises:
        UnreadImageError: there is no such file, it is a folder, or the name is none; or it is on the web, which is not
            read.
    """
    name = name.strip()
    if name.startswith("data:"):
        return _from_data_url(name)
    if name.lower().startswith(("http://", "https://", "ftp://")):
        raise UnreadImageError("image_not_fetched", f"{name[:200]} is on the web, which is not read; download it first")
    if "\0" in name or len(name) > _LONGEST_PATH:
        raise UnreadImageError("missing_image", f"{name[:40]!r}... is no name of a file")
    tried = [name, *_spellings(name)]
    for each in tried:
        full = each if "://" in each or os.path.isabs(each) else storage.join(folder, each)
        try:
            if storage.exists(full) and not storage.is_dir(full):
                return storage.read_bytes(full)
        except (StorageError, OSError, ValueError):
            continue
    raise UnreadImageError("missing_image", f"no file {name[:200]} in {folder}")


def _spellings(name: str) -> list[str]:
    """Other names that a file may have: percent signs decoded, Windows separators, a suffix that was left out."""
    found = [spelling for spelling in (unquote(name), name.replace("\\", "/")) if spelling != name]
    if "." not in os.path.basename(name):
        found += [f"{name}{suffix}" for suffix in _SUFFIXES]
    return [spelling for spelling in found if "\0" not in spelling]


def _encoded(value: Any, folder: str) -> bytes | None:
    if isinstance(value, list | tuple):
        return next((found for each in value if (found := _encoded(each, folder))), None)
    if isinstance(value, Mapping):
        return value.get("bytes") or _encoded(value.get("path"), folder)
    if isinstance(value, str):
        return read_named_image(folder, value) if value.strip() else None
    return value or None


def _from_data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise UnreadImageError("undecodable_image", f"{head[:60]} is not base64")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise UnreadImageError("undecodable_image", f"{head[:60]}: {error}") from error


def _check_type(kind: pa.DataType, path: str) -> None:
    inner = kind.value_type if _is_list(kind) else kind
    if pa.types.is_struct(inner):
        names = {inner.field(index).name for index in range(inner.num_fields)}
        if names & {"bytes", "path"}:
            return
    elif _is_binary(inner) or pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner):
        return
    raise CatalogueError(
        f"{path}: column image is {kind}; it must hold encoded images, structs of bytes and path, or paths"
    )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
