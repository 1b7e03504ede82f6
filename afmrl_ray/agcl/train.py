"""Stage 1 on a Ray Train worker group: the shell around batches, encoder and loss."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from afmrl_ray import storage
from afmrl_ray.agcl.batches import Pair, PairSampler
from afmrl_ray.agcl.gather import gather_plain, gather_with_gradient
from afmrl_ray.agcl.loss import agcl_loss, false_negative_keep, scale_lexical
from afmrl_ray.attributes.lexical import BM25
from afmrl_ray.attributes.store import AttributeStore, read_attributes
from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue
from afmrl_ray.config import Config, validate
from afmrl_ray.config.train import AGCLConfig
from afmrl_ray.models.adapters import load_start, save_trained
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.listing import ListingProcessor, Row, collate
from afmrl_ray.models.prompts import encoder_row
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.fit import fit, run_steps, worker_threads


@dataclass(frozen=True)
class AGCLJob:
    """What a training of the encoder starts from.

    Attributes:
        start: checkpoint of the backbone, or adapter or model to go on from.
        attributes: path of the attribute table, or none for training without attributes.
        catalogue: the catalogue.
        directory: attempt directory; the model is written to `<directory>/model`.
        name: Ray Train run name.
    """

    start: str
    attributes: str | None
    catalogue: CatalogueRef
    directory: str
    name: str


def train_agcl(config: Config, job: AGCLJob) -> dict[str, float]:
    """Train the encoder and write it to `<job.directory>/model`; returns the numbers of the last step."""
    result = fit(
        train_loop,
        {"config": config.model_dump(mode="json"), "job": job},
        name=job.name,
        directory=storage.join(job.directory, "train"),
        workers=config.agcl.workers,
        wait_s=config.ray.wait_for_resources_s,
    )
    with result.checkpoint.as_directory() as checkpoint:
        storage.copy_dir(os.path.join(checkpoint, "model"), storage.join(job.directory, "model"))
    return {name: value for name, value in result.metrics.items() if isinstance(value, float)}


def train_loop(payload: dict[str, Any]) -> None:
    """What every worker runs; `payload` is the plain-data argument that Ray Train ships."""
    config, job = validate(payload["config"]), payload["job"]
    agcl = config.agcl
    worker_threads(agcl.workers)
    rank, world = dist.get_rank(), dist.get_world_size()
    model = load_start(job.start, "encoder", agcl.adapter, seed=config.run.seed, dtype=config.encoder.dtype)
    processor = ListingProcessor.from_pretrained(job.start, config.encoder.picture)
    catalogue = job.catalogue.open()
    engine = Engine(
        EmbeddingModel(model),
        agcl.optimizer,
        steps=agcl.steps,
        zero_stage=agcl.workers.zero_stage,
        bf16=config.encoder.dtype == "bfloat16",
    )
    store = read_attributes(job.attributes) if job.attributes else None
    step_fn = AGCLStep(config, catalogue, processor, store, engine, rank=rank, world=world)

    def save_model(path: str) -> None:
        with engine.whole_parameters():
            if rank == 0:
                save_trained(model, path, processor=job.start)

    run_steps(
        engine,
        step_fn,
        steps=agcl.steps,
        seed=config.run.seed,
        workers=agcl.workers,
        log_directory=storage.join(job.directory, "log"),
        label=job.name,
        save_model=save_model,
    )


class AGCLStep:
    """Forward and backward passes of one step on one worker.

    The global batch is known to every worker, so only embeddings travel: the BM25 weights and the product mask of
    the local rows against all columns are computed where they are used.
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
    ) -> None:
        self._config, self._agcl = config, config.agcl
        self._catalogue, self._processor, self._store, self._engine = catalogue, processor, store, engine
        self._rank, self._share = rank, config.agcl.batch_size // world
        self._items = catalogue.column("item_id")
        self._sampler = PairSampler(
            catalogue, config.agcl.pairs, batch_size=config.agcl.batch_size, seed=config.run.seed
        )
        self._bm25 = self._fit_bm25() if store is not None and config.agcl.lexical.enabled else None

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
        pairs = self._sampler.batch(step)
        local = pairs[self._rank * self._share : (self._rank + 1) * self._share]
        rows = [self._input(pair, "query") for pair in local] + [self._input(pair, "positive") for pair in local]
        batch = collate(rows, self._processor.pad_id, self._engine.device)
        queries, positives = self._engine(**batch).chunk(2)
        loss, stats = self._loss(step, pairs, queries, positives)
        self._engine.backward(loss)
        return stats

    def _input(self, pair: Pair, side: str) -> Row:
        row = getattr(pair, side)
        shown = getattr(pair, f"enrich_{side}") < getattr(self._agcl, f"enrich_{side}")
        config = getattr(self._agcl.pairs[pair.source], side)
        return encoder_row(
            self._processor,
            self._catalogue,
            row,
            config=self._config.encoder,
            inputs=config.inputs,
            title_columns=config.title_columns,
            attributes=self._text(row) if shown else "",
        )

    def _loss(
        self, step: int, pairs: list[Pair], queries: Tensor, positives: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        forward = self._direction(step, pairs, queries, positives, "query", "positive")
        directions = [forward]
        if self._agcl.bidirectional:
            directions.append(self._direction(step, pairs, positives, queries, "positive", "query"))
        loss = torch.stack([direction[0] for direction in directions]).mean()
        stats = torch.tensor([*forward[1].values(), float(loss.detach())], dtype=torch.float64)
        mean = gather_plain(stats.to(loss.device)[None]).mean(0).tolist()
        return loss, dict(zip([*forward[1], "loss"], mean, strict=True))

    def _direction(
        self, step: int, pairs: list[Pair], own: Tensor, other: Tensor, own_side: str, other_side: str
    ) -> tuple[Tensor, dict[str, float]]:
        agcl = self._agcl
        first = self._rank * self._share
        index = torch.arange(first, first + self._share, device=own.device)
        everyone = gather_with_gradient(other)
        lexical = None
        if self._bm25 is not None:
            asked = [self._text(getattr(pair, own_side)) for pair in pairs[first : first + self._share]]
            there = [self._text(getattr(pair, other_side)) for pair in pairs]
            scores = torch.from_numpy(self._bm25.scores(asked, there)).to(own.device)
            lexical = scale_lexical(scores, index, scale=agcl.lexical.scale, temperature=agcl.lexical.temperature)
        keep = None
        if agcl.mask.enabled and step >= agcl.mask.warmup_steps:
            keep = false_negative_keep(
                everyone.detach(),
                index,
                threshold=agcl.mask.threshold,
                product_ids=torch.tensor([pair.product for pair in pairs], device=own.device),
                min_negatives=agcl.mask.min_negatives,
            )
        return agcl_loss(
            own @ everyone.T,
            index,
            temperature=agcl.temperature,
            lexical=lexical,
            keep=keep,
            positive_weight=agcl.lexical.positive_weight,
        )


def plain_infonce(agcl: AGCLConfig) -> AGCLConfig:
    """The same training without attributes, weights and mask: the baseline of the ladder."""
    return agcl.model_copy(
        update={
            "lexical": agcl.lexical.model_copy(update={"enabled": False}),
            "mask": agcl.mask.model_copy(update={"enabled": False}),
            "enrich_query": 0.0,
            "enrich_positive": 0.0,
        }
    )
