"""Statistics of the loss against gradients by autograd and against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afmrl_ray.agcl.loss import weighted_info_nce
from afmrl_ray.agcl.statistics import KnownRelations, fractions_of, known_relations

torch.set_num_threads(1)
Q, D = 6, 10
POSITIVES = torch.tensor([3, 0, 8, 5, 1, 9])


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Similarities, BM25 scores, negatives and siblings, at random."""
    draw = torch.Generator().manual_seed(seed)
    similarity = torch.rand(Q, D, generator=draw) * 2 - 1
    lexical = torch.rand(Q, D, generator=draw) * 3
    mask = (torch.rand(Q, D, generator=draw) > 0.3).scatter(1, POSITIVES[:, None], True)
    siblings = (torch.rand(Q, D, generator=draw) > 0.6).scatter(1, POSITIVES[:, None], False)
    return similarity, lexical, mask, siblings


def gradient(similarity: Tensor, **given) -> Tensor:
    """Of the loss by the similarities."""
    leaf = similarity.clone().requires_grad_()
    weighted_info_nce(leaf, POSITIVES, temperature=0.2, **given)[0].backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("positive_weight", ["bm25", "one"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_fractions_equal_those_of_the_gradients_by_autograd(positive_weight: str, masked: bool) -> None:
    similarity, lexical, mask, siblings = batch()
    weights = {"lexical_scores": lexical, "positive_weight": positive_weight, "beta": 1.5}
    masks = {"negative_mask": mask} if masked else {}
    _, stats = weighted_info_nce(
        similarity, POSITIVES, temperature=0.2, known=KnownRelations(siblings), **weights, **masks
    )
    found = fractions_of(stats)
    weighted, plain = gradient(similarity, **weights, **masks), gradient(similarity, **masks)
    moved = float((weighted - plain).abs().sum() / plain.abs().sum())
    assert found["weight_gradient_fraction"] == pytest.approx(moved, rel=1e-4)
    negatives = weighted.scatter(1, POSITIVES[:, None], 0.0)
    assert found["sibling_gradient_fraction"] == pytest.approx(
        float((negatives * siblings).sum() / negatives.sum()), rel=1e-4
    )
    assert 0 < found["sibling_gradient_fraction"] < 1


def test_without_weights_or_knowledge_their_fractions_are_absent_and_weights_of_one_move_nothing() -> None:
    similarity, lexical, *_ = batch()
    _, stats = weighted_info_nce(similarity, POSITIVES, temperature=0.2)
    names = {"loss", "accuracy", "positive_similarity", "hardest_negative_similarity", "masked_fraction"}
    assert set(fractions_of(stats)) == set(stats) == names
    _, stats = weighted_info_nce(similarity, POSITIVES, temperature=0.2, lexical_scores=lexical, beta=0.0)
    assert fractions_of(stats)["weight_gradient_fraction"] == 0


def test_fractions_do_not_depend_on_how_the_rows_are_spread_over_workers() -> None:
    similarity, lexical, mask, _ = batch()
    similarity[:2] /= 4  # harder queries, so that some workers have more gradient than others
    products = torch.arange(D)
    codes = {"families": [0, 0, 0, 1, 1, 1, 2, 2, 2, 2], "true_products": [0, 0, 2, 3, 3, 3, 6, 7, 8, 8]}

    def stats(rows: slice) -> dict[str, float]:
        known = known_relations(POSITIVES[rows], products, **codes)  # type: ignore[arg-type]
        given = {"lexical_scores": lexical[rows], "negative_mask": mask[rows], "known": known}
        return weighted_info_nce(similarity[rows], POSITIVES[rows], temperature=0.2, **given)[1]

    whole = fractions_of(stats(slice(None)))
    parts = [stats(slice(first, first + 2)) for first in range(0, Q, 2)]
    averaged = fractions_of({name: sum(part[name] for part in parts) / 3 for name in parts[0]})
    for name in ("weight_gradient_fraction", "sibling_gradient_fraction", "mask_precision", "mask_recall"):
        assert averaged[name] == pytest.approx(whole[name], rel=1e-5), name
    one = [fractions_of(part)["weight_gradient_fraction"] for part in parts]
    assert sum(one) / 3 != pytest.approx(whole["weight_gradient_fraction"], rel=1e-3)


CODES = st.lists(st.integers(-1, 3), min_size=D, max_size=D)


@settings(max_examples=80, deadline=None)
@given(CODES, CODES, CODES, st.lists(st.booleans(), min_size=D, max_size=D), st.integers(0, 99))
def test_relations_and_the_masks_precision_and_recall_equal_a_plain_loop(products, families, true, valid, seed):
    similarity, _, mask, _ = batch(seed)
    known = known_relations(
        POSITIVES, torch.tensor(products), families=families, true_products=true, valid=torch.tensor(valid)
    )
    masked = right = duplicates = 0
    for i, p in enumerate(POSITIVES.tolist()):
        for j in range(D):
            other = j != p and valid[j] and (products[j] != products[p] or products[p] < 0)
            comparable = other and true[j] >= 0 and true[p] >= 0
            duplicate = comparable and true[j] == true[p]
            assert bool(known.siblings[i, j]) == (other and families[j] == families[p] >= 0 and not duplicate)
            assert bool(known.duplicates[i, j]) == duplicate
            masked += comparable and not mask[i, j]
            right += duplicate and not bool(mask[i, j])
            duplicates += duplicate
    _, stats = weighted_info_nce(similarity, POSITIVES, temperature=0.2, negative_mask=mask, known=known)
    found = fractions_of(stats)
    assert found.get("mask_precision") == (pytest.approx(right / masked) if masked else None)
    assert found.get("mask_recall") == (pytest.approx(right / duplicates) if duplicates else None)
