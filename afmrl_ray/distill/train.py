"""Distillation on a Ray Train worker group: supervised fine-tuning of the generator on the teacher's attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import distributed as dist

from afmrl_ray import storage
from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue
from afmrl_ray.config import Config
from afmrl_ray.errors import CatalogueError, ConfigError
from afmrl_ray.models.adapters import load_for_training, save_trained
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.logprobs import CompletionLogprobs, completion_batch
from afmrl_ray.models.prompts import generator_input, prompt_fits
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.fit import fit_model, run_steps, worker_threads


@dataclass(frozen=True)
class DistillJob:
    """A distillation, as plain data.

    Attributes:
        init_from: checkpoint of the generator.
        labels: path of the teacher's attribute table.
        catalogue: the catalogue.
        directory: attempt directory; the model is written to `<directory>/model`.
        name: Ray Train run name.
    """

    init_from: str
    labels: str
    catalogue: CatalogueRef
    directory: str
    name: str


def train_distill(config: Config, job: DistillJob) -> dict[str, float]:
    """Fine-tune the generator and write it to `<job.directory>/model`; returns the reproducible metrics of the last
    step.

    Raises:
        UserError, TrainingFailedError: see `training.fit.fit`.
    """
    return fit_model(
        train_loop,
        {"config": config, "job": job},
        name=job.name,
        directory=job.directory,
        workers=config.distill.workers,
        wait_s=config.ray.wait_for_resources_s,
    )


def train_loop(payload: dict[str, Any]) -> None:
    """The training loop of every worker; `payload` is the plain-data argument that Ray Train passes."""
    config, job = payload["config"], payload["job"]
    distill = config.distill
    worker_threads(distill.workers)
    model = load_for_training(
        job.init_from, "generator", distill.adapter, seed=config.run.seed, dtype=config.generator.dtype
    )
    processor = ItemProcessor.from_pretrained(job.init_from, config.generator.image)
    engine = Engine(
        CompletionLogprobs(model).train(),
        distill.optimizer,
        steps=distill.steps,
        zero_stage=distill.workers.zero_stage,
        bf16=config.generator.dtype == "bfloat16",
    )
    rank = dist.get_rank()
    catalogue = job.catalogue.open()
    step_fn = DistillStep(
        config,
        labelled_rows(config, catalogue, processor, job.labels),
        catalogue,
        processor,
        engine,
        rank=rank,
        world=dist.get_world_size(),
    )

    def save_model(path: str) -> None:
        with engine.whole_parameters():
            if rank == 0:
                save_trained(model, path, processor=job.init_from)

    run_steps(
        engine,
        step_fn,
        steps=distill.steps,
        seed=config.run.seed,
        workers=distill.workers,
        log_directory=storage.join(job.directory, "log"),
        label=job.name,
        save_model=save_model,
    )


def labelled_rows(
    config: Config, catalogue: StagedCatalogue, processor: ItemProcessor, labels: str
) -> list[tuple[int, str]]:
    """Labelled catalogue rows with their attribute text, in row order; rows with too long prompts are left out.

    Args:
        config: the whole config.
        catalogue: the catalogue.
        processor: of the generator's checkpoint.
        labels: path of the teacher's attribute table.

    Raises:
        CatalogueError: no row has a label.
        ConfigError: there are fewer labels than a batch.
    """
    store = read_attributes(labels)
    items = catalogue.column("item_id")
    found = [
        (row, text)
        for row in catalogue.rows(config.distill.items).tolist()
        if (text := store.text(items[row])) and prompt_fits(processor, catalogue, row, config=config.generator)
    ]
    if not found:
        raise CatalogueError("distill.items: the teacher gave no valid attributes for any of these rows")
    if len(found) < config.distill.batch_size:
        raise ConfigError(
            f"distill.batch_size {config.distill.batch_size} exceeds the {len(found)} labelled rows; lower it"
        )
    return found


class DistillStep:
    """Forward and backward pass of one step on one worker; the loss is a mean over the tokens of the global batch.

    Args:
        config: the whole config.
        labels: from `labelled_rows`.
        catalogue: where the items come from.
        processor: of the generator's checkpoint.
        engine: trains the generator.
        rank: of this worker.
        world: number of workers.
    """

    def __init__(
        self,
        config: Config,
        labels: list[tuple[int, str]],
        catalogue: StagedCatalogue,
        processor: ItemProcessor,
        engine: Engine,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._config, self._labels = config, labels
        self._catalogue, self._processor, self._engine = catalogue, processor, engine
        self._rank, self._world = rank, world

    def batch(self, step: int) -> list[tuple[int, str]]:
        """Rows and labels of a step over all workers: a pure function of seed and step."""
        size = self._config.distill.batch_size
        epoch, place = divmod(step, len(self._labels) // size)
        order = np.random.default_rng([self._config.run.seed, epoch]).permutation(len(self._labels))
        return [self._labels[i] for i in order[place * size : (place + 1) * size]]

    def __call__(self, step: int) -> dict[str, float]:
        """Add the gradients of a step; its loss, and its completion tokens over all workers."""
        batch = self.batch(step)
        completions = [self._processor.completion_ids(text) for _, text in batch]
        tokens = sum(len(ids) for ids in completions)
        each = len(batch) // self._world
        local = slice(self._rank * each, (self._rank + 1) * each)
        prompts = [
            generator_input(self._processor, self._catalogue, row, config=self._config.generator)
            for row, _ in batch[local]
        ]
        inputs, mask = completion_batch(prompts, completions[local], self._processor.pad_id, self._engine.device)
        logp = self._engine(inputs, mask, forbidden_ids=self._processor.forbidden_ids)
        # The engine averages gradients over the workers.
        loss = -logp.sum() * self._world / tokens
        self._engine.backward(loss)
        total = loss.detach() / self._world
        if self._world > 1:
            dist.all_reduce(total)
        return {"train/loss": float(total), "data/samples": float(len(batch)), "data/tokens": float(tokens)}
