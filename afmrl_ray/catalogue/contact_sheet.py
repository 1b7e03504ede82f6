"""A contact sheet: one image that shows many items of a catalogue."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from afmrl_ray.catalogue.table import CatalogueTable

_PAD, _LINES, _LINE = 8, 6, 13


def contact_sheet(
    catalogue: CatalogueTable, rows: Sequence[int], *, columns: int = 6, image_px: int = 150
) -> Image.Image:
    """Images with title and attributes below each.

    Args:
        catalogue: where the items come from.
        rows: catalogue rows, from left to right and top to bottom.
        columns: images per line.
        image_px: width and height of an image, pixels.
    """
    cell = (image_px + _PAD, image_px + _LINES * _LINE + _PAD)
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + _PAD, lines * cell[1] + _PAD), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for index, row in enumerate(rows):
        x, y = _PAD + index % columns * cell[0], _PAD + index // columns * cell[1]
        sheet.paste(catalogue.image(row).resize((image_px, image_px)), (x, y))
        item = catalogue.item(row)
        attributes = "; ".join(f"{name}: {value}" for name, value in item.attributes.items())
        text = textwrap.wrap(item.title or "", 27)[:2] + textwrap.wrap(attributes, 28)[: _LINES - 2]
        for line, content in enumerate(text[:_LINES]):
            draw.text((x, y + image_px + line * _LINE), content, fill="black" if line < 2 else "#667", font=font)
    return sheet
