"""The contrastive loss of AGCL: InfoNCE with BM25-weighted negatives.

Source: AFMRL (arXiv 2604.20135), stage 1. Pure functions of tensors: Q queries, D candidates, dim their embedding size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from afmrl_ray.agcl.statistics import KnownRelations, loss_statistics

PositiveWeight = Literal["bm25", "one"]
LexicalScale = Literal["raw", "self", "temperature"]


def weighted_info_nce(
    similarity: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor,
    lexical_scores: Tensor | None = None,
    negative_mask: Tensor | None = None,
    positive_weight: PositiveWeight = "bm25",
    beta: float = 1.0,
    known: KnownRelations | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Attribute-guided InfoNCE.

    `-log(w_ii e^{s_ii/t} / (w_ii e^{s_ii/t} + sum_{j negative} w_ij e^{s_ij/t}))` with `w = exp(beta (1 + tanh(B)))`,
    mean over queries, in float32. Weights are added to the logits as `beta (tanh(B_ij) - tanh(B_ii))`, where the 1
    cancels, so with the paper's beta = 1 a negative is weighted by e^-1 to 1 relative to a positive whose own B is
    large. With `positive_weight="one"`, w_ii = 1 and a negative adds `beta (1 + tanh(B_ij))`: it is weighted by e to
    e^2. Without `lexical_scores` and `negative_mask` this is InfoNCE.

    Args:
        similarity: [Q, D] cosines of queries and candidates.
        positives: [Q] column of each query's positive.
        temperature: divides the cosines; a scalar tensor if it is learned.
        lexical_scores: [Q, D] BM25 scores `B`, as `scale_lexical` returns them; none = all weights are one.
        negative_mask: [Q, D] bool, True = the column counts as a negative of the query; none = all columns do. The
            positive's own column is part of the denominator whatever the mask says.
        positive_weight: how the positive is weighted.
        beta: exponent of the weights.
        known: siblings and duplicates, for the statistics.

    Returns:
        The scalar loss, and its statistics, see `loss_statistics`.
    """
    similarity = similarity.float()
    bias = None
    if lexical_scores is not None:
        bias = _log_weights(lexical_scores.detach().float(), positives, positive_weight).mul_(beta)
    added = bias
    if negative_mask is not None:
        negative_mask = negative_mask.scatter(1, positives[:, None], True)
        added = torch.where(negative_mask, 0.0 if bias is None else bias, -torch.inf)
    logits = similarity / temperature
    if added is not None:
        # Weights and mask in one pass over the matrix, in place.
        logits += added
    loss = F.cross_entropy(logits, positives)
    stats = loss_statistics(
        loss.detach(),
        similarity.detach(),
        logits.detach(),
        positives,
        log_weights=bias,
        negative_mask=negative_mask,
        known=known,
    )
    return loss, stats


def _log_weights(lexical_scores: Tensor, positives: Tensor, positive_weight: PositiveWeight) -> Tensor:
    """[Q, D] log(w_ij / w_ii), or log w_ij with log w_ii = 0; for beta = 1."""
    weights = lexical_scores.tanh()
    if positive_weight == "bm25":
        return weights.sub_(weights.gather(1, positives[:, None]))
    return weights.add_(1).scatter_(1, positives[:, None], 0.0)


def scale_lexical(
    lexical_scores: Tensor, positives: Tensor, *, scale: LexicalScale = "raw", temperature: float = 1.0
) -> Tensor:
    """Bring BM25 scores into the range in which `tanh` is not saturated.

    Negative scores become 0. A query whose own positive shares no word with it (`B_ii <= 0`, as when its attributes are
    missing) gets zeros, hence uniform weights: otherwise an incomplete item would up-weight all its lexical
    neighbours.

    Args:
        lexical_scores: [Q, D] BM25 of each query's attributes against each candidate's.
        positives: [Q] column of each query's positive.
        scale: `raw` = unchanged, `self` = B_ij / B_ii, `temperature` = B_ij / temperature.
        temperature: divisor for `temperature`.

    Returns:
        [Q, D] float32.
    """
    lexical_scores = lexical_scores.float()
    own = lexical_scores.gather(1, positives[:, None])
    scaled = lexical_scores.clamp(min=0)
    if scale == "self":
        scaled /= own
    elif scale == "temperature":
        scaled /= temperature
    return scaled.masked_fill_(own <= 0, 0.0)
