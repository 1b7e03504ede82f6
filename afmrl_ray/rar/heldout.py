"""The reward on items that are never trained on, before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from afmrl_ray.attributes.text import InvalidAttributes

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % percentile bootstrap interval over prompts."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class HeldOut:
    """Rewards and sizes of held-out completions.

    Attributes:
        rewards: [P] mean reward of each prompt's completions, NaN where all failed.
        invalid_fraction: share of completions that the parser refused.
        mean_pairs: attribute pairs of the valid ones.
    """

    rewards: list[float]
    invalid_fraction: float
    mean_pairs: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(rewards: np.ndarray, parsed: list[Any], *, group_size: int) -> HeldOut:
    """Fold completions (prompt after prompt) into prompts.

    Args:
        rewards: [P * group_size], NaN where the reward failed.
        parsed: what the parser made of each completion.
    """
    grouped = rewards.reshape(-1, group_size)
    known = ~np.isnan(grouped)
    means = np.where(known, grouped, 0.0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
    valid = [attributes for attributes in parsed if not isinstance(attributes, InvalidAttributes)]
    return HeldOut(
        rewards=means.tolist(),
        invalid_fraction=1 - len(valid) / len(parsed),
        mean_pairs=float(np.mean([len(attributes) for attributes in valid])) if valid else 0.0,
    )


def compare(before: HeldOut, after: HeldOut, *, seed: int) -> dict[str, Any]:
    """Mean reward before and after, and of the difference paired by prompt, each with an interval."""
    first, second = np.array(before.rewards), np.array(after.rewards)
    both = ~(np.isnan(first) | np.isnan(second))
    first, second = first[both], second[both]
    return {
        "heldout_before": asdict(_interval(first, seed)),
        "heldout_after": asdict(_interval(second, seed)),
        "heldout_gain": asdict(_interval(second - first, seed)),
        "heldout_prompts": len(first),
        "heldout_invalid_before": before.invalid_fraction,
        "heldout_invalid_after": after.invalid_fraction,
        "heldout_pairs_before": before.mean_pairs,
        "heldout_pairs_after": after.mean_pairs,
    }


def _interval(values: np.ndarray, seed: int) -> Interval:
    draw = np.random.default_rng(seed)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))
