"""The figures of the model card, on few items."""

from __future__ import annotations

import torch

from afmrl_ray.catalogue import make_catalogue
from afmrl_ray.config.catalogue import SyntheticConfig
from afmrl_ray.config.models import EncoderConfig, GeneratorConfig
from afmrl_ray.models.backbones import load_backbone
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.packaged import resolve_checkpoint
from afmrl_ray.pretraining.measure import encoder_figures, generator_figures
from afmrl_ray.pretraining.stream import held_out_items
from tests.models.test_packaged import IMAGES


def packaged(name: str, role: str):
    path = resolve_checkpoint(f"package:{name}")
    return load_backbone(path, role).eval(), ItemProcessor.from_pretrained(path, IMAGES)


def test_the_packaged_generator_reads_all_visible_attributes():
    model, processor = packaged("small-generator", "generator")
    items, config = held_out_items(4242, 60), GeneratorConfig(max_new_tokens=64)
    figures = generator_figures(model, processor, items, config=config)
    assert min(figures[f"{name}/unnamed"] for name in ("color", "pattern", "form", "logo", "trim")) >= 0.9, figures
    assert figures["invalid"] == figures["hidden_claimed"] == 0
    freely = config.model_copy(update={"instruction": "List some attributes."})
    sampled = generator_figures(model, processor, items, config=freely, temperature=1.0)
    assert "invalid/repeated_name" not in sampled


@torch.no_grad()
def test_figures_of_the_packaged_encoder():
    model, processor = packaged("small-encoder", "encoder")
    rows = make_catalogue(SyntheticConfig(preset="tiny", seed=123)).to_pylist()
    test = [row for row in rows if row["split"] == "test"]
    figures = encoder_figures(model, processor, test, config=EncoderConfig())
    assert len(figures) == 6
    assert all(
        figures[f"{views}/hit@1"] <= figures[f"{views}/family_hit"] <= 1 for views in ("without", "query", "both")
    )
    assert figures["without/family_hit"] >= 0.9
