"""The step of a dual encoder under DeepSpeed: two workers give the loss and the gradients of one."""

from __future__ import annotations

import os

import pytest
import torch
from torch import distributed as dist

from afmrl_ray.agcl.dual_prepare import DualPreparer
from afmrl_ray.agcl.dual_step import DualStep
from afmrl_ray.attributes.store import AttributeRow, read_attributes, write_attributes
from afmrl_ray.attributes.text import format_attributes, normalise_attributes
from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config import validate
from afmrl_ray.config.models import ImageConfig, TinyConfig
from afmrl_ray.errors import CatalogueError
from afmrl_ray.models.adapters import load_for_training
from afmrl_ray.models.dual_encoder import DualEncoder, DualProcessor
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
    config = validate(VALUES)
    model = load_for_training(base, "dual_encoder", config.agcl.adapter, seed=0)
    processor = DualProcessor.from_pretrained(base, model)
    engine = Engine(DualEncoder(model).train(), config.agcl.optimizer, steps=3, zero_stage=0)
    preparer = DualPreparer(config, ref.open(), processor, read_attributes(attributes), rank=rank, world=world)
    step = DualStep(config, preparer, engine, processor, rank=rank, world=world)
    stats = step(0)
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
    for name in ("pair_loss", "image_text_loss", "region_loss", "hard_text_loss", "loss"):
        assert one[name] > 0
        assert two[name] == pytest.approx(one[name], abs=1e-5), name
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * max(1.0, float(gradient.norm()))), name
    # The checkpoint's own scale is no part of the training.
    assert not any("logit_scale" in name for name in expected)


def test_a_step_is_a_function_of_its_number_and_objectives_take_what_they_need(tiny_catalogue_ref, base, attributes):
    config = validate(VALUES)
    model = load_for_training(base, "dual_encoder", config.agcl.adapter, seed=0)
    processor = DualProcessor.from_pretrained(base, model)
    given = (config, tiny_catalogue_ref.open(), processor)
    store = read_attributes(attributes)
    first, again = (DualPreparer(*given, store).prepare(4) for _ in range(2))
    assert first.phrases == again.phrases
    assert any(first.phrases)
    for region, phrase, texts in zip(first.regions, first.phrases, first.texts, strict=True):
        assert (region.pixels is not None) == bool(phrase)
        assert len(texts) == 1 + config.encoder.dual_encoder.hard_texts
    without = DualPreparer(*given, None).prepare(4)
    assert not any(without.phrases)
    assert all(row.input_ids is None for texts in without.texts for row in texts)


def test_regions_need_the_column_of_boxes(tiny_catalogue_ref, base):
    config = validate(
        {**VALUES, "encoder": {"kind": "dual_encoder", "dual_encoder": {"region_weight": 1.0, "boxes_column": "no"}}}
    )
    catalogue: StagedCatalogue = tiny_catalogue_ref.open()
    model = load_for_training(base, "dual_encoder", config.agcl.adapter, seed=0)
    with pytest.raises(CatalogueError, match="no column 'no'"):
        DualPreparer(config, catalogue, DualProcessor.from_pretrained(base, model), None)
