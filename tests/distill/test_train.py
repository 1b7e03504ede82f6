"""The step of distillation: a token mean over the global batch, for any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import distributed as dist

from afmrl_ray.attributes.store import AttributeRow, write_attributes
from afmrl_ray.config import validate
from afmrl_ray.distill.train import DistillStep, labelled_rows
from afmrl_ray.errors import CatalogueError, ConfigError
from afmrl_ray.models.adapters import load_for_training
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.logprobs import CompletionLogprobs
from afmrl_ray.models.prompts import generator_input
from afmrl_ray.training.engine import Engine
from tests.process_group import run_workers

VALUES = {
    "generator": {"image": {"min_pixels": 784, "max_pixels": 3136}},
    "distill": {"batch_size": 6, "optimizer": {"max_grad_norm": 0.0}},
}
LABELS = [(row, "; ".join(["color: red", "size: xl", "trim: gold"][: 1 + row % 3])) for row in range(12)]


def train(rank: int, world: int, ref, start: str, folder: str) -> None:
    config = validate(VALUES)
    engine = Engine(
        CompletionLogprobs(load_for_training(start, "generator", config.distill.adapter, seed=config.run.seed)),
        config.distill.optimizer,
        steps=2,
        zero_stage=0,
    )
    processor = ItemProcessor.from_pretrained(start, config.generator.image)
    step = DistillStep(config, LABELS, ref.open(), processor, engine, rank=rank, world=world)
    loss = step(0)["train/loss"]
    losses = torch.tensor([loss])
    dist.all_reduce(losses)
    if rank == 0:
        torch.save((float(losses) / world, [p.grad.clone() for p in engine.parameters]), f"{folder}/{world}.pt")


@pytest.mark.timeout(180)
def test_workers_change_neither_loss_nor_gradient(tiny_checkpoints, tiny_catalogue_ref, tmp_path):
    for world in (1, 2, 3):
        run_workers(train, tiny_catalogue_ref, tiny_checkpoints["generator"], str(tmp_path), world=world)
    loss, gradients = torch.load(tmp_path / "1.pt")
    for world in (2, 3):
        other_loss, other_gradients = torch.load(tmp_path / f"{world}.pt")
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for theirs, ours in zip(gradients, other_gradients, strict=True):
            assert (theirs - ours).norm() <= 1e-5 * max(theirs.norm(), 1e-3)


@torch.no_grad()
def test_the_loss_is_the_stock_models_mean_over_completion_tokens(tiny_checkpoints, tiny_catalogue_ref, tmp_path):
    run_workers(train, tiny_catalogue_ref, tiny_checkpoints["generator"], str(tmp_path), world=1)
    config = validate(VALUES)
    catalogue = tiny_catalogue_ref.open()
    start = tiny_checkpoints["generator"]
    processor = ItemProcessor.from_pretrained(start, config.generator.image)
    model = load_for_training(start, "generator", config.distill.adapter, seed=config.run.seed)
    total, count = 0.0, 0
    for row, text in DistillStep(config, LABELS, catalogue, processor, None).batch(0):
        prompt = generator_input(processor, catalogue, row, config=config.generator)
        (visual,) = prompt.visuals
        completion = processor.completion_ids(text)
        ids = torch.from_numpy(np.concatenate([prompt.input_ids, completion]))[None]
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=visual.pixels.values(torch.from_numpy(visual.patches)),
            image_grid_thw=torch.tensor([visual.grid]),
        ).logits[0, len(prompt) - 1 : -1]
        logits[:, processor.forbidden_ids] = -torch.inf
        logp = torch.log_softmax(logits.float(), -1).gather(-1, torch.from_numpy(completion)[:, None])
        total, count = total - float(logp.sum()), count + len(completion)
    assert torch.load(tmp_path / "1.pt")[0] == pytest.approx(total / count, rel=1e-5)


def test_unusable_labels_are_an_error(tiny_checkpoints, tiny_catalogue_ref, tmp_path):
    catalogue = tiny_catalogue_ref.open()
    items = catalogue.column("item_id")
    config = validate(VALUES)
    processor = ItemProcessor.from_pretrained(tiny_checkpoints["generator"], config.generator.image)
    path = str(tmp_path / "labels.parquet")
    write_attributes(path, [AttributeRow(item, "", "empty") for item in items], fingerprint="t")
    with pytest.raises(CatalogueError, match="gave no valid attributes"):
        labelled_rows(config, catalogue, processor, path)
    write_attributes(path, [AttributeRow(item, "color: red") for item in items[:3]], fingerprint="t")
    with pytest.raises(ConfigError, match=r"distill\.batch_size 6 exceeds the 3 labelled rows"):
        labelled_rows(config, catalogue, processor, path)
    short = validate({**VALUES, "generator": {**VALUES["generator"], "max_prompt_tokens": 20}})
    with pytest.raises(CatalogueError):
        labelled_rows(short, catalogue, processor, path)
