"""One step of AGCL on one worker: listings to embeddings, embeddings to loss, loss to gradients."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from afmrl_ray.agcl.batches import PairSampler, Shown
from afmrl_ray.agcl.gather import gather_plain, gather_with_gradient
from afmrl_ray.agcl.gradcache import backward_in_parts
from afmrl_ray.agcl.layout import Batch, Direction
from afmrl_ray.agcl.loss import (
    agcl_loss,
    attribute_keep,
    false_negative_keep,
    keep_negatives,
    margin_keep,
    scale_lexical,
)
from afmrl_ray.attributes.lexical import BM25
from afmrl_ray.attributes.store import AttributeStore
from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config import Config
from afmrl_ray.models.listing import ListingProcessor, Row, collate
from afmrl_ray.models.microbatches import cut_by_tokens
from afmrl_ray.models.prompts import encoder_row
from afmrl_ray.models.vision_cache import VisionCache
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.stopwatch import Stopwatch

log = logging.getLogger(__name__)

_LEAST_TEMPERATURE = 0.01


class AGCLStep:
    """Forward and backward passes of one step on one worker.

    The global batch is known to every worker, so only embeddings travel: the BM25 weights and the masks of the local
    rows against all columns are computed where they are used. Columns are all positives, then all curated negatives.
    """

    def __init__(
        self,
        config: Config,
        catalogue: StagedCatalogue,
        processor: ListingProcessor,
        store: AttributeStore | None,
        engine: Engine,
        *,
        rank: int = 0,
        world: int = 1,
        cache: VisionCache | None = None,
    ) -> None:
        self._cache = cache
        self._config, self._agcl = config, config.agcl
        self._catalogue, self._processor, self._store, self._engine = catalogue, processor, store, engine
        self._rank, self._world, self._share = rank, world, config.agcl.batch_size // world
        self._items = catalogue.column("item_id")
        self._sampler = PairSampler(catalogue, config.agcl, seed=config.run.seed)
        by_attributes = self._agcl.mask.enabled and self._agcl.mask.kind == "attributes"
        wanted = store is not None and (self._agcl.lexical.enabled or by_attributes)
        self._bm25 = self._fit_bm25() if wanted and self._agcl.lexical.idf == "corpus" else None
        self._lexical_wanted = wanted
        self._warned = False

    def _fit_bm25(self) -> BM25:
        rows = {
            row
            for pair in self._agcl.pairs
            for side in (pair.query, pair.positive)
            for row in self._catalogue.rows(side).tolist()
        }
        return BM25().fit([self._text(row) for row in sorted(rows)])

    def _text(self, row: int) -> str:
        return self._store.text(self._items[row]) if self._store is not None else ""

    def __call__(self, step: int) -> dict[str, float]:
        watch = Stopwatch(self._engine.device)
        hits, misses = (self._cache.hits, self._cache.misses) if self._cache is not None else (0, 0)
        with watch("data"):
            batch = Batch(self._sampler.batch(step), self._rank, self._world, self._sampler.product_of)
            rows = [self._input(*listing) for listing in batch.local_listings()]
            budget = self._agcl.tokens_per_microbatch
            parts = cut_by_tokens([len(row) for row in rows], budget) if budget else [list(range(len(rows)))]

        def encode(wanted: list[int]) -> Tensor:
            with watch("forward"):
                inputs = collate([rows[row] for row in wanted], self._processor.pad_id, self._engine.device)
                return self._engine(**inputs)

        def loss(embeddings: Tensor) -> tuple[Tensor, dict[str, float]]:
            with watch("loss"):
                return self._loss(step, batch, embeddings)

        def backward(value: Tensor, last: bool) -> None:
            with watch("backward"):
                self._engine.backward(value, last=last)

        stats = backward_in_parts(encode, parts, loss, backward, idle=self._most(len(parts)) - len(parts))
        values = {**stats, **self._sizes(rows, parts), **watch.seconds()}
        if self._cache is not None:
            looked = self._cache.hits - hits + self._cache.misses - misses
            values["vision_cache_hit_share"] = (self._cache.hits - hits) / max(1, looked)
        return values

    def _input(self, shown: Shown, source: int, as_query: bool) -> Row:
        pair = self._agcl.pairs[source]
        config = pair.query if as_query else pair.positive
        enriched = self._agcl.enrich_query if as_query else self._agcl.enrich_positive
        return encoder_row(
            self._processor,
            self._catalogue,
            shown.row,
            config=self._config.encoder,
            inputs=config.inputs,
            title_columns=config.title_columns,
            attributes=self._text(shown.row) if shown.enrich < enriched else "",
            cache=self._cache,
        )

    def _most(self, parts: int) -> int:
        """The largest number of parts of any worker; known without asking where nothing is cut."""
        if self._world == 1 or self._agcl.tokens_per_microbatch is None:
            return parts
        most = torch.tensor(parts, device=self._engine.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def _sizes(self, rows: Sequence[Row], parts: Sequence[Sequence[int]]) -> dict[str, float]:
        """Samples of the step, and tokens of this worker."""
        tokens = sum(len(row) for row in rows)
        padded = sum(max(len(rows[row]) for row in part) * len(part) for part in parts)
        return {
            "samples": float(self._agcl.batch_size),
            "tokens": float(tokens),
            "visual_tokens": float(sum(int(row.token_types.sum()) for row in rows)),
            "padding_share": 1 - tokens / padded,
            "microbatches": float(len(parts)),
        }

    def _loss(self, step: int, batch: Batch, embeddings: Tensor) -> tuple[Tensor, dict[str, float]]:
        temperature = embeddings.new_tensor(self._agcl.temperature)
        if self._agcl.learn_temperature:
            temperature = embeddings[:, -1].mean().exp().clamp(min=_LEAST_TEMPERATURE)
            embeddings = embeddings[:, :-1]
        queries, positives, negatives = embeddings.split(batch.counts)
        everyone = gather_with_gradient(positives)
        if batch.negatives:
            everyone = torch.cat([everyone, gather_with_gradient(negatives)])
        losses, stats = self._direction(
            step, batch.forward(self._text), queries, everyone, temperature=temperature, device=embeddings.device
        )
        if self._agcl.bidirectional:
            backward, _ = self._direction(
                step,
                batch.backward(self._text),
                positives,
                gather_with_gradient(queries),
                temperature=temperature,
                device=embeddings.device,
            )
            losses = torch.stack([losses, backward])
        loss = losses.mean()
        stats["temperature"] = float(temperature.detach())
        values = torch.tensor([*stats.values(), float(loss.detach())], dtype=torch.float64, device=loss.device)
        mean = dict(zip([*stats, "loss"], gather_plain(values[None]).mean(0).tolist(), strict=True))
        self._warn(step, mean["masked_share"])
        return loss, mean

    def _direction(
        self,
        step: int,
        task: Direction,
        own: Tensor,
        candidates: Tensor,
        *,
        temperature: Tensor,
        device: torch.device,
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of the local rows against all columns, over each of a row's positives."""
        agcl = self._agcl
        similarity = own @ candidates.T
        raw = self._scores(task).to(device) if self._lexical_wanted else None
        found = []
        for column in task.positives:
            index = torch.tensor(column, device=device)
            lexical = None
            if raw is not None and agcl.lexical.enabled:
                lexical = scale_lexical(raw, index, scale=agcl.lexical.scale, temperature=agcl.lexical.temperature)
            found.append(
                agcl_loss(
                    similarity,
                    index,
                    temperature=temperature,
                    lexical=lexical,
                    keep=self._keep(step, task, similarity.detach(), candidates.detach(), raw, index),
                    positive_weight=agcl.lexical.positive_weight,
                )
            )
        loss = torch.stack([value for value, _ in found]).mean()
        return loss, {name: sum(stats[name] for _, stats in found) / len(found) for name in found[0][1]}

    def _scores(self, task: Direction) -> Tensor:
        bm25 = self._bm25
        if bm25 is None:
            # Every worker sees all candidates, so the statistics do not depend on who asks.
            bm25 = BM25().fit(task.candidate_texts)
        return torch.from_numpy(bm25.scores(task.own_texts, task.candidate_texts))

    def _keep(
        self, step: int, task: Direction, similarity: Tensor, candidates: Tensor, raw: Tensor | None, index: Tensor
    ) -> Tensor | None:
        mask = self._agcl.mask
        shared: dict[str, Any] = {
            "product_ids": torch.tensor(task.products, device=similarity.device),
            "exempt": task.exempt.to(similarity.device) if task.exempt is not None else None,
        }
        if mask.enabled and step >= mask.warmup_steps:
            shared["min_negatives"] = mask.min_negatives
            if mask.kind == "candidate":
                keep = false_negative_keep(candidates, index, threshold=mask.threshold, **shared)
            elif mask.kind == "margin":
                keep = margin_keep(similarity, index, margin=mask.margin, **shared)
            else:
                assert raw is not None  # the config sees to it
                keep = attribute_keep(raw, index, threshold=mask.attribute_threshold, **shared)
        elif len(task.positives) == 1 and task.valid is None:
            return None  # a batch holds each product once, so there is nothing to hide
        else:
            keep = keep_negatives(torch.zeros_like(similarity, dtype=torch.bool), similarity, index, **shared)
        return keep if task.valid is None else keep & task.valid.to(keep.device)

    def _warn(self, step: int, masked: float) -> None:
        if masked > 0.5 and not self._warned and self._rank == 0:
            self._warned = True
            log.warning(
                "step %d: agcl.mask hides %.0f %% of the negatives; raise its threshold (or margin), or let it begin "
                "later with agcl.mask.warmup_steps",
                step,
                100 * masked,
            )
