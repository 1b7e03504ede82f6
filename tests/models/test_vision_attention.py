"""Images of equal size at once give what stock transformers gives one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

from afmrl_ray.config.models import ImageConfig
from afmrl_ray.models.backbones import load_backbone
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import collate
from afmrl_ray.models.vision_attention import NAME
from tests.models.test_item_processor import noise

STOCK = {"encoder": Qwen2VLForConditionalGeneration, "generator": Qwen2_5_VLForConditionalGeneration}
SIZES = {"equal": [(60, 60)] * 3, "mixed": [(60, 60), (120, 60), (60, 60), (200, 130), (60, 120)]}


@pytest.mark.parametrize("role", ["encoder", "generator"])
@pytest.mark.parametrize("sizes", ["equal", "mixed"])
def test_hidden_states_and_gradients_equal_those_of_stock_transformers(tiny_checkpoints, role, sizes):
    path = tiny_checkpoints[role]
    processor = ItemProcessor.from_pretrained(path, ImageConfig(min_pixels=784, max_pixels=40_000))
    rows = [processor.model_input(noise(*size, seed), "mug") for seed, size in enumerate(SIZES[sizes])]
    batch = collate(rows, processor.pad_id)
    assert len({row.visuals[0].grid for row in rows}) == (1 if sizes == "equal" else 4)
    ours, stock = load_backbone(path, role), STOCK[role].from_pretrained(path, attn_implementation="sdpa")
    assert ours.model.visual.config._attn_implementation == NAME
    found = []
    for model in (ours, stock):
        hidden = model.eval().model(**batch, use_cache=False).last_hidden_state
        hidden.square().sum().backward()
        found.append((hidden.detach(), [p.grad for p in model.model.visual.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_saved_config_does_not_name_our_attention(tiny_checkpoints, tmp_path):
    load_backbone(tiny_checkpoints["encoder"], "encoder").save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((Path(tmp_path) / "config.json").read_text()))
    Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)
