"""Training of a dual encoder (CLIP, SigLIP): the contrastive objective, and the auxiliary ones of CLIP and FG-CLIP."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afmrl_ray.agcl.batches import SampledItem
from afmrl_ray.agcl.contrastive import contrastive_loss
from afmrl_ray.agcl.dual_inputs import Region, changed_texts, crop, parse_boxes, regions, values_by_name
from afmrl_ray.agcl.dual_loss import hard_text_loss, summed_info_nce
from afmrl_ray.agcl.encoder import StepInputs
from afmrl_ray.agcl.gather import gather_plain, gather_with_gradient
from afmrl_ray.attributes.store import AttributeStore
from afmrl_ray.attributes.text import format_attributes
from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config import Config
from afmrl_ray.models.dual_encoder import DualEncoder, DualInput, DualProcessor, dual_text, embed_towers, fuse
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.stopwatch import Stopwatch

_MISSING = DualInput(None, None)
_REGION_DRAW, _TEXTS_DRAW = 23, 29
"""Streams of random numbers for regions and for changed texts."""


class TrainableDualEncoder:
    """A `TrainableEncoder` around a (PEFT-wrapped) `CLIPModel` or `SiglipModel`.

    The inputs of a step of B local queries are the items, then B regions (one of each query), then B * (1 + K) texts
    (each query's attribute text and K changed ones); missing regions and texts are empty inputs.

    Args:
        config: the whole config.
        model: from `models.adapters.load_for_training`.
        processor: of its checkpoint.
        catalogue: where items come from.
        store: attributes, for regions and changed texts; none = there are none of either.
        rank: of this worker.
        world: number of workers.

    Raises:
        CatalogueError: `encoder.dual_encoder.region_weight` is set and the catalogue has no column of boxes.
    """

    def __init__(
        self,
        config: Config,
        model: Any,
        processor: DualProcessor,
        catalogue: StagedCatalogue,
        store: AttributeStore | None,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._agcl, self._dual, self._seed = config.agcl, config.encoder.dual_encoder, config.run.seed
        self._processor, self._catalogue, self._store = processor, catalogue, store
        self._rank, self._world = rank, world
        self.model, self.module = model, DualEncoder(model).train()
        self._items = catalogue.column("item_id")
        self._boxes = catalogue.column(self._dual.boxes_column) if self._dual.region_weight else None
        self._values = self._known_values() if self._dual.hard_text_weight else {}

    def _known_values(self) -> dict[str, list[str]]:
        if self._store is None:
            return {}
        rows = self._catalogue.rows_of_any(self._agcl.selectors)
        return values_by_name([self._store.get(self._items[row]) for row in rows.tolist()])

    def prepare(
        self, step: int, items: Sequence[SampledItem], attributes: Sequence[str], *, queries: int
    ) -> tuple[list[DualInput], dict[str, float]]:
        """See `TrainableEncoder.prepare`."""
        inputs = [self._item_input(item, text) for item, text in zip(items, attributes, strict=True)]
        drawn = [self._region_input(item.row, step) for item in items[:queries]]
        texts = [self._text_inputs(item.row, step) for item in items[:queries]]
        metrics = {
            "data/regions": float(sum(region.pixels is not None for region in drawn)),
            "data/changed_texts": float(sum(text.input_ids is not None for own in texts for text in own[1:])),
        }
        return [*inputs, *drawn, *(text for own in texts for text in own)], metrics

    def _item_input(self, item: SampledItem, attributes: str) -> DualInput:
        selector = item.selector
        title = self._catalogue.title(item.row, selector.title_columns) if selector.inputs != "image" else ""
        image = self._catalogue.image(item.row) if selector.inputs != "text" else None
        return self._processor.model_input(image, dual_text(title, attributes))

    def _draw(self, row: int, step: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, step, row, stream])

    def _region_input(self, row: int, step: int) -> DualInput:
        """One of the item's regions, drawn in every step, with its phrase."""
        region = self._drawn_region(row, step)
        if region is None:
            return _MISSING
        return self._processor.model_input(crop(self._catalogue.image(row), region.box), region.phrase)

    def _drawn_region(self, row: int, step: int) -> Region | None:
        if self._boxes is None or self._store is None:
            return None
        attributes = self._store.get(self._items[row])
        found = regions(parse_boxes(self._boxes[row]), attributes, self._dual.region_attributes)
        return found[int(self._draw(row, step, _REGION_DRAW).integers(len(found)))] if found else None

    def _text_inputs(self, row: int, step: int) -> list[DualInput]:
        """The item's attribute text, then changed ones, padded by empty inputs to 1 + `hard_texts`."""
        count = self._dual.hard_texts
        attributes = self._store.get(self._items[row]) if self._store is not None else ()
        if not self._dual.hard_text_weight or not attributes:
            return [_MISSING] * (1 + count)
        changed = changed_texts(attributes, self._values, count=count, draw=self._draw(row, step, _TEXTS_DRAW))
        texts = [format_attributes(attributes), *changed]
        return [self._processor.model_input(None, text) for text in texts] + [_MISSING] * (1 + count - len(texts))

    def embed(self, engine: Engine, inputs: Sequence[DualInput]) -> Tensor:
        """[B, 2 D]: image vectors beside text vectors, each of unit length, zero where an input has none."""
        return torch.cat(embed_towers(engine, self._processor, inputs, engine.device), dim=1)

    def loss(
        self, step: int, inputs: StepInputs[DualInput], embeddings: Tensor, watch: Stopwatch
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the objectives; their weighted values are among the statistics as `<objective>_loss`."""
        dual = self._dual
        items, queries = len(inputs.items), inputs.counts[0]
        sizes = [items, queries, queries * (1 + dual.hard_texts)]
        images, texts = embeddings.chunk(2, dim=1)
        own_images, region_images, _ = images.split(sizes)
        own_texts, region_phrases, attribute_texts = texts.split(sizes)
        of_items, of_regions, of_texts = (
            inputs.inputs[:items],
            inputs.inputs[items : items + queries],
            inputs.inputs[items + queries :],
        )
        losses: dict[str, Tensor] = {}
        stats: dict[str, float] = {}
        if dual.pair_weight:
            pair, stats = contrastive_loss(self._agcl, step, inputs, fuse(own_images, own_texts), watch)
            losses["pair_loss"] = dual.pair_weight * pair
        if dual.image_text_weight:
            present = [each.pixels is not None and each.input_ids is not None for each in of_items]
            codes = torch.tensor([item.product for item in inputs.items])
            losses["image_text_loss"] = dual.image_text_weight * self._image_text_loss(
                own_images, own_texts, present, codes, watch
            )
        if dual.region_weight:
            present = [each.pixels is not None for each in of_regions]
            # Equal phrases are not negatives of one another, whichever images they describe.
            codes = torch.tensor([_code(each.input_ids) for each in of_regions])
            losses["region_loss"] = dual.region_weight * self._image_text_loss(
                region_images, region_phrases, present, codes, watch
            )
        if dual.hard_text_weight:
            losses["hard_text_loss"] = dual.hard_text_weight * self._hard_text_loss(
                own_images[:queries], attribute_texts, of_items[:queries], of_texts
            )
        values = torch.stack(list(losses.values()))
        return values.sum(), {**stats, **dict(zip(losses, values.detach().tolist(), strict=True))}

    def _image_text_loss(
        self, images: Tensor, texts: Tensor, present: list[bool], codes: Tensor, watch: Stopwatch
    ) -> Tensor:
        """Images retrieve their texts and texts their images, over the inputs that have both.

        Args:
            images: [n, D] of this worker.
            texts: [n, D] of this worker.
            present: [n] whether an input has both.
            codes: [n] inputs of equal codes are not negatives of one another.
            watch: measures the time of collective calls as `gather`.
        """
        device = images.device
        local, codes = torch.tensor(present, device=device), codes.to(device)
        with watch("gather"):
            everywhere, all_codes = gather_plain(local), gather_plain(codes)
            directions = (images, gather_with_gradient(texts)), (texts, gather_with_gradient(images))
        positives = (self._rank * len(images) + torch.arange(len(images), device=device))[local]
        negatives = everywhere[None] & (all_codes[None] != codes[local][:, None])
        losses = [
            summed_info_nce(
                own[local], candidates, positives, temperature=self._agcl.temperature, negative_mask=negatives
            )
            for own, candidates in directions
        ]
        # The mean over the workers is then the mean over all inputs that have both.
        return torch.stack(losses).mean() * self._world / max(1, int(everywhere.sum()))

    def _hard_text_loss(
        self, images: Tensor, texts: Tensor, queries: Sequence[DualInput], attribute_texts: Sequence[DualInput]
    ) -> Tensor:
        """Mean over all queries with an image and a changed text, as this worker's summand."""
        present = torch.tensor([each.input_ids is not None for each in attribute_texts]).reshape(len(queries), -1)
        present &= torch.tensor([[each.pixels is not None] for each in queries])
        present = present.to(images.device)
        usable = gather_plain((present[:, 0] & present[:, 1:].any(1)).sum()[None])
        loss = hard_text_loss(images, texts.reshape(*present.shape, -1), present, temperature=self._agcl.temperature)
        return loss * self._world / max(1, int(usable.sum()))


def _code(input_ids: np.ndarray | None) -> int:
    """A number that is equal for equal token ids on every worker."""
    tokens = input_ids.tobytes() if input_ids is not None else b""
    return int.from_bytes(hashlib.blake2b(tokens, digest_size=7).digest(), "big")
