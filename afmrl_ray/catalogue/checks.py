"""Checks of the rows of a catalogue: which cannot be used, and why."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from PIL import Image

from afmrl_ray.catalogue.images import decode_image
from afmrl_ray.catalogue.values import is_rounded_id, parse_source_attributes

_WORKERS = 4
# The image processor of Qwen2-VL accepts no greater ratio of the two sides.
_MAX_ASPECT_RATIO = 200


def bad_rows(
    table: pa.Table, max_image_pixels: int, *, known: Mapping[int, tuple[str, str]] | None = None
) -> dict[int, tuple[str, str]]:
    """Reason of quarantine and what is wrong in words, which may be empty, by row.

    Reasons are missing_item_id, duplicate_item_id, rounded_id, bad_attributes, empty, missing_image,
    decompression_bomb, aspect_ratio and undecodable_image.

    Args:
        table: the catalogue, with encoded images in column `image`.
        max_image_pixels: images with more pixels are decompression bombs.
        known: faults that reading the rows has found already.
    """
    found = {**_bad_text(table, known or {}), **(known or {})}
    images = table["image"]
    with ThreadPoolExecutor(_WORKERS) as pool:
        rows = [row for row in range(len(table)) if row not in found]
        for row, reason in zip(
            rows, pool.map(lambda row: image_fault(images[row].as_py(), max_image_pixels), rows), strict=True
        ):
            if reason:
                found[row] = reason, ""
    return found


def _bad_text(table: pa.Table, known: Mapping[int, tuple[str, str]]) -> dict[int, tuple[str, str]]:
    found: dict[int, tuple[str, str]] = {}
    seen: set[str] = set()
    without_image = table["image"].is_null().to_pylist()
    columns = (table[name].to_pylist() for name in ("item_id", "product_id", "title", "attributes"))
    for row, (item_id, product_id, title, attributes) in enumerate(zip(*columns, strict=True)):
        if row in known:
            continue
        if not item_id:
            found[row] = "missing_item_id", ""
            continue
        rounded = next((each for each in (item_id, product_id) if is_rounded_id(each)), None)
        if rounded is not None:
            found[row] = "rounded_id", f"{rounded} has lost its last digits; write ids as text"
            continue
        if item_id in seen:
            found[row] = "duplicate_item_id", item_id
            continue
        seen.add(item_id)
        try:
            parsed = parse_source_attributes(attributes)
        except ValueError as error:
            found[row] = "bad_attributes", str(error)
            continue
        if not title and not parsed and without_image[row]:
            found[row] = "empty", "neither image nor title nor attributes"
    return found


def image_fault(data: bytes | None, max_pixels: int) -> str | None:
    """Why encoded bytes are no usable image, or none; the size is read from the header before anything is decoded."""
    if not data:
        return "missing_image"
    try:
        with warnings.catch_warnings():
            # The catalogue has its own limit, checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > max_pixels:
                    return "decompression_bomb"
                if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
                    return "aspect_ratio"
        decode_image(data)
    except Image.DecompressionBombError:
        return "decompression_bomb"
    except Exception:  # noqa: BLE001 - Pillow's decoders raise exceptions of many types for damaged files
        return "undecodable_image"
    return None
