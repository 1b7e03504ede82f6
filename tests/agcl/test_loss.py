"""The AGCL loss against its formula, term by term."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afmrl_ray.agcl.loss import scale_lexical, weighted_info_nce

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


def _literal(
    similarity: Tensor, lexical: Tensor, mask: Tensor, temperature: float, positive_weight: str, beta: float
) -> float:
    """`-log(w_ii e^{s_ii/t} / (w_ii e^{s_ii/t} + sum_j w_ij e^{s_ij/t}))`, `w = e^{beta (1 + tanh B)}`, by term."""
    total = 0.0
    for i, p in enumerate(POSITIVES.tolist()):
        weight = [math.exp(beta * (1 + math.tanh(b))) for b in lexical[i].tolist()]
        if positive_weight == "one":
            weight[p] = 1.0
        terms = [w * math.exp(s / temperature) for w, s in zip(weight, similarity[i].tolist(), strict=True)]
        kept = sum(t for j, t in enumerate(terms) if j != p and mask[i, j])
        total -= math.log(terms[p] / (terms[p] + kept))
    return total / Q


@pytest.mark.parametrize("positive_weight", ["bm25", "one"])
@pytest.mark.parametrize("beta", [None, 0.0, 0.5, 4.0])
def test_equals_the_formula(positive_weight: str, beta: float | None) -> None:
    similarity, lexical, mask = _batch()
    loss, stats = weighted_info_nce(
        similarity,
        POSITIVES,
        temperature=0.1,
        lexical_scores=lexical,
        negative_mask=mask,
        positive_weight=positive_weight,  # type: ignore[arg-type]
        **({} if beta is None else {"beta": beta}),
    )
    # Without the argument it is the loss that the paper prints.
    expected = _literal(similarity, lexical, mask, 0.1, positive_weight, 1.0 if beta is None else beta)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
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


@pytest.mark.parametrize(("positive_weight", "lowest"), [("bm25", -1.0), ("one", 1.0)])
def test_weights_of_negatives_stay_in_the_published_range(positive_weight: str, lowest: float) -> None:
    """A negative is weighted by e^lowest without a common word, and by e times that with many."""
    lexical = torch.tensor([[30.0, 0.0], [30.0, 30.0]])
    similarity, positives = torch.zeros(1, 2), torch.tensor([0])
    for row, log_weight in ((0, lowest), (1, lowest + 1)):
        loss, _ = weighted_info_nce(
            similarity,
            positives,
            temperature=0.1,
            lexical_scores=lexical[row : row + 1],
            positive_weight=positive_weight,  # type: ignore[arg-type]
        )
        assert loss.item() == pytest.approx(math.log1p(math.exp(log_weight)), rel=1e-5)


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


def test_scales_of_bm25() -> None:
    lexical = torch.tensor([[4.0, 1.0, -2.0], [0.0, 3.0, 5.0]])
    positives = torch.tensor([0, 0])
    expected = {"raw": [4.0, 1.0, 0.0], "self": [1.0, 0.25, 0.0], "temperature": [2.0, 0.5, 0.0]}
    for scale, row in expected.items():
        scaled = scale_lexical(lexical, positives, scale=scale, temperature=2.0)  # type: ignore[arg-type]
        assert scaled[0].tolist() == row
        assert scaled[1].tolist() == [0.0, 0.0, 0.0], "a positive without lexical overlap gives uniform weights"


def test_a_learned_temperature_gets_the_gradient_of_the_formula() -> None:
    similarity, *_ = _batch()
    learned = torch.tensor(0.1, requires_grad=True)
    weighted_info_nce(similarity, POSITIVES, temperature=learned)[0].backward()
    step = 1e-3
    up, down = (weighted_info_nce(similarity.double(), POSITIVES, temperature=0.1 + s)[0] for s in (step, -step))
    assert learned.grad is not None
    assert float(learned.grad) == pytest.approx(float(up - down) / (2 * step), rel=1e-2)
