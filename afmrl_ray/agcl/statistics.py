"""Statistics of a contrastive loss: what the batch is like, and whom its gradient comes from.

Fractions are logged as quotients of sums over the batch. Workers average their sums first, so that a fraction does not
depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FRACTIONS = {
    "weight_gradient_fraction": ("gradient_of_weights", "gradient_without_weights"),
    "sibling_gradient_fraction": ("gradient_of_siblings", "gradient_of_negatives"),
    "mask_precision": ("masked_duplicates", "masked_candidates"),
    "mask_recall": ("masked_duplicates", "duplicates"),
}
"""Numerator and denominator of each fraction, as `loss_statistics` names them."""


@dataclass(frozen=True)
class KnownRelations:
    """What the catalogue knows about Q queries and D candidates; statistics alone use it.

    Attributes:
        siblings: [Q, D] bool, candidates of the positive's family that are another product; none = families are not
            known.
        duplicates: [Q, D] bool, candidates that are the positive's true product under another product id; none = true
            products are not known, or not asked for.
        comparable: [Q, D] bool, candidates of another product id whose true product is known; none with `duplicates`.
    """

    siblings: Tensor | None = None
    duplicates: Tensor | None = None
    comparable: Tensor | None = None


def known_relations(
    positives: Tensor,
    products: Tensor,
    *,
    families: Sequence[int] | None = None,
    true_products: Sequence[int] | None = None,
    valid: Tensor | None = None,
) -> KnownRelations:
    """Relations of each query's positive to the candidates.

    Args:
        positives: [Q] column of each query's positive.
        products: [D] codes of the candidates' product ids; -1 = unknown, which equals nothing, as in all codes.
        families: [D] codes of their families.
        true_products: [D] codes of their true products.
        valid: [D] bool, False for padding.
    """

    def equal(codes: Tensor) -> Tensor:
        own = codes[positives][:, None]
        return (codes == own) & (own >= 0)

    def known(codes: Sequence[int]) -> Tensor:
        return torch.tensor(codes, device=products.device)

    other = ~equal(products).scatter(1, positives[:, None], True)
    if valid is not None:
        other &= valid.to(products.device)
    siblings = duplicates = comparable = None
    if true_products is not None:
        codes = known(true_products)
        comparable = other & (codes >= 0) & (codes[positives] >= 0)[:, None]
        duplicates = equal(codes) & comparable
    if families is not None:
        siblings = equal(known(families)) & other
        if duplicates is not None:
            siblings &= ~duplicates
    return KnownRelations(siblings, duplicates, comparable)


@torch.no_grad()
def loss_statistics(
    loss: Tensor,
    similarity: Tensor,
    logits: Tensor,
    positives: Tensor,
    *,
    log_weights: Tensor | None = None,
    negative_mask: Tensor | None = None,
    known: KnownRelations | None = None,
) -> dict[str, float]:
    """Statistics of `loss.weighted_info_nce`; those that are means over the queries can be averaged over workers.

    The gradient of a query's loss by its similarity to candidate j is `(p_j - 1[j = positive]) / t`, where p is the
    softmax of the logits. Sums of its absolute values over the candidates are gradient masses.

    Args:
        loss: scalar.
        similarity: [Q, D] cosines of queries and candidates.
        logits: [Q, D] similarities over temperature, weights added, -inf for candidates that are no negatives.
        positives: [Q] column of each query's positive.
        log_weights: [Q, D] that were added to the logits; none = there are no weights.
        negative_mask: [Q, D] bool, True = the column is a negative or the positive; none = all columns are.
        known: siblings and duplicates.

    Returns:
        `loss`; `accuracy` (fraction of queries whose positive is more similar than every negative),
        `positive_similarity`, `hardest_negative_similarity` (means); `masked_fraction` (of all candidates but the
        positives); and numerators and denominators for `fractions_of`, means over the queries:
        `gradient_of_weights` (sum of |p - p'|, p' without weights) and `gradient_without_weights` (mass of p') if there
        are weights; `gradient_of_siblings` and `gradient_of_negatives` if siblings are known; `masked_duplicates`,
        `masked_candidates` and `duplicates` (numbers of comparable candidates) if duplicates are known.
    """
    known = known or KnownRelations()
    rows, own_column = len(similarity), positives[:, None]
    own = similarity.gather(1, own_column)
    others = similarity if negative_mask is None else torch.where(negative_mask, similarity, -torch.inf)
    hardest = others.scatter(1, own_column, -torch.inf).amax(1)
    possible = max(1, similarity.numel() - rows)
    masked = loss.new_zeros(()) if negative_mask is None else negative_mask.numel() - _count(negative_mask)
    values = {
        "loss": loss,
        "accuracy": (own[:, 0] > hardest).float().mean(),
        "positive_similarity": own.mean(),
        "hardest_negative_similarity": hardest[hardest.isfinite()].mean(),
        "masked_fraction": masked / possible,
    }
    if log_weights is not None or known.siblings is not None:
        probability = logits.softmax(1)
        if log_weights is not None:
            plain = (logits - log_weights).softmax(1)
            values["gradient_of_weights"] = (probability - plain).abs().sum() / rows
            values["gradient_without_weights"] = 2 * (1 - plain.gather(1, own_column)).mean()
        if known.siblings is not None:
            negatives = probability.scatter(1, own_column, 0.0)
            values["gradient_of_siblings"] = (negatives * known.siblings).sum() / rows
            values["gradient_of_negatives"] = negatives.sum() / rows
    if known.duplicates is not None and known.comparable is not None:
        hidden = torch.zeros_like(known.comparable) if negative_mask is None else known.comparable & ~negative_mask
        values["masked_duplicates"] = _count(hidden & known.duplicates) / rows
        values["masked_candidates"] = _count(hidden) / rows
        values["duplicates"] = _count(known.duplicates) / rows
    # One transfer from the accelerator instead of one for each number.
    numbers = torch.stack([value.float() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def _count(chosen: Tensor) -> Tensor:
    """Number of True; a plain sum of booleans first makes a copy of eight bytes each."""
    return chosen.sum(1, dtype=torch.int32).sum()


def fractions_of(statistics: Mapping[str, float]) -> dict[str, float]:
    """Replace numerators and denominators by their quotients; one whose denominator is missing or 0 is left out.

    `weight_gradient_fraction`: gradient mass that the weights move, over the mass without weights; above 1 where
    weights enlarge the gradient. `sibling_gradient_fraction`: part of the negatives' mass that is of the positive's
    family. `mask_precision`: fraction of the masked candidates of other product ids that are duplicates;
    `mask_recall`: fraction of the duplicates that are masked.
    """
    parts = {name for pair in _FRACTIONS.values() for name in pair}
    found = {name: value for name, value in statistics.items() if name not in parts}
    for name, (numerator, denominator) in _FRACTIONS.items():
        if statistics.get(denominator):
            found[name] = statistics[numerator] / statistics[denominator]
    return found
