"""The contrastive objective of a step: local embeddings against those of all workers, weighted and masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afmrl_ray.agcl.directions import RetrievalDirection
from afmrl_ray.agcl.encoder import StepInputs
from afmrl_ray.agcl.gather import gather_with_gradient
from afmrl_ray.agcl.loss import scale_lexical, weighted_info_nce
from afmrl_ray.agcl.masks import (
    finish_mask,
    mask_by_attributes,
    mask_by_candidate,
    mask_by_candidate_and_attributes,
    mask_by_column,
    mask_by_margin,
)
from afmrl_ray.agcl.statistics import KnownRelations, known_relations
from afmrl_ray.config.train import AGCLConfig
from afmrl_ray.training.stopwatch import Stopwatch


def contrastive_loss(
    config: AGCLConfig,
    step: int,
    inputs: StepInputs[Any],
    embeddings: Tensor,
    watch: Stopwatch,
    *,
    temperature: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """AGCL's loss of the local rows, the mean of both directions if `agcl.bidirectional`.

    Args:
        config: `agcl`.
        step: number of the step.
        inputs: of the step.
        embeddings: [items, D] of `inputs.items`, of unit length.
        watch: measures the time of collective calls as `gather`.
        temperature: scalar, if it is learned.

    Returns:
        The scalar loss, and the statistics of `weighted_info_nce` for the queries, with `temperature`; means over the
        workers are those of the batch, see `statistics.fractions_of`.
    """
    if temperature is None:
        temperature = embeddings.new_tensor(config.temperature)
    queries, positives, negatives = embeddings.split(inputs.counts)
    with watch("gather"):
        candidates = gather_with_gradient(positives)
        if inputs.counts[2]:
            candidates = torch.cat([candidates, gather_with_gradient(negatives)])
    loss, stats = _direction_loss(config, step, inputs.query_to_positive, queries, candidates, temperature)
    if inputs.positive_to_query is not None:
        with watch("gather"):
            candidates = gather_with_gradient(queries)
        reverse, _ = _direction_loss(config, step, inputs.positive_to_query, positives, candidates, temperature)
        loss = (loss + reverse) / 2
    return loss, {**stats, "temperature": float(temperature.detach())}


def _direction_loss(
    config: AGCLConfig,
    step: int,
    direction: RetrievalDirection,
    rows: Tensor,
    candidates: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """Mean loss of the local rows [R, D] against all candidates [C, D], over each of a row's positives."""
    similarity = rows @ candidates.T
    raw = direction.lexical_scores.to(rows.device) if direction.lexical_scores is not None else None
    found = []
    for column in direction.positives:
        positives = torch.tensor(column, device=rows.device)
        scores = None
        if raw is not None and config.lexical.enabled:
            scores = scale_lexical(raw, positives, scale=config.lexical.scale, temperature=config.lexical.temperature)
        found.append(
            weighted_info_nce(
                similarity,
                positives,
                temperature=temperature,
                lexical_scores=scores,
                negative_mask=_negative_mask(
                    config, step, direction, similarity.detach(), candidates.detach(), raw, positives
                ),
                positive_weight=config.lexical.positive_weight,
                beta=config.lexical.beta,
                known=_known(config, direction, positives),
            )
        )
    loss = torch.stack([value for value, _ in found]).mean()
    return loss, {name: sum(stats[name] for _, stats in found) / len(found) for name in found[0][1]}


def _known(config: AGCLConfig, direction: RetrievalDirection, positives: Tensor) -> KnownRelations | None:
    """What the catalogue knows of siblings, and of duplicates if a mask looks for them."""
    true_products = direction.true_products if config.mask.enabled else None
    if direction.families is None and true_products is None:
        return None
    return known_relations(
        positives,
        torch.tensor(direction.products, device=positives.device),
        families=direction.families,
        true_products=true_products,
        valid=direction.valid,
    )


def _negative_mask(
    config: AGCLConfig,
    step: int,
    direction: RetrievalDirection,
    similarity: Tensor,
    candidates: Tensor,
    lexical_scores: Tensor | None,
    positives: Tensor,
) -> Tensor | None:
    """[R, C] bool, True = the column is a negative of the row; none = all columns are."""
    mask = config.mask
    shared: dict[str, Any] = {
        "product_ids": torch.tensor(direction.products, device=similarity.device),
        "hard_negatives": (
            direction.hard_negatives.to(similarity.device) if direction.hard_negatives is not None else None
        ),
    }
    if mask.enabled and step >= mask.warmup_steps:
        shared["min_negatives"] = mask.min_negatives
        if mask.kind == "candidate":
            negatives = mask_by_candidate(candidates, positives, threshold=mask.threshold, **shared)
        elif mask.kind == "margin":
            negatives = mask_by_margin(similarity, positives, margin=mask.margin, **shared)
        elif mask.kind == "column":
            assert direction.true_products is not None, "checked by Preparer for this mask"
            codes = torch.tensor(direction.true_products, device=similarity.device)
            negatives = mask_by_column(codes, positives, **shared)
        else:
            assert lexical_scores is not None, "scored by Preparer for this mask"
            least = mask.attribute_threshold
            if mask.kind == "attributes":
                negatives = mask_by_attributes(lexical_scores, positives, threshold=least, **shared)
            else:
                negatives = mask_by_candidate_and_attributes(
                    candidates, lexical_scores, positives, threshold=mask.threshold, attribute_threshold=least, **shared
                )
    elif len(direction.positives) == 1 and direction.valid is None:
        return None  # a batch holds each product once, so no candidate is of the positive's product
    else:
        suspected = torch.zeros_like(similarity, dtype=torch.bool)
        negatives = finish_mask(suspected, similarity, positives, **shared)
    return negatives if direction.valid is None else negatives & direction.valid.to(negatives.device)
