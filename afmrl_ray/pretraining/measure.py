"""The figures of the packaged checkpoints' model card, for any generator and encoder that fit their prompts."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from afmrl_ray.attributes.text import InvalidAttributes, format_attributes, normalise_attributes, parse_attributes
from afmrl_ray.catalogue.synthetic.products import HIDDEN, VISIBLE
from afmrl_ray.config.models import EncoderConfig, GeneratorConfig
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.generation import generate
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import collate
from afmrl_ray.pretraining.stream import StreamItem

_BATCH = 50


@torch.no_grad()
def generator_figures(
    model: Any,
    processor: ItemProcessor,
    items: Sequence[StreamItem],
    *,
    config: GeneratorConfig,
    temperature: float | None = None,
) -> dict[str, float]:
    """Correct values by attribute, and invalid outputs, of a generator.

    Args:
        model: the generator.
        processor: of its checkpoint.
        items: N items.
        config: instruction, limits and `unique_names`.
        temperature: of one sample per item, with the item's number as its seed; none = greedy.

    Returns:
        `<field>/named` and `<field>/unnamed`, the fraction of items with a correct value among those whose title does
        or does not name it; an invalid output has none. `hidden_claimed`, the number of values of attributes that
        neither image nor title shows. `invalid`, and `invalid/<reason>`, fractions of N.
    """
    correct: dict[str, list[bool]] = defaultdict(list)
    reasons: Counter[str] = Counter()
    claimed = 0
    for start in range(0, len(items), _BATCH):
        part = items[start : start + _BATCH]
        prompts = [processor.model_input(item.image, f"{item.title}\n{config.instruction}") for item in part]
        out = generate(
            model,
            processor,
            prompts,
            max_new_tokens=config.max_new_tokens,
            seeds=None if temperature is None else list(range(start, start + len(part))),
            temperature=temperature or 1.0,
            unique_names=config.unique_names,
        )
        for item, (text, complete) in zip(part, out.texts(processor), strict=True):
            found = parse_attributes(text, max_attributes=config.max_attributes, complete=complete)
            if isinstance(found, InvalidAttributes):
                reasons[found.reason] += 1
                found = ()
            written = dict(found)
            for field, (name, value) in zip((*VISIBLE, *HIDDEN), item.product.attributes().items(), strict=True):
                # Titles never name the logo; its colour in a title is that of the body.
                named = field != "logo" and item.names(field)
                if field in HIDDEN and not named:
                    claimed += name in written
                else:
                    correct[f"{field}/{'named' if named else 'unnamed'}"].append(written.get(name) == value)
    return {
        **{name: float(np.mean(values)) for name, values in sorted(correct.items())},
        "hidden_claimed": float(claimed),
        "invalid": reasons.total() / len(items),
        **{f"invalid/{reason}": count / len(items) for reason, count in sorted(reasons.items())},
    }


@torch.no_grad()
def encoder_figures(
    model: Any, processor: ItemProcessor, rows: Sequence[Mapping[str, Any]], *, config: EncoderConfig
) -> dict[str, float]:
    """Retrieval of an encoder without further training.

    Args:
        model: the encoder's backbone.
        processor: of its checkpoint.
        rows: of one split of a synthetic catalogue with queries and gallery, as `make_catalogue` writes them.
        config: instruction.

    Returns:
        `<views>/hit@1` and `<views>/family_hit`, fractions of the queries whose best gallery item is of their product
        or family; views are `without` attributes, `query` with true attributes in the query alone, `both` in both.
    """
    encoder = EmbeddingModel(model).eval()
    is_query = np.array([row["role"] == "query" for row in rows])
    vectors = {shown: _embedded(encoder, processor, rows, config, shown) for shown in (False, True)}
    figures = {}
    for views, query, gallery in (("without", False, False), ("query", True, False), ("both", True, True)):
        best = (vectors[query][is_query] @ vectors[gallery][~is_query].T).argmax(1)
        for figure, column in (("hit@1", "product_id"), ("family_hit", "family_id")):
            labels = np.array([row[column] for row in rows])
            figures[f"{views}/{figure}"] = float((labels[~is_query][best] == labels[is_query]).mean())
    return figures


def _embedded(
    encoder: EmbeddingModel,
    processor: ItemProcessor,
    rows: Sequence[Mapping[str, Any]],
    config: EncoderConfig,
    with_attributes: bool,
) -> np.ndarray:
    """[N, D] vectors of rows, their true attributes in the text or not."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        inputs = []
        for row in rows[start : start + _BATCH]:
            text = [config.instruction, row["title"]]
            if with_attributes:
                text.append(format_attributes(normalise_attributes(json.loads(row["true_attributes"]))))
            image = Image.open(io.BytesIO(row["image"])).convert("RGB")
            inputs.append(processor.model_input(image, "\n".join(part for part in text if part)))
        parts.append(encoder(**collate(inputs, processor.pad_id)))
    return torch.cat(parts).numpy()
