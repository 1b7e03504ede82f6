"""Auxiliary objectives of dual encoders against transformers' CLIP loss and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from afmrl_ray.agcl.dual_loss import hard_text_loss, summed_info_nce


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def all_negatives(rows: int, columns: int) -> torch.Tensor:
    return torch.ones(rows, columns, dtype=torch.bool)


def test_both_directions_are_the_loss_of_stock_clip():
    torch.manual_seed(0)
    text = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 49}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    ids = torch.randint(0, 49, (7, 6))
    ids[:, -1] = 49
    with torch.no_grad():
        stock = model(input_ids=ids, pixel_values=torch.randn(7, 3, 8, 8), return_loss=True)
    sides = (stock.image_embeds, stock.text_embeds), (stock.text_embeds, stock.image_embeds)
    ours = [
        summed_info_nce(
            own,
            others,
            torch.arange(7),
            temperature=float(model.logit_scale.detach().exp().reciprocal()),
            negative_mask=all_negatives(7, 7),
        )
        / 7
        for own, others in sides
    ]
    assert float(sum(ours)) / 2 == pytest.approx(float(stock.loss), abs=1e-6)


def test_masked_columns_are_not_negatives():
    rows, columns = unit(3, 8), unit(5, 8, seed=1)
    positives = torch.tensor([4, 0, 2])
    negatives = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1]], dtype=torch.bool)
    expected = 0.0
    for row in range(3):
        own = float(rows[row] @ columns[positives[row]]) / 0.1
        others = [float(rows[row] @ columns[j]) / 0.1 for j in range(5) if negatives[row, j] and j != positives[row]]
        expected -= own - math.log(math.exp(own) + sum(math.exp(score) for score in others))
    found = summed_info_nce(rows, columns, positives, temperature=0.1, negative_mask=negatives)
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_changed_texts_are_negatives_of_the_true_one_and_missing_ones_are_not():
    images, texts = unit(3, 8), unit(3, 4, 8, seed=1)
    present = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    expected = 0.0
    for row in (0, 1):
        scores = [float(images[row] @ texts[row, k]) / 0.2 for k in range(4) if present[row, k]]
        expected += math.log(sum(math.exp(score) for score in scores)) - scores[0]
    assert float(hard_text_loss(images, texts, present, temperature=0.2)) == pytest.approx(expected, abs=1e-5)


def test_without_negatives_the_loss_is_zero_with_a_zero_gradient():
    images = unit(2, 8).requires_grad_()
    nothing = hard_text_loss(images, unit(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool), temperature=0.1)
    none = summed_info_nce(
        images[:0], images, torch.zeros(0).long(), temperature=0.1, negative_mask=all_negatives(0, 2)
    )
    (nothing + none).backward()
    assert float(nothing) == float(none) == 0
    assert torch.equal(images.grad, torch.zeros_like(images))
