"""Attributes of many items, written by the generator in a pool of Ray Data actors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from afmrl_ray.attributes.text import SEPARATOR, InvalidAttributes, format_attributes, parse_attributes
from afmrl_ray.catalogue import CatalogueRef
from afmrl_ray.config.cluster import PoolConfig
from afmrl_ray.config.models import GeneratorConfig
from afmrl_ray.models.adapters import load_trained
from afmrl_ray.models.generation import generate
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.pool import map_rows
from afmrl_ray.models.prompts import Items, generator_input, prompt_fits


@dataclass(frozen=True)
class GeneratorRef:
    """A generator as actors load it.

    Attributes:
        path: model or adapter folder, or hub name.
        config: how items are shown to it.
    """

    path: str
    config: GeneratorConfig


class Annotator:
    """A generator over a catalogue, decoding greedily; plain code that actors and tests call alike."""

    def __init__(self, generator: GeneratorRef, catalogue: CatalogueRef) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_trained(generator.path, "generator", dtype=generator.config.dtype, device=device).eval()
        self._processor = ItemProcessor.from_pretrained(generator.path, generator.config.image)
        self._config = generator.config
        self._catalogue = catalogue.open()

    def annotate(self, rows: list[int], *, max_pairs: int | None = None) -> list[tuple[str, str]]:
        """See `write_attributes`."""
        return write_attributes(
            self._model, self._processor, self._catalogue, rows, config=self._config, max_pairs=max_pairs
        )


def write_attributes(
    model: Any,
    processor: ItemProcessor,
    items: Items,
    rows: Sequence[int],
    *,
    config: GeneratorConfig,
    max_pairs: int | None = None,
) -> list[tuple[str, str]]:
    """Decode greedily: canonical attribute text and reason of invalidity of each row; one of the two is empty.

    Args:
        max_pairs: writing ends after this many pairs; none = where the model ends it.
    """
    fitting = [row for row in rows if prompt_fits(processor, items, row, config=config)]
    found: dict[int, tuple[str, str]] = dict.fromkeys(rows, ("", "prompt_too_long"))
    if fitting:
        prompts = [generator_input(processor, items, row, config=config) for row in fitting]
        completions = generate(
            model, processor, prompts, max_new_tokens=config.max_new_tokens, max_separators=max_pairs
        )
        for row, (text, complete) in zip(fitting, completions.texts(processor), strict=True):
            if max_pairs is not None and text.count(SEPARATOR) >= max_pairs:
                text, complete = SEPARATOR.join(text.split(SEPARATOR)[:max_pairs]), True
            parsed = parse_attributes(text, max_attributes=config.max_attributes, complete=complete)
            if isinstance(parsed, InvalidAttributes):
                found[row] = "", parsed.reason
            else:
                found[row] = format_attributes(parsed), ""
    return [found[row] for row in rows]


class AnnotateActor:
    """Ray Data's shell around `Annotator`."""

    def __init__(self, generator: GeneratorRef, catalogue: CatalogueRef, threads: int) -> None:
        torch.set_num_threads(threads)
        self._annotator = Annotator(generator, catalogue)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._annotator.annotate(batch["row"].tolist())
        return {
            "place": batch["place"],
            "attributes": np.array([text for text, _ in found], dtype=object),
            "reason": np.array([reason for _, reason in found], dtype=object),
        }


def annotate_rows(
    rows: np.ndarray, generator: GeneratorRef, catalogue: CatalogueRef, *, pool: PoolConfig
) -> list[tuple[str, str]]:
    """Attribute text and reason of invalidity of each catalogue row, in the order of `rows`."""
    table = map_rows(
        AnnotateActor, {"row": rows}, pool=pool, arguments={"generator": generator, "catalogue": catalogue}
    )
    return list(zip(table["attributes"], table["reason"], strict=True))
