"""The embedding model of batches without images, and the checkpoints that may be given for it."""

from __future__ import annotations

import json

import pytest
import torch

from afmrl_ray.config.models import AdapterConfig, ImageConfig
from afmrl_ray.errors import CheckpointError, ConfigError
from afmrl_ray.models.adapters import check_targets, load_for_training, save_trained
from afmrl_ray.models.backbones import check_checkpoint
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import collate

ENCODER = "package:small-encoder"


@pytest.mark.parametrize("train_vision", [True, False])
def test_a_batch_without_images_gives_the_trained_vision_tower_a_gradient_of_zero(train_vision):
    """Otherwise a worker with texts alone takes part in fewer reductions than the others."""
    model = load_for_training(ENCODER, "encoder", AdapterConfig(kind="full", train_vision=train_vision), seed=0)
    processor = ItemProcessor.from_pretrained(model.name_or_path, ImageConfig(min_pixels=12544, max_pixels=12544))
    batch = collate([processor.model_input(None, "red mug")], processor.pad_id)
    encoder = EmbeddingModel(model)
    expected = encoder.eval()(**batch).detach()
    found = encoder.train()(**batch)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    gradients = [parameter.grad for parameter in model.model.visual.parameters()]
    assert all((gradient is not None) is train_vision for gradient in gradients)
    assert all(not gradient.any() for gradient in gradients if gradient is not None)


def test_an_adapter_is_a_checkpoint_by_its_base(tmp_path):
    model = load_for_training(ENCODER, "encoder", AdapterConfig(r=2), seed=0)
    save_trained(model, str(tmp_path), processor=ENCODER)
    check_checkpoint(str(tmp_path), "encoder")
    check_targets(str(tmp_path), "encoder", AdapterConfig(), setting="agcl.adapter")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(CheckpointError, match=r"encoder\.path \(base of the adapter .*\): /nowhere/base does not"):
        check_checkpoint(str(tmp_path), "encoder")


@pytest.mark.parametrize("role", ["encoder", "generator"])
def test_targets_are_matched_before_anything_is_trained(role):
    path = f"package:small-{role}"
    check_targets(path, role, AdapterConfig(), setting="agcl.adapter")
    check_targets(path, role, AdapterConfig(kind="full", targets="nothing"), setting="agcl.adapter")
    with pytest.raises(ConfigError, match=r"agcl\.adapter\.targets '\.\*no_such_layer' matches no module of package:"):
        check_targets(path, role, AdapterConfig(targets=".*no_such_layer"), setting="agcl.adapter")
