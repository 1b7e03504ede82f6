"""Masks of false negatives against their rules, candidate by candidate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afmrl_ray.agcl.masks import (
    finish_mask,
    mask_by_attributes,
    mask_by_candidate,
    mask_by_candidate_and_attributes,
    mask_by_column,
    mask_by_margin,
)

torch.set_num_threads(1)
D = 9


def _unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


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


@pytest.mark.parametrize("rule", ["candidate", "margin", "attributes", "both"])
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
        if rule == "both":
            thresholds = {"threshold": -1.0, "attribute_threshold": 1e-3}
            return mask_by_candidate_and_attributes(
                _unit(D, 16), scores, positives, min_negatives=least, **thresholds, **shared
            )
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


def test_the_mask_by_both_keys_masks_what_exceeds_both_thresholds() -> None:
    candidates, positives = torch.randn(40, 3, generator=torch.Generator().manual_seed(3)), torch.tensor([4, 0, 17])
    scores = torch.rand(3, 40, generator=torch.Generator().manual_seed(4)) * 3
    scores[2, 17] = 0.0
    mask = mask_by_candidate_and_attributes(candidates, scores, positives, threshold=0.3, attribute_threshold=0.6)
    kinds = set()
    for i, p in enumerate(positives.tolist()):
        for j in range(40):
            similar = float(F.cosine_similarity(candidates[j], candidates[p], dim=0)) > 0.3
            equal = bool(scores[i, p] > 0 and scores[i, j] > 0.6 * scores[i, p])
            kinds.add((similar, equal))
            assert bool(mask[i, j]) == (j == p or not (similar and equal))
    assert len(kinds) == 4, "some combination of the two keys does not occur"
    assert mask[2].all(), "a positive without common attributes masks nobody"


def test_the_mask_by_both_keys_is_where_both_masks_agree() -> None:
    candidates, positives = _unit(30, 4), torch.tensor([3, 9])
    scores = torch.rand(2, 30, generator=torch.Generator().manual_seed(1))
    by_candidate = mask_by_candidate(candidates, positives, threshold=0.2)
    by_attributes = mask_by_attributes(scores, positives, threshold=0.9)
    both = mask_by_candidate_and_attributes(candidates, scores, positives, threshold=0.2, attribute_threshold=0.9)
    assert torch.equal(both, by_candidate | by_attributes)
    assert both.sum() > by_candidate.sum()


def test_the_mask_by_a_column_masks_what_has_the_positives_value_and_nothing_unknown() -> None:
    codes, products = torch.tensor([5, 7, 5, -1, -1, 7]), torch.tensor([0, 1, 2, 3, 4, 5])
    mask = mask_by_column(codes, torch.tensor([0, 3]), product_ids=products)
    assert mask.tolist() == [[True, True, False, True, True, True], [True] * 6]
