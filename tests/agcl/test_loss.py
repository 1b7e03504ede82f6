"""The AGCL loss against its formula, term by term."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afmrl_ray.agcl.loss import (
    finish_mask,
    mask_by_attributes,
    mask_by_candidate,
    mask_by_margin,
    scale_lexical,
    weighted_info_nce,
)

torch.set_num_threads(1)
Q, D = 5, 9
POSITIVES = torch.tensor([3, 0, 8, 5, 1])


def _unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    similarity = _unit(Q, 16) @ _unit(D, 16, seed=2).T
    lexical = torch.rand(Q, D, generator=draw) * 3
    mask = torch.rand(Q, D, generator=draw) > 0.3
    return similarity, lexical, mask


def _literal(similarity: Tensor, lexical: Tensor, mask: Tensor, temperature: float, positive_weight: str) -> float:
    """`-log(w_ii e^{s_ii/t} / (w_ii e^{s_ii/t} + sum_j w_ij e^{s_ij/t}))` term by term."""
    total = 0.0
    for i, p in enumerate(POSITIVES.tolist()):
        weight = [math.exp(1 + math.tanh(b)) for b in lexical[i].tolist()]
        if positive_weight == "one":
            weight[p] = 1.0
        terms = [w * math.exp(s / temperature) for w, s in zip(weight, similarity[i].tolist(), strict=True)]
        kept = sum(t for j, t in enumerate(terms) if j != p and mask[i, j])
        total -= math.log(terms[p] / (terms[p] + kept))
    return total / Q


@pytest.mark.parametrize("positive_weight", ["bm25", "one"])
def test_equals_the_formula(positive_weight: str) -> None:
    similarity, lexical, mask = _batch()
    loss, stats = weighted_info_nce(
        similarity,
        POSITIVES,
        temperature=0.1,
        lexical_scores=lexical,
        negative_mask=mask,
        positive_weight=positive_weight,  # type: ignore[arg-type]
    )
    assert loss.item() == pytest.approx(_literal(similarity, lexical, mask, 0.1, positive_weight), rel=1e-5)
    assert stats["loss"] == pytest.approx(loss.item())


def test_gradient_equals_that_of_the_formula() -> None:
    similarity, lexical, mask = _batch()
    mask = mask.scatter(1, POSITIVES[:, None], True)
    ours, theirs = (similarity.double().requires_grad_() for _ in range(2))
    weighted_info_nce(ours, POSITIVES, temperature=0.1, lexical_scores=lexical, negative_mask=mask)[0].backward()
    terms = (1 + lexical.double().tanh()).exp() * (theirs / 0.1).exp() * mask
    (terms.sum(1) / terms.gather(1, POSITIVES[:, None])[:, 0]).log().mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_without_weights_and_mask_it_is_infonce() -> None:
    similarity, *_ = _batch()
    expected = F.cross_entropy(similarity / 0.05, POSITIVES)
    assert torch.equal(weighted_info_nce(similarity, POSITIVES, temperature=0.05)[0], expected)
    empty = scale_lexical(torch.zeros(Q, D), POSITIVES)
    assert torch.equal(weighted_info_nce(similarity, POSITIVES, temperature=0.05, lexical_scores=empty)[0], expected)


def test_weights_of_negatives_stay_in_the_published_range() -> None:
    similarity, *_ = _batch()
    lexical = torch.zeros(Q, D).scatter(1, POSITIVES[:, None], 30.0)
    lexical[:, 2] = 30.0
    _, bm25 = weighted_info_nce(similarity, POSITIVES, temperature=0.1, lexical_scores=lexical)
    assert bm25["weight_p10"] == pytest.approx(math.exp(-1), rel=1e-4)
    assert bm25["weight_p90"] == pytest.approx(1, rel=1e-4)
    _, one = weighted_info_nce(similarity, POSITIVES, temperature=0.1, lexical_scores=lexical, positive_weight="one")
    assert one["weight_p10"] == pytest.approx(math.e, rel=1e-4)
    assert one["weight_p90"] == pytest.approx(math.e**2, rel=1e-4)


def test_a_row_with_every_negative_masked_is_finite_and_without_gradient() -> None:
    similarity, lexical, _ = _batch()
    similarity.requires_grad_()
    loss, stats = weighted_info_nce(
        similarity,
        POSITIVES,
        temperature=0.02,
        lexical_scores=lexical,
        negative_mask=torch.zeros(Q, D, dtype=torch.bool),
    )
    loss.backward()
    assert loss.item() == 0
    assert similarity.grad is not None
    assert not similarity.grad.any()
    assert stats["masked_fraction"] == 1
    assert stats["accuracy"] == 1


def test_low_precision_input_is_computed_in_float32() -> None:
    similarity, lexical, mask = _batch()
    low = similarity.bfloat16()
    loss, _ = weighted_info_nce(low, POSITIVES, temperature=0.02, lexical_scores=lexical, negative_mask=mask)
    assert loss.dtype == torch.float32
    assert torch.equal(
        loss, weighted_info_nce(low.float(), POSITIVES, temperature=0.02, lexical_scores=lexical, negative_mask=mask)[0]
    )


def test_stats_of_a_small_matrix() -> None:
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.2, 0.4]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    _, stats = weighted_info_nce(similarity, torch.tensor([0, 2]), temperature=1.0, negative_mask=mask)
    assert stats["accuracy"] == 0.5
    assert stats["positive_similarity"] == pytest.approx(0.65)
    assert stats["hardest_negative_similarity"] == pytest.approx((0.5 + 0.8) / 2)
    assert stats["masked_fraction"] == pytest.approx(0.25)
    assert stats["weight_p50"] == 1


def test_scales_of_bm25() -> None:
    lexical = torch.tensor([[4.0, 1.0, -2.0], [0.0, 3.0, 5.0]])
    positives = torch.tensor([0, 0])
    expected = {"raw": [4.0, 1.0, 0.0], "self": [1.0, 0.25, 0.0], "temperature": [2.0, 0.5, 0.0]}
    for scale, row in expected.items():
        scaled = scale_lexical(lexical, positives, scale=scale, temperature=2.0)  # type: ignore[arg-type]
        assert scaled[0].tolist() == row
        assert scaled[1].tolist() == [0.0, 0.0, 0.0], "a positive without lexical overlap gives uniform weights"


def _mask_one_by_one(
    candidates: Tensor, positives: list[int], threshold: float, products: list[int], least: int
) -> Tensor:
    mask = torch.zeros(len(positives), len(candidates), dtype=torch.bool)
    for i, p in enumerate(positives):
        cosine = [float(F.cosine_similarity(c, candidates[p], dim=0)) for c in candidates]
        same = [j == p or (products[j] >= 0 and products[j] == products[p]) for j in range(len(candidates))]
        order = sorted((j for j in range(len(candidates)) if not same[j]), key=lambda j: cosine[j])
        for place, j in enumerate(order):
            mask[i, j] = cosine[j] <= threshold or place < least
        mask[i, p] = True
    return mask


@pytest.mark.parametrize("least", [0, 4, 100])
def test_mask_equals_a_plain_loop(least: int) -> None:
    candidates = torch.randn(12, 3, generator=torch.Generator().manual_seed(3)) * 5
    products = [0, 1, 0, 2, 2, 2, -1, -1, 3, 4, 5, 0]
    positives = [0, 3, 6, 8, 7]
    mask = mask_by_candidate(
        candidates,
        torch.tensor(positives),
        threshold=-0.2,
        product_ids=torch.tensor(products),
        min_negatives=least,
    )
    assert torch.equal(mask, _mask_one_by_one(candidates, positives, -0.2, products, least))
    assert not mask[0, 2], "the same product is never a negative"
    if least == 100:
        assert mask[2].all(), "an unknown product equals nothing, not even another unknown one"


def test_masks_by_margin_and_by_attributes_follow_their_rule() -> None:
    similarity = torch.tensor([[0.5, 0.55, 0.7, 0.2]])
    positives = torch.tensor([0])
    assert mask_by_margin(similarity, positives, margin=0.1).tolist() == [[True, True, False, True]]
    assert mask_by_margin(similarity, positives, margin=0.0).tolist() == [[True, False, False, True]]
    lexical = torch.tensor([[8.0, 7.5, 2.0, 9.0], [0.0, 5.0, 1.0, 0.0]])
    mask = mask_by_attributes(lexical, torch.tensor([0, 0]), threshold=0.9)
    assert mask.tolist() == [[True, False, True, False], [True, True, True, True]]


@pytest.mark.parametrize("rule", ["candidate", "margin", "attributes"])
def test_every_mask_keeps_hard_negatives_masks_the_product_and_leaves_min_negatives(rule: str) -> None:
    closeness = _unit(D, 16) @ _unit(D, 16).T
    products = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, -1])
    positives = torch.tensor([0, 5])
    chosen = torch.zeros(2, D, dtype=torch.bool)
    chosen[0, 3] = chosen[0, 7] = True
    shared = {"product_ids": products, "hard_negatives": chosen}

    def mask(least: int) -> Tensor:
        if rule == "candidate":
            return mask_by_candidate(_unit(D, 16), positives, threshold=-1, min_negatives=least, **shared)
        if rule == "margin":
            return mask_by_margin(closeness[positives], positives, margin=-9, min_negatives=least, **shared)
        scores = closeness[positives] + 2
        return mask_by_attributes(scores, positives, threshold=1e-3, min_negatives=least, **shared)

    none = mask(0)
    assert none[0].nonzero()[:, 0].tolist() == [0, 7], "3 is of the positive's product, so it stays masked"
    assert none[1].nonzero()[:, 0].tolist() == [5]
    assert mask(3)[1].sum() == 4
    far = closeness[5].masked_fill(torch.arange(D) == 5, 9).argsort()[:3]
    assert mask(3)[1][far].all()
    assert mask(100)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 7, 8]


def test_without_suspected_candidates_only_the_product_is_masked() -> None:
    mask = finish_mask(
        torch.zeros(1, 4, dtype=torch.bool),
        torch.zeros(1, 4),
        torch.tensor([1]),
        product_ids=torch.tensor([7, 7, -1, 3]),
    )
    assert mask.tolist() == [[False, True, True, True]]


def test_a_learned_temperature_gets_the_gradient_of_the_formula() -> None:
    similarity, *_ = _batch()
    learned = torch.tensor(0.1, requires_grad=True)
    weighted_info_nce(similarity, POSITIVES, temperature=learned)[0].backward()
    step = 1e-3
    up, down = (weighted_info_nce(similarity.double(), POSITIVES, temperature=0.1 + s)[0] for s in (step, -step))
    assert learned.grad is not None
    assert float(learned.grad) == pytest.approx(float(up - down) / (2 * step), rel=1e-2)
