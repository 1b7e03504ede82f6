"""Stage 1 on a Ray Train worker group: the shell around batches, encoder and loss."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from afmrl_ray import storage
from afmrl_ray.agcl.dual_prepare import DualPreparer
from afmrl_ray.agcl.dual_step import DualStep
from afmrl_ray.agcl.prepare import Preparer
from afmrl_ray.agcl.step import AGCLStep
from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.catalogue import CatalogueRef
from afmrl_ray.config import Config, validate
from afmrl_ray.models.adapters import load_for_training, save_trained
from afmrl_ray.models.backbones import fetch
from afmrl_ray.models.dual_encoder import DualEncoder, DualProcessor
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.flops import EncoderFlops
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.unwrap import unwrap_model
from afmrl_ray.models.vision_cache import VisionCache
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.fit import fit, run_steps, worker_threads
from afmrl_ray.training.metrics_log import results_of


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
    return results_of(result.metrics)


def train_loop(payload: dict[str, Any]) -> None:
    """What every worker runs; `payload` is the plain-data argument that Ray Train ships."""
    config, job = validate(payload["config"]), payload["job"]
    if config.encoder.kind == "dual_encoder":
        return train_dual_encoder(config, job)
    agcl = config.agcl
    worker_threads(agcl.workers)
    rank, world = dist.get_rank(), dist.get_world_size()
    model = load_for_training(job.start, "encoder", agcl.adapter, seed=config.run.seed, dtype=config.encoder.dtype)
    processor = ItemProcessor.from_pretrained(job.start, config.encoder.image)
    catalogue = job.catalogue.open()
    flops = EncoderFlops(model)
    engine = Engine(
        EmbeddingModel(model, agcl.temperature if agcl.learn_temperature else None).train(),
        agcl.optimizer,
        steps=agcl.steps,
        zero_stage=agcl.workers.zero_stage,
        bf16=config.encoder.dtype == "bfloat16",
    )
    store = read_attributes(job.attributes) if job.attributes else None
    cached = config.encoder.vision_cache
    cache = VisionCache(model, processor, cached) if cached.enabled else None
    preparer = Preparer(config, catalogue, processor, store, rank=rank, world=world, cache=cache)
    step_fn = AGCLStep(agcl, preparer, engine, pad_id=processor.pad_id, flops=flops, rank=rank, world=world)

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
    return None


def train_dual_encoder(config: Config, job: AGCLJob) -> None:
    """The same for an encoder of kind `dual_encoder`."""
    agcl = config.agcl
    worker_threads(agcl.workers)
    rank, world = dist.get_rank(), dist.get_world_size()
    model = load_for_training(job.start, "dual_encoder", agcl.adapter, seed=config.run.seed, dtype=config.encoder.dtype)
    processor = DualProcessor.from_pretrained(fetch(job.start), unwrap_model(model))
    engine = Engine(
        DualEncoder(model).train(),
        agcl.optimizer,
        steps=agcl.steps,
        zero_stage=agcl.workers.zero_stage,
        bf16=config.encoder.dtype == "bfloat16",
    )
    store = read_attributes(job.attributes) if job.attributes else None
    preparer = DualPreparer(config, job.catalogue.open(), processor, store, rank=rank, world=world)

    def save_model(path: str) -> None:
        with engine.whole_parameters():
            if rank == 0:
                save_trained(model, path, processor=job.start)

    run_steps(
        engine,
        DualStep(config, preparer, engine, processor, rank=rank, world=world),
        steps=agcl.steps,
        seed=config.run.seed,
        workers=agcl.workers,
        log_directory=storage.join(job.directory, "log"),
        label=job.name,
        save_model=save_model,
    )
