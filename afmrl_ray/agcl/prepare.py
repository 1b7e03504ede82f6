"""Inputs of a step before the encoder runs: sampled pairs, model inputs, micro-batches and BM25 scores.

All of it is a function of the step's number, so the next step is prepared in a thread while this one is trained.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

from afmrl_ray.agcl.batches import PairSampler
from afmrl_ray.agcl.directions import TrueCodes, local_items, positive_to_query, query_to_positive
from afmrl_ray.agcl.encoder import Input, StepInputs, TrainableEncoder
from afmrl_ray.attributes.lexical import BM25
from afmrl_ray.attributes.store import AttributeStore
from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config import Config
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.microbatches import cut_by_tokens

log = logging.getLogger(__name__)


class Preparer(Generic[Input]):
    """Prepares the steps of one worker; every worker knows the whole batch.

    Args:
        config: the whole config.
        catalogue: where items come from.
        encoder: makes the model inputs.
        store: attributes, or none.
        negatives: mined negatives, see `PairSampler`.
        rank: of this worker.
        world: number of workers.

    Raises:
        CatalogueError: see `PairSampler`.
        ConfigError: see `PairSampler`; or the mask needs attributes, and there are none.
    """

    def __init__(
        self,
        config: Config,
        catalogue: StagedCatalogue,
        encoder: TrainableEncoder[Input],
        store: AttributeStore | None,
        *,
        negatives: Sequence[Sequence[str] | None] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._agcl = config.agcl
        self._catalogue, self._encoder, self._store = catalogue, encoder, store
        self._rank, self._world = rank, world
        self._items = catalogue.column("item_id")
        self._sampler = PairSampler(catalogue, config.agcl, seed=config.run.seed, store=store, negatives=negatives)
        by_attributes = self._agcl.mask.enabled and self._agcl.mask.kind in ("attributes", "both")
        if by_attributes and store is None:
            raise ConfigError(
                f"agcl.mask.kind {self._agcl.mask.kind} needs attributes, and this training has none; train with an "
                "attribute table, or set agcl.mask.kind=candidate"
            )
        self._true_codes = TrueCodes(self._codes("family_id"), self._codes(self._agcl.mask.column))
        if self._agcl.mask.enabled and self._agcl.mask.kind == "column" and self._true_codes.true_products is None:
            raise ConfigError(
                f"agcl.mask.column: the catalogue has no column {self._agcl.mask.column!r}; name the column with the "
                "true product, or choose another agcl.mask.kind"
            )
        self._scored = store is not None and (self._agcl.lexical.enabled or by_attributes)
        self._bm25 = self._fit_bm25() if self._scored and self._agcl.lexical.idf == "corpus" else None
        if self._scored and rank == 0:
            self._warn_of_missing_attributes()

    def _codes(self, column: str) -> list[int] | None:
        """A code for each value of a column, -1 for null; none if the catalogue has no such column."""
        if column not in self._catalogue.table.column_names:
            return None
        codes: dict[str, int] = {}
        return [
            -1 if value is None else codes.setdefault(value, len(codes)) for value in self._catalogue.column(column)
        ]

    def _new_bm25(self) -> BM25:
        return BM25(terms=self._agcl.lexical.terms, idf_formula=self._agcl.lexical.idf_formula)

    def _fit_bm25(self) -> BM25:
        return self._new_bm25().fit(self._texts(self._catalogue.rows_of_any(self._agcl.selectors).tolist()))

    def _warn_of_missing_attributes(self) -> None:
        """Items without attributes have BM25 scores of zero, although nothing is known of their similarity."""
        for number, pair in enumerate(self._agcl.pairs):
            for name, selector in (("query", pair.query), ("positive", pair.positive)):
                texts = self._texts(self._catalogue.rows(selector).tolist())
                missing = sum(not text for text in texts)
                if missing > len(texts) / 2:
                    log.warning(
                        "agcl.pairs.%d.%s: %d of %d items have no attributes, so their BM25 weights carry no "
                        "information",
                        number, name, missing, len(texts),
                    )  # fmt: skip

    def _texts(self, rows: Sequence[int]) -> list[str]:
        return [self._store.text(self._items[row]) if self._store is not None else "" for row in rows]

    def prepare(self, step: int) -> StepInputs[Input]:
        """The inputs of a step, with `time/prepare` and of it `time/bm25` (seconds) among its metrics."""
        began = time.perf_counter()
        pairs = self._sampler.batch(step)
        place = {"rank": self._rank, "world": self._world}
        items, counts = local_items(pairs, **place)
        texts = self._texts([item.row for item in items])
        attributes = [text if item.with_attributes else "" for item, text in zip(items, texts, strict=True)]
        inputs, metrics = self._encoder.prepare(step, items, attributes, queries=counts[0])
        budget = self._agcl.tokens_per_microbatch
        parts = cut_by_tokens([len(each) for each in inputs], budget) if budget else [list(range(len(inputs)))]
        scoring = time.perf_counter()
        lexical = self._lexical_scores if self._scored else None
        queries = query_to_positive(pairs, **place, lexical=lexical, true_codes=self._true_codes)
        positives = (
            positive_to_query(pairs, **place, lexical=lexical, true_codes=self._true_codes)
            if self._agcl.bidirectional
            else None
        )
        ended = time.perf_counter()
        metrics = {**metrics, "time/prepare": ended - began, "time/bm25": ended - scoring}
        return StepInputs(items, counts, inputs, parts, queries, positives, metrics)

    def _lexical_scores(self, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        candidates = self._texts(columns)
        # The candidates are those of all workers, so all workers fit the same document frequencies.
        bm25 = self._bm25 or self._new_bm25().fit(candidates)
        return torch.from_numpy(bm25.scores(self._texts(rows), candidates))


Prepared = TypeVar("Prepared")


class Prefetcher(Generic[Prepared]):
    """Prepares the next step in a thread while the current one is trained.

    Args:
        prepare: makes a step's inputs from its number.
        steps: of the training; nothing is prepared beyond them.
    """

    def __init__(self, prepare: Callable[[int], Prepared], steps: int) -> None:
        self._prepare, self._steps = prepare, steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._waiting: tuple[int, Future[Prepared]] | None = None

    def take(self, step: int) -> Prepared:
        """A step's inputs, waited for if need be; preparation of the next step begins."""
        if self._waiting is not None and self._waiting[0] == step:
            found = self._waiting[1].result()
        else:
            found = self._prepare(step)
        following = step + 1
        self._waiting = None
        if following < self._steps:
            self._waiting = (following, self._pool.submit(self._prepare, following))
        return found
