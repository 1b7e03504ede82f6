"""The pieces of AGCL, each alone: weights, mask and batches as the study's config sets them, and their ceilings.

Ceilings use what only a synthetic catalogue knows: the true attributes, true products and families. No piece puts
attributes into the encoder's input, so all are compared with plain InfoNCE and measured without attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afmrl_ray.cit.stages.training import PLAIN_INFONCE
from afmrl_ray.config import Config

PIECES = {
    "printed-weights": "weights as printed in the paper (words, idf of rank_bm25, raw scores, beta 1)",
    "weights": "weights alone",
    "mask": "mask alone",
    "batches": "attribute-mined batches alone",
    "all-pieces": "weights, mask and mined batches, with the teacher's attributes",
    "true-weights": "ceiling of the weights: by the true attributes",
    "true-mask": "ceiling of the mask: by the true product",
    "true-batches": "ceiling of the batches: whole families",
    "all-true": "ceiling of all three together",
}
"""What each piece is, by key."""
WITH_TRUE_ATTRIBUTES = frozenset({"true-weights", "all-true"})
"""Pieces that are trained with the ground truth instead of the teacher's attributes."""


def piece_settings(config: Config, key: str) -> Mapping[str, Any]:
    """Settings of a piece over those of the study."""
    agcl = config.agcl
    lexical, mask, batches = (
        section.model_dump(mode="json") for section in (agcl.lexical, agcl.mask, agcl.batch_grouping)
    )
    true_mask = {**mask, "enabled": True, "kind": "column"}
    true_batches = {**batches, "by": "column", "column": "family_id"}
    chosen: dict[str, dict[str, Any]] = {
        "printed-weights": {"agcl.lexical": {"enabled": True}},
        "weights": {"agcl.lexical": lexical},
        "mask": {"agcl.mask": mask},
        "batches": {"agcl.batch_grouping": batches},
        "all-pieces": {"agcl.lexical": lexical, "agcl.mask": mask, "agcl.batch_grouping": batches},
        "true-weights": {"agcl.lexical": lexical},
        "true-mask": {"agcl.mask": true_mask},
        "true-batches": {"agcl.batch_grouping": true_batches},
        "all-true": {"agcl.lexical": lexical, "agcl.mask": true_mask, "agcl.batch_grouping": true_batches},
    }
    return {**PLAIN_INFONCE, "agcl.batch_grouping": {"fraction": 0.0}, **chosen[key]}
