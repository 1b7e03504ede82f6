"""What a step of a dual encoder needs before it runs: rows of items, of regions and of texts, and who repels whom."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from afmrl_ray.agcl.batch_layout import Batch
from afmrl_ray.agcl.batches import PairSampler, SampledItem
from afmrl_ray.agcl.dual_batches import Region, changed_texts, crop, parse_boxes, regions, values_by_name
from afmrl_ray.attributes.store import AttributeStore
from afmrl_ray.attributes.text import format_attributes
from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config import Config
from afmrl_ray.models.dual_encoder import DualInput, DualProcessor, dual_text


@dataclass(frozen=True)
class DualStepInputs:
    """A step's inputs on one worker, of B pairs.

    Attributes:
        items: [2 B] queries, then their positives.
        products: [2 B] codes of their products.
        regions: [B] a region of each query with its phrase; without pixels and text where it has none.
        phrases: [B] their phrases, empty where there is none.
        texts: [B][1 + K] the query's attribute text, then changed ones; without text where there is none.
        numbers: for the step's metrics.
    """

    items: list[DualInput]
    products: list[int]
    regions: list[DualInput]
    phrases: list[str]
    texts: list[list[DualInput]]
    numbers: dict[str, float]


class DualPreparer:
    """Prepares steps for one worker of a group; a step is a function of the run's seed and its number.

    Args:
        config: the whole config.
        catalogue: the catalogue.
        processor: of the checkpoint.
        store: attributes, for regions and changed texts and for items with attributes; none = there are none.
        rank: of this worker.
        world: number of workers.

    Raises:
        CatalogueError: `encoder.dual_encoder.region_weight` asks for boxes and the catalogue has no such column.
    """

    def __init__(
        self,
        config: Config,
        catalogue: StagedCatalogue,
        processor: DualProcessor,
        store: AttributeStore | None,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._agcl, self._seed = config.agcl, config.run.seed
        self._dual = config.encoder.dual_encoder
        self._catalogue, self._processor, self._store = catalogue, processor, store
        self._rank, self._world = rank, world
        self._items = catalogue.column("item_id")
        self._boxes = catalogue.column(self._dual.boxes_column) if self._dual.region_weight else None
        self._sampler = PairSampler(catalogue, config.agcl, seed=config.run.seed)
        self._values = self._known_values() if self._dual.hard_text_weight else {}

    def _known_values(self) -> dict[str, list[str]]:
        if self._store is None:
            return {}
        rows = self._catalogue.rows_of_any(self._agcl.sides)
        return values_by_name([self._store.get(self._items[row]) for row in rows.tolist()])

    def prepare(self, step: int) -> DualStepInputs:
        """Everything that a step needs before the towers run."""
        began = time.perf_counter()
        batch = Batch(self._sampler.batch(step), self._rank, self._world, self._sampler.product_of)
        local = batch.local_items()
        items = [self._item(shown, source, as_query) for shown, source, as_query in local]
        queries = [shown for shown, _, as_query in local if as_query]
        found = [self._region(shown, step) for shown in queries]
        return DualStepInputs(
            items=items,
            products=[self._sampler.product_of(shown.row) for shown, _, _ in local],
            regions=[row for row, _ in found],
            phrases=[phrase for _, phrase in found],
            texts=[self._texts(shown, step) for shown in queries],
            numbers={"seconds_prepare": time.perf_counter() - began},
        )

    def _item(self, shown: SampledItem, source: int, as_query: bool) -> DualInput:
        pair = self._agcl.pairs[source]
        side = pair.query if as_query else pair.positive
        dropout = self._agcl.attribute_dropout.query if as_query else self._agcl.attribute_dropout.positive
        attributes = self._text(shown.row) if shown.attribute_draw < 1 - dropout else ""
        title = self._catalogue.title(shown.row, side.title_columns) if side.inputs != "image" else ""
        image = self._catalogue.image(shown.row) if side.inputs != "text" else None
        return self._processor.model_input(image, dual_text(title, attributes))

    def _text(self, row: int) -> str:
        return self._store.text(self._items[row]) if self._store is not None else ""

    def _draw(self, shown: SampledItem, step: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, step, shown.row, purpose])

    def _region(self, shown: SampledItem, step: int) -> tuple[DualInput, str]:
        """One of the query's regions, drawn anew every time, and its phrase."""
        chosen = self._drawn_region(shown, step)
        if chosen is None:
            return DualInput(None, None), ""
        part = crop(self._catalogue.image(shown.row), chosen.box)
        return self._processor.model_input(part, chosen.phrase), chosen.phrase

    def _drawn_region(self, shown: SampledItem, step: int) -> Region | None:
        if self._boxes is None or self._store is None:
            return None
        there = regions(
            parse_boxes(self._boxes[shown.row]), self._store.get(self._items[shown.row]), self._dual.region_attributes
        )
        return there[int(self._draw(shown, step, 23).integers(len(there)))] if there else None

    def _texts(self, shown: SampledItem, step: int) -> list[DualInput]:
        """The query's own attribute text and changed ones; rows without text fill up."""
        count = self._dual.hard_texts
        nothing = DualInput(None, None)
        attributes = self._store.get(self._items[shown.row]) if self._store is not None else ()
        if not self._dual.hard_text_weight or not attributes:
            return [nothing] * (1 + count)
        changed = changed_texts(attributes, self._values, count=count, draw=self._draw(shown, step, 29))
        texts = [format_attributes(attributes), *changed]
        return [self._processor.model_input(None, text) for text in texts] + [nothing] * (1 + count - len(texts))
