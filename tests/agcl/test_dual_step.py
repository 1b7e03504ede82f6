"""The step of a dual encoder under DeepSpeed: two workers give the loss and the gradients of one."""

from __future__ import annotations

import os

import pytest
import torch
from torch import distributed as dist

from afmrl_ray.agcl.dual_encoder import TrainableDualEncoder
from afmrl_ray.agcl.prepare import Preparer
from afmrl_ray.agcl.qwen2_vl import TrainableQwen2VL
from afmrl_ray.agcl.step import AGCLStep
from afmrl_ray.agcl.train import load_encoder
from afmrl_ray.attributes.store import AttributeRow, read_attributes, write_attributes
from afmrl_ray.attributes.text import format_attributes, normalise_attributes
from afmrl_ray.config import validate
from afmrl_ray.config.models import ImageConfig, TinyConfig
from afmrl_ray.errors import CatalogueError
from afmrl_ray.models.tiny_dual_encoder import build_dual_encoder, save_dual_encoder, train_dual_tokenizer
from afmrl_ray.training.engine import Engine
from tests.process_group import run_workers

VALUES = {
    "encoder": {
        "kind": "dual_encoder",
        "dual_encoder": {
            "region_weight": 0.3,
            "hard_text_weight": 0.5,
            "region_attributes": {"body": ["color", "pattern"]},
        },
    },
    "agcl": {
        "batch_size": 6,
        "steps": 3,
        "lexical": {"enabled": False},
        "adapter": {"kind": "full", "train_vision": True},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_catalogue_ref) -> str:
    tiny = TinyConfig(hidden_size=32, num_layers=1, vision_width=32, vision_depth=1, patch_px=14, vocabulary=420)
    catalogue = tiny_catalogue_ref.open()
    tokenizer = train_dual_tokenizer([catalogue.title(row) for row in range(len(catalogue))], tiny.vocabulary)
    path = str(tmp_path_factory.mktemp("clip"))
    save_dual_encoder(
        build_dual_encoder(tiny, ImageConfig(max_pixels=784, min_pixels=784), tokenizer, 0), tokenizer, path
    )
    return path


@pytest.fixture(scope="module")
def attributes(tiny_catalogue_ref, tmp_path_factory) -> str:
    """Of two items in three, so that some regions and texts are missing."""
    catalogue = tiny_catalogue_ref.open()
    path = str(tmp_path_factory.mktemp("attributes") / "attributes.parquet")
    rows = []
    for row in range(len(catalogue)):
        item = catalogue.item(row)
        text = format_attributes(normalise_attributes(item.attributes)) if row % 3 else ""
        rows.append(AttributeRow(item.item_id, text, None if text else "invalid"))
    write_attributes(path, rows, fingerprint="teacher")
    return path


def train(rank: int, world: int, ref, base: str, attributes: str, folder: str) -> None:
    config, catalogue, store = validate(VALUES), ref.open(), read_attributes(attributes)
    encoder = load_encoder(config, base, catalogue, store, rank=rank, world=world)
    engine = Engine(encoder.module, config.agcl.optimizer, steps=3, zero_stage=0)
    preparer = Preparer(config, catalogue, encoder, store, rank=rank, world=world)
    stats = AGCLStep(config.agcl, encoder, preparer, engine, rank=rank, world=world)(0)
    gradients = {n: p.grad.clone() for n, p in engine._engine.module.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save((stats, gradients), os.path.join(folder, f"{world}.pt"))
    dist.barrier()
    engine.close()


@pytest.mark.timeout(240)
def test_two_workers_give_the_gradient_of_one(tiny_catalogue_ref, base, attributes, tmp_path):
    for world in (1, 2):
        run_workers(train, tiny_catalogue_ref, base, attributes, str(tmp_path), world=world)
    (one, expected), (two, found) = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    names = [f"train/{name}_loss" for name in ("pair", "image_text", "region", "hard_text")]
    for name in (*names, "train/loss"):
        assert one[name] > 0
        assert two[name] == pytest.approx(one[name], abs=1e-5), name
    assert one["train/loss"] == pytest.approx(sum(one[name] for name in names), abs=1e-5)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * max(1.0, float(gradient.norm()))), name
    # The checkpoint's own scale is not trained.
    assert not any("logit_scale" in name for name in expected)


def test_a_steps_inputs_are_a_function_of_its_number_and_need_attributes_for_regions_and_texts(
    tiny_catalogue_ref, base, attributes
):
    config, catalogue = validate(VALUES), tiny_catalogue_ref.open()

    def prepared(store) -> tuple[list, list, list]:
        """Inputs of items, regions and texts."""
        encoder = load_encoder(config, base, catalogue, store)
        inputs = Preparer(config, catalogue, encoder, store).prepare(4).inputs
        return inputs[:12], inputs[12:18], inputs[18:]

    def ids(inputs) -> list[bytes]:
        return [each.input_ids.tobytes() if each.input_ids is not None else b"" for each in inputs]

    first, again = (prepared(read_attributes(attributes)) for _ in range(2))
    assert [ids(inputs) for inputs in first] == [ids(inputs) for inputs in again]
    items, regions, texts = first
    assert all(item.pixels is not None and item.input_ids is not None for item in items)
    assert [region.pixels is None for region in regions] == [region.input_ids is None for region in regions]
    assert any(ids(regions))
    assert len(texts) == 6 * (1 + config.encoder.dual_encoder.hard_texts)
    assert any(ids(texts))
    _, regions, texts = prepared(None)
    assert not any(ids([*regions, *texts]))


def test_regions_need_the_column_of_boxes(tiny_catalogue_ref, base):
    config = validate(
        {**VALUES, "encoder": {"kind": "dual_encoder", "dual_encoder": {"region_weight": 1.0, "boxes_column": "no"}}}
    )
    with pytest.raises(CatalogueError, match="no column 'no'"):
        load_encoder(config, base, tiny_catalogue_ref.open(), None)


def test_the_encoders_kind_decides_what_is_loaded(tiny_checkpoints, tiny_catalogue_ref, base):
    catalogue = tiny_catalogue_ref.open()
    assert isinstance(load_encoder(validate(VALUES), base, catalogue, None), TrainableDualEncoder)
    assert isinstance(load_encoder(validate({}), tiny_checkpoints["encoder"], catalogue, None), TrainableQwen2VL)
