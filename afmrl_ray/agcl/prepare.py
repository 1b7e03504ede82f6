"""What a step of AGCL needs before the encoder runs: items as model inputs, cut into parts, and BM25 scores.

All of it is a pure function of the step, so the next step's is prepared by a thread while this step's encoder runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from afmrl_ray.agcl.batch_layout import Batch, Direction
from afmrl_ray.agcl.batches import PairSampler, SampledItem
from afmrl_ray.attributes.lexical import BM25
from afmrl_ray.attributes.store import AttributeStore
from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config import Config
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.microbatches import cut_by_tokens
from afmrl_ray.models.model_input import ModelInput
from afmrl_ray.models.prompts import encoder_input
from afmrl_ray.models.vision_cache import VisionCache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredView:
    """A direction with the BM25 scores [rows, columns] of its texts, or none where nothing asks for them."""

    direction: Direction
    lexical: Tensor | None


@dataclass(frozen=True)
class StepInputs:
    """A step's inputs on one worker.

    Attributes:
        counts: queries, positives and curated negatives among the rows, in this order.
        rows: what this worker embeds.
        parts: row numbers of each pass through the encoder.
        query_to_positive: queries look for positives.
        positive_to_query: positives look for queries, or none.
        numbers: for the step's metrics: `seconds_prepare` in all, `seconds_bm25` of it, and what the vision cache saw.
    """

    counts: list[int]
    rows: list[ModelInput]
    parts: list[list[int]]
    query_to_positive: ScoredView
    positive_to_query: ScoredView | None
    numbers: dict[str, float]


class Preparer:
    """Prepares steps for one worker of a group; every worker knows the global batch.

    Args:
        config: the whole config.
        catalogue: where items come from.
        processor: of the encoder's checkpoint.
        store: attributes, or none.
        rank: of this worker.
        world: number of workers.
        cache: outputs of a frozen vision tower, or none.
    """

    def __init__(
        self,
        config: Config,
        catalogue: StagedCatalogue,
        processor: ItemProcessor,
        store: AttributeStore | None,
        *,
        rank: int = 0,
        world: int = 1,
        cache: VisionCache | None = None,
    ) -> None:
        self._config, self._agcl = config, config.agcl
        self._catalogue, self._processor, self._store, self._cache = catalogue, processor, store, cache
        self._rank, self._world = rank, world
        self._items = catalogue.column("item_id")
        self._sampler = PairSampler(catalogue, config.agcl, seed=config.run.seed)
        by_attributes = self._agcl.mask.enabled and self._agcl.mask.kind == "attributes"
        self._lexical = store is not None and (self._agcl.lexical.enabled or by_attributes)
        self._bm25 = self._fit_bm25() if self._lexical and self._agcl.lexical.idf == "corpus" else None
        if self._lexical and rank == 0:
            self._warn_of_sides_without_text()

    def _fit_bm25(self) -> BM25:
        return BM25().fit([self._text(row) for row in self._catalogue.rows_of_any(self._agcl.sides).tolist()])

    def _warn_of_sides_without_text(self) -> None:
        """BM25 takes an item without attributes for one that shares nothing, as if that were known of it."""
        for number, pair in enumerate(self._agcl.pairs):
            for name, side in (("query", pair.query), ("positive", pair.positive)):
                rows = self._catalogue.rows(side).tolist()
                bare = sum(not self._text(row) for row in rows)
                if bare > len(rows) / 2:
                    log.warning(
                        "agcl.pairs.%d.%s: %d of %d items have no attributes, so their weights say nothing",
                        number, name, bare, len(rows),
                    )  # fmt: skip

    def _text(self, row: int) -> str:
        return self._store.text(self._items[row]) if self._store is not None else ""

    def batch(self, step: int) -> Batch:
        """Who is in a step."""
        return Batch(self._sampler.batch(step), self._rank, self._world, self._sampler.product_of)

    def prepare(self, step: int) -> StepInputs:
        """Everything that a step needs before the encoder runs."""
        seconds = {"seconds_prepare": 0.0, "seconds_bm25": 0.0}
        seen = (self._cache.hits, self._cache.misses) if self._cache is not None else (0, 0)
        with _timed(seconds, "seconds_prepare"):
            batch = self.batch(step)
            rows = [self._row(*item) for item in batch.local_items()]
            budget = self._agcl.tokens_per_microbatch
            parts = cut_by_tokens([len(row) for row in rows], budget) if budget else [list(range(len(rows)))]
            with _timed(seconds, "seconds_bm25"):
                query_to_positive = self._scored_view(batch.query_to_positive(self._text))
                positive_to_query = (
                    self._scored_view(batch.positive_to_query(self._text)) if self._agcl.bidirectional else None
                )
        if self._cache is not None:
            hits, misses = self._cache.hits - seen[0], self._cache.misses - seen[1]
            seconds["vision_cache_hit_fraction"] = hits / max(1, hits + misses)
        return StepInputs(batch.counts, rows, parts, query_to_positive, positive_to_query, seconds)

    def _row(self, shown: SampledItem, source: int, as_query: bool) -> ModelInput:
        pair = self._agcl.pairs[source]
        config = pair.query if as_query else pair.positive
        dropout = self._agcl.attribute_dropout.query if as_query else self._agcl.attribute_dropout.positive
        return encoder_input(
            self._processor,
            self._catalogue,
            shown.row,
            config=self._config.encoder,
            inputs=config.inputs,
            title_columns=config.title_columns,
            attributes=self._text(shown.row) if shown.attribute_draw < 1 - dropout else "",
            cache=self._cache,
        )

    def _scored_view(self, direction: Direction) -> ScoredView:
        if not self._lexical:
            return ScoredView(direction, None)
        # Without the corpus' statistics those of the candidates serve, which are everybody's and so the same for all.
        bm25 = self._bm25 or BM25().fit(direction.candidate_texts)
        return ScoredView(direction, torch.from_numpy(bm25.scores(direction.own_texts, direction.candidate_texts)))


Inputs = TypeVar("Inputs", covariant=True)


class PreparesSteps(Protocol[Inputs]):
    """Whatever makes a step's inputs from its number alone."""

    def prepare(self, step: int) -> Inputs: ...


class Prefetcher(Generic[Inputs]):
    """Prepares a step in a thread while the one before it is trained.

    Args:
        preparer: does the work.
        steps: of the training; nothing is prepared beyond them.
    """

    def __init__(self, preparer: PreparesSteps[Inputs], steps: int) -> None:
        self._preparer, self._steps = preparer, steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._waiting: tuple[int, Future[Inputs]] | None = None

    def take(self, step: int) -> Inputs:
        """A step's inputs, waited for if need be; the next step's are begun."""
        if self._waiting is not None and self._waiting[0] == step:
            found = self._waiting[1].result()
        else:
            found = self._preparer.prepare(step)
        following = step + 1
        self._waiting = None
        if following < self._steps:
            self._waiting = (following, self._pool.submit(self._preparer.prepare, following))
        return found


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - began
