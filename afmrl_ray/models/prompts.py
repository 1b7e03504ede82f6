"""Inputs of the two models for an item of a catalogue: image, then instruction, title and attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from afmrl_ray.catalogue.images import image_size
from afmrl_ray.config.catalogue import Inputs
from afmrl_ray.config.models import EncoderConfig, GeneratorConfig
from afmrl_ray.models.item_processor import ImageLike, ItemProcessor
from afmrl_ray.models.model_input import ModelInput
from afmrl_ray.models.vision_cache import VisionCache


class ItemReader(Protocol):
    """Random access to items by row, as `catalogue.staging.StagedCatalogue` provides it."""

    def image(self, row: int) -> Image.Image: ...

    def image_bytes(self, row: int) -> bytes: ...

    def title(self, row: int, columns: tuple[str, ...] = ...) -> str: ...


def encoder_input(
    processor: ItemProcessor,
    catalogue: ItemReader,
    row: int,
    *,
    config: EncoderConfig,
    inputs: Inputs,
    title_columns: tuple[str, ...] = ("title",),
    attributes: str = "",
    cache: VisionCache | None = None,
) -> ModelInput:
    """The encoder's input for one item; attributes come last, so that inputs with equal prefixes can share them.

    Args:
        processor: of the encoder's checkpoint.
        catalogue: where the item comes from.
        row: the item's catalogue row.
        config: instruction and length limit.
        inputs: image, text or both.
        title_columns: columns that make up the title.
        attributes: attribute text; empty = without attributes.
        cache: visual tokens of images; none = the input holds pixels.
    """
    (built,) = encoder_inputs(
        processor,
        catalogue,
        row,
        config=config,
        inputs=inputs,
        title_columns=title_columns,
        attributes=[attributes],
        cache=cache,
    )
    return built


def encoder_inputs(
    processor: ItemProcessor,
    catalogue: ItemReader,
    row: int,
    *,
    config: EncoderConfig,
    inputs: Inputs,
    title_columns: tuple[str, ...],
    attributes: Sequence[str],
    cache: VisionCache | None,
) -> list[ModelInput]:
    """As `encoder_input`, for several attribute texts of one item, whose image is read once."""
    image: ImageLike | None = None
    if inputs != "text" and cache is None:
        image = processor.visual(catalogue.image(row))
    elif inputs != "text" and cache is not None:
        image = cache.visual(catalogue.image_bytes(row), lambda: catalogue.image(row))
    lines = [config.instruction]
    if inputs != "image":
        lines.append(catalogue.title(row, title_columns))
    return [
        processor.model_input(image, "\n".join(part for part in (*lines, text) if part), max_tokens=config.max_tokens)
        for text in attributes
    ]


def generator_input(
    processor: ItemProcessor, catalogue: ItemReader, row: int, *, config: GeneratorConfig
) -> ModelInput:
    """The generator's prompt for one item; never truncated (see `prompt_fits`)."""
    image = catalogue.image(row) if config.inputs != "text" else None
    return processor.model_input(image, _generator_text(catalogue, row, config))


def prompt_fits(processor: ItemProcessor, catalogue: ItemReader, row: int, *, config: GeneratorConfig) -> bool:
    """Whether an item's prompt has at most `max_prompt_tokens`; of the image only the header is read.

    Items whose prompts are too long are dropped; prompts are never truncated.
    """
    size = None
    if config.inputs != "text":
        size = image_size(catalogue.image_bytes(row))
    return processor.length(size, _generator_text(catalogue, row, config)) <= config.max_prompt_tokens


def _generator_text(catalogue: ItemReader, row: int, config: GeneratorConfig) -> str:
    title = catalogue.title(row, config.title_columns) if config.inputs != "image" else ""
    return "\n".join(part for part in (title, config.instruction) if part)
