"""The AGCL loss on given embeddings against plain cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from afmrl_ray.agcl.loss import scale_lexical, weighted_info_nce
from afmrl_ray.agcl.masks import mask_by_candidate
from jobs.benchmarks.harness import Comparison, compare, seconds

BATCH, DIMENSION, TEMPERATURE = 1024, 1536, 0.02


def comparisons() -> list[Comparison]:
    """Time the loss with weights, and with weights and mask.

    Raises:
        AssertionError: the loss without weights and mask is not cross-entropy.
    """
    draw = torch.Generator().manual_seed(0)
    positives = torch.arange(BATCH)
    products = torch.arange(BATCH)
    raw = torch.rand(BATCH, BATCH, generator=draw) * 4 + 26 * torch.eye(BATCH)
    leaves = [F.normalize(torch.randn(BATCH, DIMENSION, generator=draw), dim=1) for _ in range(2)]

    def gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        queries, candidates = (leaf.clone().requires_grad_() for leaf in leaves)
        return list(torch.autograd.grad(loss(queries, candidates), (queries, candidates)))

    def plain(queries: Tensor, candidates: Tensor) -> Tensor:
        return F.cross_entropy(queries @ candidates.T / TEMPERATURE, positives)

    def bare(queries: Tensor, candidates: Tensor) -> Tensor:
        return weighted_info_nce(queries @ candidates.T, positives, temperature=TEMPERATURE)[0]

    def weighted(queries: Tensor, candidates: Tensor) -> Tensor:
        lexical = scale_lexical(raw, positives)
        return weighted_info_nce(queries @ candidates.T, positives, temperature=TEMPERATURE, lexical_scores=lexical)[0]

    def masked(queries: Tensor, candidates: Tensor) -> Tensor:
        mask = mask_by_candidate(candidates.detach(), positives, threshold=0.9, product_ids=products, min_negatives=8)
        lexical = scale_lexical(raw, positives)
        return weighted_info_nce(
            queries @ candidates.T, positives, temperature=TEMPERATURE, lexical_scores=lexical, negative_mask=mask
        )[0]

    gap = max(float((a - b).abs().max()) for a, b in zip(gradients(bare), gradients(plain), strict=True))
    assert gap < 1e-7, f"without weights and mask this is not cross-entropy: {gap:g}"
    equality = f"without weights and mask the gradients differ by {gap:.0e}"
    name = f"AGCL loss, B {BATCH}, D {DIMENSION}, forward and backward"
    return [
        compare(
            f"{name}, {what}",
            "plain cross-entropy",
            seconds(partial(gradients, loss)),
            seconds(lambda: gradients(plain)),
            target=target,
            equality=equality,
            repeats=31,
            warmups=3,
        )
        for what, loss, target in (("weights", weighted, 1.10), ("weights, mask", masked, 1.45))
    ]
