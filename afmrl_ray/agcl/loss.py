"""The contrastive loss of AGCL: InfoNCE with BM25-weighted negatives and a mask of probable false negatives.

Source: AFMRL (arXiv 2604.20135), stage 1. Pure functions of tensors: Q queries, D candidates, dim their embedding size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PositiveWeight = Literal["bm25", "one"]
LexicalScale = Literal["raw", "self", "temperature"]

_QUANTILE_SAMPLE = 4_096
"""About how many entries of the weight matrix the logged quantiles are estimated from."""


def weighted_info_nce(
    similarity: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor,
    lexical_scores: Tensor | None = None,
    negative_mask: Tensor | None = None,
    positive_weight: PositiveWeight = "bm25",
) -> tuple[Tensor, dict[str, float]]:
    """Attribute-guided InfoNCE.

    `-log(w_ii e^{s_ii/t} / (w_ii e^{s_ii/t} + sum_{j negative} w_ij e^{s_ij/t}))` with `w = exp(1 + tanh(B))`, mean
    over queries, in float32. Weights are added to the logits as `tanh(B_ij) - tanh(B_ii)`, where the 1 cancels, so a
    negative is weighted by e^-1 to 1 relative to a positive whose own B is large. With `positive_weight="one"`,
    w_ii = 1 and a negative adds `1 + tanh(B_ij)`: it is weighted by e to e^2. Without `lexical_scores` and
    `negative_mask` this is InfoNCE.

    Args:
        similarity: [Q, D] cosines of queries and candidates.
        positives: [Q] column of each query's positive.
        temperature: divides the cosines; a scalar tensor if it is learned.
        lexical_scores: [Q, D] BM25 scores `B`, as `scale_lexical` returns them; none = all weights are one.
        negative_mask: [Q, D] bool, True = the column counts as a negative of the query; none = all columns do. The
            positive's own column is part of the denominator whatever the mask says.
        positive_weight: how the positive is weighted.

    Returns:
        The scalar loss, and `loss`, `accuracy` (fraction of queries whose positive is more similar than every
        negative), `positive_similarity`, `hardest_negative_similarity` (means), `masked_fraction` (of all possible
        negatives), and quantiles of w_ij / w_ii over negatives, from an even sample of the matrix: `weight_p10`,
        `weight_p50`, `weight_p90`.
    """
    similarity = similarity.float()
    bias = None
    if lexical_scores is not None:
        bias = _log_weights(lexical_scores.detach().float(), positives, positive_weight)
    added = bias
    if negative_mask is not None:
        negative_mask = negative_mask.scatter(1, positives[:, None], True)
        added = torch.where(negative_mask, 0.0 if bias is None else bias, -torch.inf)
    logits = similarity / temperature
    if added is not None:
        # Weights and mask in one pass over the matrix, in place.
        logits += added
    loss = F.cross_entropy(logits, positives)
    with torch.no_grad():
        stats = _stats(loss, similarity, positives, bias, negative_mask)
    return loss, stats


def _log_weights(lexical_scores: Tensor, positives: Tensor, positive_weight: PositiveWeight) -> Tensor:
    """[Q, D] log(w_ij / w_ii), or log w_ij with log w_ii = 0."""
    weights = lexical_scores.tanh()
    if positive_weight == "bm25":
        return weights.sub_(weights.gather(1, positives[:, None]))
    return weights.add_(1).scatter_(1, positives[:, None], 0.0)


def _stats(
    loss: Tensor, similarity: Tensor, positives: Tensor, bias: Tensor | None, negative_mask: Tensor | None
) -> dict[str, float]:
    own = similarity.gather(1, positives[:, None])
    others = similarity if negative_mask is None else torch.where(negative_mask, similarity, -torch.inf)
    hardest = others.scatter(1, positives[:, None], -torch.inf).amax(1)
    possible = max(1, similarity.numel() - len(similarity))
    masked = loss.new_zeros(()) if negative_mask is None else negative_mask.numel() - _count(negative_mask).sum()
    values = {
        "loss": loss,
        "accuracy": (own[:, 0] > hardest).float().mean(),
        "positive_similarity": own.mean(),
        "hardest_negative_similarity": hardest[hardest.isfinite()].mean(),
        "masked_fraction": masked / possible,
    }
    quantiles = _weight_quantiles(bias, positives, negative_mask)
    # One transfer from the accelerator instead of one for each number.
    numbers = torch.cat([torch.stack([value.float() for value in values.values()]), quantiles]).tolist()
    return dict(zip([*values, "weight_p10", "weight_p50", "weight_p90"], numbers, strict=True))


def _count(chosen: Tensor) -> Tensor:
    """[Q] number of True in each row; a plain sum of booleans first makes a copy of eight bytes each."""
    return chosen.sum(1, dtype=torch.int32)


def _weight_quantiles(bias: Tensor | None, positives: Tensor, negative_mask: Tensor | None) -> Tensor:
    if bias is None:
        return torch.ones(3, device=positives.device)
    # An odd stride visits all columns of a matrix whose width is a power of two.
    place = torch.arange(0, bias.numel(), (bias.numel() // _QUANTILE_SAMPLE) | 1, device=bias.device)
    counted = place % bias.shape[1] != positives[place // bias.shape[1]]
    if negative_mask is not None:
        counted &= negative_mask.flatten()[place]
    sample = bias.flatten()[place[counted]].exp()
    if not len(sample):
        return torch.full((3,), torch.nan, device=bias.device)
    return sample.quantile(torch.tensor([0.1, 0.5, 0.9], device=bias.device))


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


@torch.no_grad()
def mask_by_candidate(
    candidates: Tensor,
    positives: Tensor,
    *,
    threshold: float,
    product_ids: Tensor | None = None,
    min_negatives: int = 0,
    hard_negatives: Tensor | None = None,
) -> Tensor:
    """Mask candidates whose similarity to the query's positive is above a threshold (the paper's rule).

    Args:
        candidates: [D, dim] embeddings of the candidates.
        positives: [Q] column of each query's positive.
        threshold: a candidate whose cosine to the positive is above it is masked.
        product_ids, min_negatives, hard_negatives: see `finish_mask`.

    Returns:
        [Q, D] bool, the `negative_mask` of `weighted_info_nce`; True for the positive itself.
    """
    unit = F.normalize(candidates.float(), dim=1)
    cosine = unit.index_select(0, positives) @ unit.T
    return finish_mask(
        cosine > threshold,
        cosine,
        positives,
        product_ids=product_ids,
        min_negatives=min_negatives,
        hard_negatives=hard_negatives,
    )


@torch.no_grad()
def mask_by_margin(
    similarity: Tensor,
    positives: Tensor,
    *,
    margin: float,
    product_ids: Tensor | None = None,
    min_negatives: int = 0,
    hard_negatives: Tensor | None = None,
) -> Tensor:
    """Mask candidates that are more similar to the query than its positive by more than `margin`.

    Source: the rule of NV-Retriever and of ms-swift's fake negatives, `s_ij > s_ii + margin`.

    Args:
        similarity: [Q, D] cosines of queries and candidates.
        positives: [Q] column of each query's positive.
        margin: in cosine.
        product_ids, min_negatives, hard_negatives: see `finish_mask`.

    Returns:
        As `mask_by_candidate`.
    """
    similarity = similarity.float()
    own = similarity.gather(1, positives[:, None])
    return finish_mask(
        similarity > own + margin,
        similarity,
        positives,
        product_ids=product_ids,
        min_negatives=min_negatives,
        hard_negatives=hard_negatives,
    )


@torch.no_grad()
def mask_by_attributes(
    lexical_scores: Tensor,
    positives: Tensor,
    *,
    threshold: float,
    product_ids: Tensor | None = None,
    min_negatives: int = 0,
    hard_negatives: Tensor | None = None,
) -> Tensor:
    """Mask candidates whose BM25 score is above `threshold` times the positive's own.

    A query whose positive shares no word with it (`B_ii <= 0`) masks nobody by this rule.

    Args:
        lexical_scores: [Q, D] BM25 of each query's attributes against each candidate's, unscaled.
        positives: [Q] column of each query's positive.
        threshold: fraction of the positive's score.
        product_ids, min_negatives, hard_negatives: see `finish_mask`.

    Returns:
        As `mask_by_candidate`.
    """
    lexical_scores = lexical_scores.float()
    own = lexical_scores.gather(1, positives[:, None])
    return finish_mask(
        (own > 0) & (lexical_scores > threshold * own),
        lexical_scores,
        positives,
        product_ids=product_ids,
        min_negatives=min_negatives,
        hard_negatives=hard_negatives,
    )


@torch.no_grad()
def finish_mask(
    suspected: Tensor,
    closeness: Tensor,
    positives: Tensor,
    *,
    product_ids: Tensor | None = None,
    min_negatives: int = 0,
    hard_negatives: Tensor | None = None,
) -> Tensor:
    """Apply the rules that all masks share to the candidates that one of them suspects.

    Args:
        suspected: [Q, D] bool, candidates that are probably positives.
        closeness: [Q, D] score by which they were suspected; `min_negatives` restores the lowest first.
        positives: [Q] column of each query's positive.
        product_ids: [D] int64 codes of the candidates' products, -1 = unknown, which equals nothing; a candidate of the
            positive's product is never a negative.
        min_negatives: a query left with fewer gets back the least close candidates, up to this many, but none of the
            positive's product.
        hard_negatives: [Q, D] bool, candidates chosen as hard negatives of the query, which suspicion does not mask.

    Returns:
        [Q, D] bool, the `negative_mask` of `weighted_info_nce`; True for the positive itself.
    """
    eligible = torch.ones_like(suspected)
    if product_ids is not None:
        own = product_ids[positives][:, None]
        eligible = (product_ids[None, :] != own) | (own < 0)
    eligible.scatter_(1, positives[:, None], False)
    mask = eligible & ~suspected
    if hard_negatives is not None:
        mask |= eligible & hard_negatives
    short = (_count(mask) < min_negatives).nonzero()[:, 0]
    if len(short):
        least = (
            closeness[short]
            .masked_fill(~eligible[short], torch.inf)
            .topk(min(min_negatives, closeness.shape[1]), largest=False)
        )
        restored = torch.zeros_like(mask[short]).scatter_(1, least.indices, True)
        mask[short] |= restored & eligible[short]
    return mask.scatter_(1, positives[:, None], True)
