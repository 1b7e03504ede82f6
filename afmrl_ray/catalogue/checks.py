"""Checks of the rows of a catalogue: which cannot be used, and why."""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from PIL import Image

from afmrl_ray.catalogue.schema import parse_source_attributes

_WORKERS = 4
# The image processor of Qwen2-VL accepts no greater ratio of the two sides.
_MAX_ASPECT_RATIO = 200


def bad_rows(table: pa.Table, max_image_pixels: int) -> dict[int, str]:
    """Reason of quarantine by row.

    Reasons are missing_item_id, duplicate_item_id, bad_attributes, empty, missing_image, decompression_bomb,
    aspect_ratio and undecodable_image.

    Args:
        table: the catalogue, with encoded images in column `image`.
        max_image_pixels: images with more pixels are decompression bombs.
    """
    found = _bad_text(table)
    images = table["image"]
    with ThreadPoolExecutor(_WORKERS) as pool:
        rows = [row for row in range(len(table)) if row not in found]
        for row, reason in zip(
            rows, pool.map(lambda row: image_fault(images[row].as_py(), max_image_pixels), rows), strict=True
        ):
            if reason:
                found[row] = reason
    return found


def _bad_text(table: pa.Table) -> dict[int, str]:
    found: dict[int, str] = {}
    seen: set[str] = set()
    without_image = table["image"].is_null().to_pylist()
    columns = (table[name].to_pylist() for name in ("item_id", "title", "attributes"))
    for row, (item_id, title, attributes) in enumerate(zip(*columns, strict=True)):
        if item_id is None or item_id == "":
            found[row] = "missing_item_id"
            continue
        if item_id in seen:
            found[row] = "duplicate_item_id"
            continue
        seen.add(item_id)
        try:
            parsed = parse_source_attributes(attributes)
        except (ValueError, AttributeError, TypeError):
            found[row] = "bad_attributes"
            continue
        if not title and not parsed and without_image[row]:
            found[row] = "empty"
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
                image.load()
    except Image.DecompressionBombError:
        return "decompression_bomb"
    except Exception:  # noqa: BLE001 - Pillow's decoders raise exceptions of many types for damaged files
        return "undecodable_image"
    return None
