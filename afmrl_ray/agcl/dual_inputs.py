"""Inputs of FG-CLIP's objectives: image regions with their phrases, and texts with one attribute changed.

Pure functions of the catalogue, the attribute table and a random generator, so that a batch is the same for any number
of workers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from afmrl_ray.attributes.text import Attributes, format_attributes

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as fractions of the image's width and height."""

_MIN_SIDE_PX = 2


@dataclass(frozen=True)
class Region:
    """A part of an item's image with the attributes that describe it.

    Attributes:
        part: name of the part.
        box: its box.
        phrase: attribute text.
    """

    part: str
    box: Box
    phrase: str


def values_by_name(attributes: Sequence[Attributes]) -> dict[str, list[str]]:
    """All values of each attribute name, in alphabetical order."""
    found: dict[str, set[str]] = {}
    for pairs in attributes:
        for name, value in pairs:
            found.setdefault(name, set()).add(value)
    return {name: sorted(values) for name, values in found.items()}


def changed_texts(
    attributes: Attributes, values: Mapping[str, Sequence[str]], *, count: int, draw: np.random.Generator
) -> list[str]:
    """Up to `count` different attribute texts, each with exactly one value replaced by another of the same name.

    Args:
        attributes: of the item.
        values: from `values_by_name`.
        count: of texts; fewer are returned if there are fewer replacements.
        draw: chooses the replacements.
    """
    changes = [
        (place, other)
        for place, (name, value) in enumerate(attributes)
        for other in values.get(name, ())
        if other != value
    ]
    picked = draw.permutation(len(changes))[:count]
    found = []
    for index in sorted(picked.tolist()):
        place, other = changes[index]
        pairs = list(attributes)
        pairs[place] = (pairs[place][0], other)
        found.append(format_attributes(pairs))
    return found


def regions(
    boxes: Mapping[str, Sequence[float]], attributes: Attributes, parts: Mapping[str, Sequence[str]]
) -> list[Region]:
    """The parts of an image that have a box of positive area and at least one attribute.

    Args:
        boxes: part to left, top, right, bottom.
        attributes: of the item.
        parts: names of the attributes of a part; a part that is not listed has the attribute of its own name.
    """
    found = []
    for part, box in boxes.items():
        names = parts.get(part, (part,))
        phrase = format_attributes([(name, value) for name, value in attributes if name in names])
        left, top, right, bottom = (min(max(float(edge), 0.0), 1.0) for edge in box)
        if phrase and right > left and bottom > top:
            found.append(Region(part, (left, top, right, bottom), phrase))
    return found


def parse_boxes(value: str | Mapping[str, Sequence[float]] | None) -> dict[str, Sequence[float]]:
    """The boxes of an item, from a JSON object, a mapping or null."""
    if value is None or value == "":
        return {}
    return dict(json.loads(value) if isinstance(value, str) else value)


def crop(image: Image.Image, box: Box) -> Image.Image:
    """The region of an image, at least two pixels wide and high."""
    width, height = image.size
    left = min(int(box[0] * width), width - _MIN_SIDE_PX)
    top = min(int(box[1] * height), height - _MIN_SIDE_PX)
    right, bottom = max(round(box[2] * width), left + _MIN_SIDE_PX), max(round(box[3] * height), top + _MIN_SIDE_PX)
    return image.crop((left, top, min(right, width), min(bottom, height)))
