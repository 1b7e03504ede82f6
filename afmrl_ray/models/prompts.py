"""What the two models are asked: the text that follows a listing's picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from afmrl_ray.config.catalogue import Inputs
from afmrl_ray.config.models import EncoderConfig, GeneratorConfig
from afmrl_ray.models.listing import ListingProcessor, Picture
from afmrl_ray.models.rows import Row
from afmrl_ray.models.vision_cache import VisionCache


class Listings(Protocol):
    """Random access to a catalogue's rows, as `catalogue.staging.StagedCatalogue` gives it."""

    def picture(self, row: int) -> Image.Image: ...

    def picture_bytes(self, row: int) -> bytes: ...

    def title(self, row: int, columns: tuple[str, ...] = ...) -> str: ...


def encoder_row(
    processor: ListingProcessor,
    listings: Listings,
    row: int,
    *,
    config: EncoderConfig,
    inputs: Inputs,
    title_columns: tuple[str, ...] = ("title",),
    attributes: str = "",
    cache: VisionCache | None = None,
) -> Row:
    """The encoder's input for one listing; attributes come last, so that listings with the same prefix can share it.

    Args:
        cache: where the picture's visual tokens are looked up; none = the picture goes in by its pixels.
    """
    (built,) = encoder_rows(
        processor,
        listings,
        row,
        config=config,
        inputs=inputs,
        title_columns=title_columns,
        attributes=[attributes],
        cache=cache,
    )
    return built


def encoder_rows(
    processor: ListingProcessor,
    listings: Listings,
    row: int,
    *,
    config: EncoderConfig,
    inputs: Inputs,
    title_columns: tuple[str, ...],
    attributes: Sequence[str],
    cache: VisionCache | None,
) -> list[Row]:
    """The same for several attribute texts of one listing, whose picture is read once."""
    picture: Picture | None = None
    if inputs != "text" and cache is None:
        picture = processor.visual(listings.picture(row))
    elif inputs != "text" and cache is not None:
        picture = cache.visual(listings.picture_bytes(row), lambda: listings.picture(row))
    before = [config.instruction]
    if inputs != "picture":
        before.append(listings.title(row, title_columns))
    return [
        processor.row(picture, "\n".join(part for part in (*before, text) if part), max_tokens=config.max_tokens)
        for text in attributes
    ]


def generator_row(processor: ListingProcessor, listings: Listings, row: int, *, config: GeneratorConfig) -> Row:
    """The generator's prompt for one listing; never truncated (see `prompt_fits`)."""
    picture = listings.picture(row) if config.inputs != "text" else None
    return processor.row(picture, _generator_text(listings, row, config))


def prompt_fits(processor: ListingProcessor, listings: Listings, row: int, *, config: GeneratorConfig) -> bool:
    """Whether a prompt is short enough to be used, from the picture's header alone.

    Prompts with pictures are dropped when they are too long, never cut.
    """
    size = None
    if config.inputs != "text":
        with Image.open(io.BytesIO(listings.picture_bytes(row))) as picture:
            size = picture.size
    return processor.length(size, _generator_text(listings, row, config)) <= config.max_prompt_tokens


def _generator_text(listings: Listings, row: int, config: GeneratorConfig) -> str:
    title = listings.title(row, config.title_columns) if config.inputs != "picture" else ""
    return "\n".join(part for part in (title, config.instruction) if part)
