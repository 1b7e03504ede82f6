"""FLOPs of a step against torch's own counter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from afmrl_ray.config.models import AdapterConfig, ImageConfig, VisionCacheConfig
from afmrl_ray.models.adapters import load_for_training
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.flops import EncoderFlops, peak_tflops
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import collate
from afmrl_ray.models.vision_cache import VisionCache
from tests.models.test_item_processor import noise

ADAPTERS = {
    "tower": (AdapterConfig(kind="full", train_vision=True), 0.03),
    "full": (AdapterConfig(kind="full"), 0.03),
    # Adapters themselves are not counted, and weigh more in a tiny model than in one of 1,536 columns.
    "lora": (AdapterConfig(r=1), 0.12),
}


@pytest.mark.parametrize(
    ("kind", "images"),
    [pair for pair in itertools.product(ADAPTERS, ("pixels", "features", "none")) if pair != ("tower", "features")],
)
def test_the_flops_of_a_step_equal_torchs_count(tiny_checkpoints, tmp_path, kind, images):
    adapter, slack = ADAPTERS[kind]
    path = tiny_checkpoints["encoder"]
    processor = ItemProcessor.from_pretrained(path, ImageConfig(min_pixels=784, max_pixels=20_000))
    backbone = load_for_training(path, "encoder", adapter, seed=0)
    model = EmbeddingModel(backbone).train()
    rows = [processor.model_input(noise(120, 120, seed), "blue mug " * 12) for seed in range(3)]
    if images == "none":
        rows = [processor.model_input(None, "blue mug " * 12) for _ in range(3)]
    if images == "features":
        cached = VisionCache(backbone, processor, VisionCacheConfig(enabled=True, folder=str(tmp_path)))
        rows = [
            processor.model_input(
                cached.visual(bytes([seed]), lambda seed=seed: noise(120, 120, seed)), "blue mug " * 12
            )
            for seed in range(3)
        ]
    batch = collate(rows, processor.pad_id)
    assert bool(batch["attention_mask"].all())
    # The counter knows the products of plain attention, not the fused kernel of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch).sum().backward()
    expected = EncoderFlops(backbone).step(rows)
    assert expected == pytest.approx(counter.get_total_flops(), rel=slack)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    backbone.requires_grad_(False)
    assert EncoderFlops(backbone).step(rows) == pytest.approx(counter.get_total_flops(), rel=slack)


def test_peak_of_known_devices_by_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA L40S") == 362
    assert peak_tflops("Some CPU") is None
