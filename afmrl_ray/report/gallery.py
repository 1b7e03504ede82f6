"""The example queries of the page: images as data URLs, attributes with their changes from generator to generator."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from afmrl_ray.report.examples import Example, GeneratedAttributes, PairChange, pair_changes
from afmrl_ray.report.summary import RunSummary

_THUMBNAIL_PX = 192


class Items(Protocol):
    """Source of images by row of the catalogue."""

    def image(self, row: int) -> Image.Image: ...


@dataclass(frozen=True)
class ShownHit:
    """A retrieved item with its image as a data URL."""

    item_id: str
    score: float
    right: bool
    image: str | None


@dataclass(frozen=True)
class ShownMissed:
    """A positive that was not retrieved, with its image as a data URL."""

    item_id: str
    image: str | None
    attributes: str


@dataclass(frozen=True)
class ShownExample:
    """An example with its images as data URLs and its attributes by generator."""

    item_id: str
    title: str
    image: str | None
    attributes: list[tuple[str, list[PairChange]]]
    hits: list[ShownHit]
    rank: int | None
    missed: ShownMissed | None


@dataclass(frozen=True)
class Gallery:
    """Random queries, and those with the worst rank of the first positive, after one round."""

    round: int
    examples: list[ShownExample]
    failures: list[ShownExample]


def make_gallery(summary: RunSummary, items: Items | None) -> Gallery | None:
    """The gallery of the run's result; None if no round is evaluated and promoted.

    Args:
        items: source of images; None = the queries are shown as text only.
    """
    last = summary.result
    if last is None:
        return None
    thumbnails = _Thumbnails(items)

    def shown(examples: Sequence[Example]) -> list[ShownExample]:
        return [_shown(example, summary.generated, thumbnails, last) for example in examples]

    return Gallery(last, shown(summary.examples[last]), shown(summary.failures))


class _Thumbnails:
    """Data URLs of images, each computed once."""

    def __init__(self, items: Items | None) -> None:
        self._items = items
        self._made: dict[int, str] = {}

    def __call__(self, row: int) -> str | None:
        if self._items is None:
            return None
        if row not in self._made:
            self._made[row] = thumbnail(self._items.image(row))
        return self._made[row]


def _shown(example: Example, generated: GeneratedAttributes, thumbnails: _Thumbnails, last: int) -> ShownExample:
    texts = generated.get(example.item_id) or [(f"round {last}", example.attributes)]
    before: list[str | None] = [None, *[text for _, text in texts[:-1]]]
    missed = example.missed
    return ShownExample(
        item_id=example.item_id,
        title=example.title,
        image=thumbnails(example.query_row),
        attributes=[(label, pair_changes(old, text)) for old, (label, text) in zip(before, texts, strict=True)],
        hits=[ShownHit(hit.item_id, hit.score, hit.right, thumbnails(hit.row)) for hit in example.hits],
        rank=example.rank,
        missed=ShownMissed(missed.item_id, thumbnails(missed.row), missed.attributes) if missed is not None else None,
    )


def thumbnail(image: Image.Image) -> str:
    """The image as a small JPEG in a data URL."""
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    target = io.BytesIO()
    small.save(target, "JPEG", quality=82)
    return data_url(target.getvalue(), "jpeg")


def data_url(data: bytes, kind: str) -> str:
    """A data URL of an encoded image of type `image/<kind>`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
