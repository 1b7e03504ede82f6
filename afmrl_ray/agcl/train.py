"""Stage 1 on a Ray Train worker group: loads the encoder and runs its training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from afmrl_ray import storage
from afmrl_ray.agcl.dual_encoder import TrainableDualEncoder
from afmrl_ray.agcl.encoder import TrainableEncoder
from afmrl_ray.agcl.mined_negatives import read_negatives
from afmrl_ray.agcl.prepare import Preparer
from afmrl_ray.agcl.qwen2_vl import TrainableQwen2VL
from afmrl_ray.agcl.step import AGCLStep
from afmrl_ray.attributes.store import AttributeStore, read_attributes
from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue
from afmrl_ray.config import Config
from afmrl_ray.models.adapters import load_for_training, save_trained
from afmrl_ray.models.backbones import fetch
from afmrl_ray.models.dual_encoder import DualProcessor
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.unwrap import unwrap_model
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.fit import fit_model, run_steps, worker_threads


@dataclass(frozen=True)
class AGCLJob:
    """A training of the encoder, as plain data.

    Attributes:
        init_from: checkpoint of the backbone, or a trained model or adapter to continue from.
        attributes: path of the attribute table, or none for training without attributes.
        catalogue: the catalogue.
        directory: attempt directory; the model is written to `<directory>/model`.
        name: Ray Train run name.
        negatives: path of mined negatives, or none for those of the catalogue.
    """

    init_from: str
    attributes: str | None
    catalogue: CatalogueRef
    directory: str
    name: str
    negatives: str | None = None


def train_agcl(config: Config, job: AGCLJob) -> dict[str, float]:
    """Train the encoder and write it to `<job.directory>/model`; returns the reproducible metrics of the last step.

    Raises:
        UserError, TrainingFailedError: see `training.fit.fit`.
    """
    return fit_model(
        train_loop,
        {"config": config, "job": job},
        name=job.name,
        directory=job.directory,
        workers=config.agcl.workers,
        wait_s=config.ray.wait_for_resources_s,
    )


def train_loop(payload: dict[str, Any]) -> None:
    """The training loop of every worker; `payload` is the plain-data argument that Ray Train passes."""
    config, job = payload["config"], payload["job"]
    agcl = config.agcl
    worker_threads(agcl.workers)
    rank, world = dist.get_rank(), dist.get_world_size()
    catalogue = job.catalogue.open()
    store = read_attributes(job.attributes) if job.attributes else None
    encoder = load_encoder(config, job.init_from, catalogue, store, rank=rank, world=world)
    engine = Engine(
        encoder.module,
        agcl.optimizer,
        steps=agcl.steps,
        zero_stage=agcl.workers.zero_stage,
        bf16=config.encoder.dtype == "bfloat16",
    )
    negatives = read_negatives(job.negatives, catalogue.column("item_id")) if job.negatives else None
    preparer = Preparer(config, catalogue, encoder, store, negatives=negatives, rank=rank, world=world)

    def save_model(path: str) -> None:
        with engine.whole_parameters():
            if rank == 0:
                save_trained(encoder.model, path, processor=job.init_from)

    run_steps(
        engine,
        AGCLStep(agcl, encoder, preparer, engine, rank=rank, world=world),
        steps=agcl.steps,
        seed=config.run.seed,
        workers=agcl.workers,
        log_directory=storage.join(job.directory, "log"),
        label=job.name,
        save_model=save_model,
    )


def load_encoder(
    config: Config,
    path: str,
    catalogue: StagedCatalogue,
    store: AttributeStore | None,
    *,
    rank: int = 0,
    world: int = 1,
) -> TrainableEncoder[Any]:
    """The encoder of `encoder.kind`, ready to be trained.

    Args:
        config: the whole config.
        path: checkpoint of the backbone, or a trained model or adapter.
        catalogue: where items come from.
        store: attributes, or none.
        rank: of this worker.
        world: number of workers.

    Raises:
        CheckpointError: see `models.adapters.load_for_training`.
        ConfigError, CatalogueError: see the encoder's class.
    """
    settings = config.encoder
    model = load_for_training(path, settings.role, config.agcl.adapter, seed=config.run.seed, dtype=settings.dtype)
    if settings.kind == "dual_encoder":
        dual_processor = DualProcessor.from_pretrained(fetch(path), unwrap_model(model))
        return TrainableDualEncoder(config, model, dual_processor, catalogue, store, rank=rank, world=world)
    return TrainableQwen2VL(config, model, ItemProcessor.from_pretrained(path, settings.image), catalogue)
