"""The contrastive loss of AGCL: InfoNCE with BM25-weighted negatives and a mask of probable false negatives.

Source: AFMRL (arXiv 2604.20135), stage 1. Pure functions: tensors in, tensors out.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PositiveWeight = Literal["bm25", "one"]
LexicalScale = Literal["raw", "self", "temperature"]

_SAMPLED_WEIGHTS = 4_096


def weighted_info_nce(
    similarity: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor,
    lexical: Tensor | None = None,
    keep: Tensor | None = None,
    positive_weight: PositiveWeight = "bm25",
) -> tuple[Tensor, dict[str, float]]:
    """Attribute-guided InfoNCE.

    `-log(w_ii e^{s_ii/t} / (w_ii e^{s_ii/t} + sum_{j kept} w_ij e^{s_ij/t}))` with `w = exp(1 + tanh(B))`, mean over
    queries, in float32. Weights are added to logits as `tanh(B_ij) - tanh(B_ii)`, where the 1 cancels, so a negative is
    weighted by e^-1 to 1 relative to a positive whose own B is large. With `positive_weight="one"`, w_ii = 1 and a
    negative adds `1 + tanh(B_ij)`: it is weighted by e to e^2. Without `lexical` and `keep` this is InfoNCE.

    Args:
        similarity: [Q, D] cosines of queries and candidates.
        positives: [Q] column of each query's positive.
        temperature: divides the cosines; a scalar tensor if it is learned.
        lexical: [Q, D] BM25 `B`, as `scale_lexical` returns it.
        keep: [Q, D] bool, False = not a negative; the positive is kept in any case.
        positive_weight: how the positive is weighted.

    Returns:
        The scalar loss, and `loss`, `accuracy` (share of queries whose positive is the most similar kept candidate),
        `positive_similarity`, `hardest_negative_similarity` (means), `masked_fraction` (of negatives), and quantiles of
        w_ij / w_ii over kept negatives, from an even sample of the matrix: `weight_p10`, `weight_p50`, `weight_p90`.
    """
    similarity = similarity.float()
    bias = None
    if lexical is not None:
        bias = _log_weights(lexical.detach().float(), positives, positive_weight)
    added = bias
    if keep is not None:
        keep = keep.scatter(1, positives[:, None], True)
        added = torch.where(keep, 0.0 if bias is None else bias, -torch.inf)
    logits = similarity / temperature
    if added is not None:
        # Weights and mask in one pass over the matrix, in place.
        logits += added
    loss = F.cross_entropy(logits, positives)
    with torch.no_grad():
        stats = _stats(loss, similarity, positives, bias, keep)
    return loss, stats


def _log_weights(lexical: Tensor, positives: Tensor, positive_weight: PositiveWeight) -> Tensor:
    """[Q, D] log(w_ij / w_ii), or log w_ij with log w_ii = 0."""
    weights = lexical.tanh()
    if positive_weight == "bm25":
        return weights.sub_(weights.gather(1, positives[:, None]))
    return weights.add_(1).scatter_(1, positives[:, None], 0.0)


def _stats(
    loss: Tensor, similarity: Tensor, positives: Tensor, bias: Tensor | None, keep: Tensor | None
) -> dict[str, float]:
    own = similarity.gather(1, positives[:, None])
    others = similarity if keep is None else torch.where(keep, similarity, -torch.inf)
    hardest = others.scatter(1, positives[:, None], -torch.inf).amax(1)
    possible = max(1, similarity.numel() - len(similarity))
    values = {
        "loss": loss,
        "accuracy": (own[:, 0] > hardest).float().mean(),
        "positive_similarity": own.mean(),
        "hardest_negative_similarity": hardest[hardest.isfinite()].mean(),
        "masked_fraction": loss.new_zeros(()) if keep is None else (keep.numel() - _count(keep).sum()) / possible,
    }
    quantiles = _weight_quantiles(bias, positives, keep)
    # One transfer from the accelerator instead of one for each number.
    numbers = torch.cat([torch.stack([value.float() for value in values.values()]), quantiles]).tolist()
    return dict(zip([*values, "weight_p10", "weight_p50", "weight_p90"], numbers, strict=True))


def _count(chosen: Tensor) -> Tensor:
    """[Q] how many of each row; a plain sum of booleans makes a copy of eight bytes each first."""
    return chosen.sum(1, dtype=torch.int32)


def _weight_quantiles(bias: Tensor | None, positives: Tensor, keep: Tensor | None) -> Tensor:
    if bias is None:
        return torch.ones(3, device=positives.device)
    # An odd stride visits all columns of a matrix whose width is a power of two.
    place = torch.arange(0, bias.numel(), (bias.numel() // _SAMPLED_WEIGHTS) | 1, device=bias.device)
    counted = place % bias.shape[1] != positives[place // bias.shape[1]]
    if keep is not None:
        counted &= keep.flatten()[place]
    sample = bias.flatten()[place[counted]].exp()
    if not len(sample):
        return torch.full((3,), torch.nan, device=bias.device)
    return sample.quantile(torch.tensor([0.1, 0.5, 0.9], device=bias.device))


def scale_lexical(
    lexical: Tensor, positives: Tensor, *, scale: LexicalScale = "raw", temperature: float = 1.0
) -> Tensor:
    """Bring BM25 scores into the range that `tanh` can tell apart.

    Negative scores become 0. A query whose own positive shares no word with it (`B_ii <= 0`, as when its attributes are
    missing) gets zeros, hence uniform weights: otherwise an incomplete item would up-weight all its lexical
    neighbours.

    Args:
        lexical: [Q, D] BM25 of each query's attributes against each candidate's.
        positives: [Q] column of each query's positive.
        scale: `raw` = as it is, `self` = B_ij / B_ii, `temperature` = B_ij / temperature.
        temperature: divisor for `temperature`.

    Returns:
        [Q, D] float32.
    """
    lexical = lexical.float()
    own = lexical.gather(1, positives[:, None])
    scaled = lexical.clamp(min=0)
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
    exempt: Tensor | None = None,
) -> Tensor:
    """Which candidates may serve as negatives of which query, by their similarity to the positive (the paper's mask).

    Args:
        candidates: [D, dim] embeddings of the candidates.
        positives: [Q] candidate that is each query's positive.
        threshold: a candidate whose cosine to the positive is above it is no negative.
        product_ids: see `finish_mask`.
        min_negatives: see `finish_mask`.
        exempt: see `finish_mask`.

    Returns:
        [Q, D] bool, False = not a negative; True for the positive itself.
    """
    unit = F.normalize(candidates.float(), dim=1)
    cosine = unit.index_select(0, positives) @ unit.T
    return finish_mask(
        cosine > threshold, cosine, positives, product_ids=product_ids, min_negatives=min_negatives, exempt=exempt
    )


@torch.no_grad()
def mask_by_margin(
    similarity: Tensor,
    positives: Tensor,
    *,
    margin: float,
    product_ids: Tensor | None = None,
    min_negatives: int = 0,
    exempt: Tensor | None = None,
) -> Tensor:
    """The same by the query's own similarity: a candidate that is closer to it than its positive by more than `margin`.

    Source: the rule of NV-Retriever and of ms-swift's fake negatives, `s_ij > s_ii + margin`.

    Args:
        similarity: [Q, D] cosines of queries and candidates.
    """
    similarity = similarity.float()
    own = similarity.gather(1, positives[:, None])
    return finish_mask(
        similarity > own + margin,
        similarity,
        positives,
        product_ids=product_ids,
        min_negatives=min_negatives,
        exempt=exempt,
    )


@torch.no_grad()
def mask_by_attributes(
    lexical: Tensor,
    positives: Tensor,
    *,
    threshold: float,
    product_ids: Tensor | None = None,
    min_negatives: int = 0,
    exempt: Tensor | None = None,
) -> Tensor:
    """The same by attributes: a candidate whose BM25 exceeds `threshold` of the positive's own.

    A query whose positive shares no word with it (`B_ii <= 0`) is suspicious of nobody.

    Args:
        lexical: [Q, D] BM25 of each query's attributes against each candidate's, unscaled.
    """
    lexical = lexical.float()
    own = lexical.gather(1, positives[:, None])
    return finish_mask(
        (own > 0) & (lexical > threshold * own),
        lexical,
        positives,
        product_ids=product_ids,
        min_negatives=min_negatives,
        exempt=exempt,
    )


@torch.no_grad()
def finish_mask(
    suspicious: Tensor,
    closeness: Tensor,
    positives: Tensor,
    *,
    product_ids: Tensor | None = None,
    min_negatives: int = 0,
    exempt: Tensor | None = None,
) -> Tensor:
    """The rules that every mask shares.

    Args:
        suspicious: [Q, D] bool, candidates that may be positives in truth.
        closeness: [Q, D] by which the least suspicious ones are found.
        positives: [Q] candidate that is each query's positive.
        product_ids: [D] int64 codes of the candidates' products, -1 = unknown, which equals nothing; a candidate of the
            positive's product is no negative.
        min_negatives: a query left with fewer gets back those least close, up to this many, but never one of the
            positive's product.
        exempt: [Q, D] bool, candidates that someone chose as negatives of the query: suspicion does not touch them.

    Returns:
        [Q, D] bool, False = not a negative; True for the positive itself.
    """
    able = torch.ones_like(suspicious)
    if product_ids is not None:
        own = product_ids[positives][:, None]
        able = (product_ids[None, :] != own) | (own < 0)
    able.scatter_(1, positives[:, None], False)
    keep = able & ~suspicious
    if exempt is not None:
        keep |= able & exempt
    short = (_count(keep) < min_negatives).nonzero()[:, 0]
    if len(short):
        least = (
            closeness[short]
            .masked_fill(~able[short], torch.inf)
            .topk(min(min_negatives, closeness.shape[1]), largest=False)
        )
        restored = torch.zeros_like(keep[short]).scatter_(1, least.indices, True)
        keep[short] |= restored & able[short]
    return keep.scatter_(1, positives[:, None], True)
