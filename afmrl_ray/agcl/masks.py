"""Masks of probable false negatives. Pure functions of tensors: Q queries, D candidates, dim their embedding size.

Sources: AFMRL (arXiv 2604.20135), stage 1, for the similarity to the positive; NV-Retriever for the margin.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    cosine = _cosine_to_positive(candidates, positives)
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
    return finish_mask(
        _equal_attributes(lexical_scores, positives, threshold),
        lexical_scores,
        positives,
        product_ids=product_ids,
        min_negatives=min_negatives,
        hard_negatives=hard_negatives,
    )


@torch.no_grad()
def mask_by_candidate_and_attributes(
    candidates: Tensor,
    lexical_scores: Tensor,
    positives: Tensor,
    *,
    threshold: float,
    attribute_threshold: float,
    product_ids: Tensor | None = None,
    min_negatives: int = 0,
    hard_negatives: Tensor | None = None,
) -> Tensor:
    """Mask candidates that look like the query's positive and have nearly the same attributes.

    Products that differ in one attribute look alike, and products of one kind share most attributes; only what agrees
    by both keys is probably the same product. A query whose positive shares no term with it masks nobody by this rule.

    Args:
        candidates: [D, dim] embeddings of the candidates.
        lexical_scores: [Q, D] BM25 of each query's attributes against each candidate's, unscaled.
        positives: [Q] column of each query's positive.
        threshold: cosine to the positive that a masked candidate exceeds.
        attribute_threshold: fraction of the positive's BM25 score that a masked candidate exceeds.
        product_ids, min_negatives, hard_negatives: see `finish_mask`; closeness is the cosine.

    Returns:
        As `mask_by_candidate`.
    """
    cosine = _cosine_to_positive(candidates, positives)
    return finish_mask(
        (cosine > threshold) & _equal_attributes(lexical_scores.float(), positives, attribute_threshold),
        cosine,
        positives,
        product_ids=product_ids,
        min_negatives=min_negatives,
        hard_negatives=hard_negatives,
    )


@torch.no_grad()
def mask_by_column(
    codes: Tensor,
    positives: Tensor,
    *,
    product_ids: Tensor | None = None,
    min_negatives: int = 0,
    hard_negatives: Tensor | None = None,
) -> Tensor:
    """Mask candidates that are known to be the positive's product under another product id.

    Args:
        codes: [D] int64 codes of the candidates' true products, -1 = unknown, which equals nothing.
        positives: [Q] column of each query's positive.
        product_ids, min_negatives, hard_negatives: see `finish_mask`.

    Returns:
        As `mask_by_candidate`.
    """
    own = codes[positives][:, None]
    equal = (codes == own) & (own >= 0)
    return finish_mask(
        equal,
        equal.float(),
        positives,
        product_ids=product_ids,
        min_negatives=min_negatives,
        hard_negatives=hard_negatives,
    )


def _cosine_to_positive(candidates: Tensor, positives: Tensor) -> Tensor:
    unit = F.normalize(candidates.float(), dim=1)
    return unit.index_select(0, positives) @ unit.T


def _equal_attributes(lexical_scores: Tensor, positives: Tensor, threshold: float) -> Tensor:
    own = lexical_scores.gather(1, positives[:, None])
    return (own > 0) & (lexical_scores > threshold * own)


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
    short = (mask.sum(1, dtype=torch.int32) < min_negatives).nonzero()[:, 0]
    if len(short):
        least = (
            closeness[short]
            .masked_fill(~eligible[short], torch.inf)
            .topk(min(min_negatives, closeness.shape[1]), largest=False)
        )
        restored = torch.zeros_like(mask[short]).scatter_(1, least.indices, True)
        mask[short] |= restored & eligible[short]
    return mask.scatter_(1, positives[:, None], True)
