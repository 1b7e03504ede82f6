"""What the two models are asked: the text that follows an item's image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from afmrl_ray.config.catalogue import Inputs
from afmrl_ray.config.models import EncoderConfig, GeneratorConfig
from afmrl_ray.models.item_processor import ImageLike, ItemProcessor
from afmrl_ray.models.model_input import ModelInput
from afmrl_ray.models.vision_cache import VisionCache


class Items(Protocol):
    """Random access to a catalogue's rows, as `catalogue.staging.StagedCatalogue` gives it."""

    def image(self, row: int) -> Image.Image: ...

    def image_bytes(self, row: int) -> bytes: ...

    def title(self, row: int, columns: tuple[str, ...] = ...) -> str: ...


def encoder_input(
    processor: ItemProcessor,
    items: Items,
    row: int,
    *,
    config: EncoderConfig,
    inputs: Inputs,
    title_columns: tuple[str, ...] = ("title",),
    attributes: str = "",
    cache: VisionCache | None = None,
) -> ModelInput:
    """The encoder's input for one item; attributes come last, so that items with the same prefix can share it.

    Args:
        cache: where the image's visual tokens are looked up; none = the image goes in by its pixels.
    """
    (built,) = encoder_rows(
        processor,
        items,
        row,
        config=config,
        inputs=inputs,
        title_columns=title_columns,
        attributes=[attributes],
        cache=cache,
    )
    return built


def encoder_rows(
    processor: ItemProcessor,
    items: Items,
    row: int,
    *,
    config: EncoderConfig,
    inputs: Inputs,
    title_columns: tuple[str, ...],
    attributes: Sequence[str],
    cache: VisionCache | None,
) -> list[ModelInput]:
    """The same for several attribute texts of one item, whose image is read once."""
    image: ImageLike | None = None
    if inputs != "text" and cache is None:
        image = processor.visual(items.image(row))
    elif inputs != "text" and cache is not None:
        image = cache.visual(items.image_bytes(row), lambda: items.image(row))
    before = [config.instruction]
    if inputs != "image":
        before.append(items.title(row, title_columns))
    return [
        processor.row(image, "\n".join(part for part in (*before, text) if part), max_tokens=config.max_tokens)
        for text in attributes
    ]


def generator_input(processor: ItemProcessor, items: Items, row: int, *, config: GeneratorConfig) -> ModelInput:
    """The generator's prompt for one item; never truncated (see `prompt_fits`)."""
    image = items.image(row) if config.inputs != "text" else None
    return processor.row(image, _generator_text(items, row, config))


def prompt_fits(processor: ItemProcessor, items: Items, row: int, *, config: GeneratorConfig) -> bool:
    """Whether a prompt is short enough to be used, from the image's header alone.

    Prompts with images are dropped when they are too long, never cut.
    """
    size = None
    if config.inputs != "text":
        with Image.open(io.BytesIO(items.image_bytes(row))) as image:
            size = image.size
    return processor.length(size, _generator_text(items, row, config)) <= config.max_prompt_tokens


def _generator_text(items: Items, row: int, config: GeneratorConfig) -> str:
    title = items.title(row, config.title_columns) if config.inputs != "image" else ""
    return "\n".join(part for part in (title, config.instruction) if part)
