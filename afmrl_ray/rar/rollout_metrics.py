"""Metrics of the rollouts and rewards of a training step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from afmrl_ray.attributes.quality import NAME_FRACTION, name_fractions
from afmrl_ray.attributes.text import Attributes, InvalidAttributes, format_attributes
from afmrl_ray.rar.rollout_batch import RolloutBatch


def rollout_metrics(batch: RolloutBatch, names: Sequence[str] = ()) -> dict[str, float]:
    """Metrics of a batch of rollouts.

    Args:
        batch: the batch.
        names: attribute names whose fractions are wanted.

    Returns:
        `reward/mean` and `reward/failed_fraction` over completions, `reward/zero_variance_fraction` over groups whose
        rewards are all known, `rollout/invalid_fraction`, means of attribute pairs and words over valid completions,
        `rollout/completion_tokens`, the fractions of names, and the metrics of the batch itself.
    """
    valid = valid_attributes(batch.parsed)
    complete = ~np.isnan(batch.rewards).any(1)
    zero_variance = batch.zero_variance_groups()[complete]
    fractions = name_fractions(valid, names)
    return {
        "reward/mean": float(np.nanmean(batch.rewards)),
        "reward/failed_fraction": float(np.isnan(batch.rewards).mean()),
        "reward/zero_variance_fraction": float(zero_variance.mean()) if complete.any() else 1.0,
        "rollout/invalid_fraction": 1 - len(valid) / len(batch.parsed),
        "rollout/attribute_pairs": mean_pairs(valid),
        "rollout/attribute_words": mean_words(valid),
        "rollout/completion_tokens": float(np.mean([group.mask.sum(1).mean() for group in batch.groups])),
        **{f"{NAME_FRACTION}{name}": fraction for name, fraction in fractions.items()},
        **batch.metrics,
    }


def valid_attributes(parsed: Sequence[Attributes | InvalidAttributes]) -> list[Attributes]:
    """The completions that the parser accepted."""
    return [attributes for attributes in parsed if not isinstance(attributes, InvalidAttributes)]


def mean_pairs(attributes: Sequence[Attributes]) -> float:
    """Mean number of attribute pairs, 0 without any."""
    return float(np.mean([len(each) for each in attributes])) if attributes else 0.0


def mean_words(attributes: Sequence[Attributes]) -> float:
    """Mean number of words of attribute texts, 0 without any."""
    return float(np.mean([len(format_attributes(each).split()) for each in attributes])) if attributes else 0.0
