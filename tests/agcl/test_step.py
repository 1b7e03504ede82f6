"""The step of AGCL: any number of workers gives the loss and gradient of one worker with the whole batch."""

from __future__ import annotations

import os

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from afmrl_ray.agcl.train import AGCLStep
from afmrl_ray.attributes.store import AttributeRow, read_attributes, write_attributes
from afmrl_ray.attributes.text import format_attributes, normalise_attributes
from afmrl_ray.config import validate
from afmrl_ray.models.adapters import load_start
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.listing import ListingProcessor
from afmrl_ray.training.engine import Engine
from tests.training.test_engine import free_port


def train(rank: int, world: int, port: int, values: dict, ref, base: str, attributes: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo", rank=rank, world_size=world)
    config = validate(values)
    torch.manual_seed(0)
    model = load_start(base, "encoder", config.agcl.adapter, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the gradient of the other factor
            torch.nn.init.normal_(parameter, std=0.1)
    engine = Engine(EmbeddingModel(model), config.agcl.optimizer, steps=2, zero_stage=config.agcl.workers.zero_stage)
    processor = ListingProcessor.from_pretrained(base, config.encoder.picture)
    step = AGCLStep(config, ref.open(), processor, read_attributes(attributes), engine, rank=rank, world=world)
    loss = step(0)["loss"]
    if rank == 0:
        torch.save((loss, [p.grad.clone() for p in engine.parameters]), os.path.join(folder, f"{world}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def attributes(tiny_catalogue_ref, tmp_path_factory) -> str:
    catalogue = tiny_catalogue_ref.open()
    items = [catalogue.item(row) for row in range(len(catalogue))]
    path = str(tmp_path_factory.mktemp("attributes") / "attributes.parquet")
    rows = [AttributeRow(item.item_id, format_attributes(normalise_attributes(item.attributes))) for item in items]
    write_attributes(path, rows, fingerprint="teacher")
    return path


@pytest.mark.timeout(240)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_workers_change_neither_loss_nor_gradient(tiny_checkpoints, tiny_catalogue_ref, attributes, tmp_path, adapter):
    values = {
        "encoder": {"picture": {"min_pixels": 784, "max_pixels": 3136}},
        "agcl": {
            "batch_size": 6,
            "adapter": {"kind": adapter, "r": 4},
            "mask": {"threshold": 0.99, "min_negatives": 2},
        },
    }
    for world in (1, 2, 3):
        arguments = (
            world,
            free_port(),
            values,
            tiny_catalogue_ref,
            tiny_checkpoints["encoder"],
            attributes,
            str(tmp_path),
        )
        multiprocessing.spawn(train, args=arguments, nprocs=world)
    loss, gradients = torch.load(tmp_path / "1.pt")
    for world in (2, 3):
        other_loss, other_gradients = torch.load(tmp_path / f"{world}.pt")
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for theirs, ours in zip(gradients, other_gradients, strict=True):
            assert (theirs - ours).norm() <= 1e-5 * max(theirs.norm(), 1e-3)
