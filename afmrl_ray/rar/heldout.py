"""Reward of held-out items, which are never trained on, before and after RAR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from afmrl_ray.attributes.text import Attributes, InvalidAttributes
from afmrl_ray.rar.rollout_metrics import mean_pairs, valid_attributes

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean over prompts and its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class HeldOut:
    """Rewards and sizes of held-out completions.

    Attributes:
        rewards: [P] mean reward of each prompt's completions, NaN where all failed.
        invalid_fraction: fraction of completions that the parser rejected.
        mean_pairs: mean attribute pairs of valid completions.
    """

    rewards: list[float]
    invalid_fraction: float
    mean_pairs: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(rewards: np.ndarray, parsed: Sequence[Attributes | InvalidAttributes]) -> HeldOut:
    """Average completions over prompts.

    Args:
        rewards: [P, G], NaN where the reward failed.
        parsed: [P * G] parsed completions.
    """
    known = ~np.isnan(rewards)
    means = np.where(known, rewards, 0.0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
    valid = valid_attributes(parsed)
    return HeldOut(means.tolist(), 1 - len(valid) / len(parsed), mean_pairs(valid))


def compare(before: HeldOut, after: HeldOut, *, seed: int) -> dict[str, Any]:
    """`eval/reward_before`, `_after` and `_gain` (paired by prompt) with intervals, and sizes before and after."""
    first, second = np.array(before.rewards), np.array(after.rewards)
    both = ~(np.isnan(first) | np.isnan(second))
    first, second = first[both], second[both]
    return {
        "eval/reward_before": asdict(_interval(first, seed)),
        "eval/reward_after": asdict(_interval(second, seed)),
        "eval/reward_gain": asdict(_interval(second - first, seed)),
        "eval/prompts": len(first),
        "eval/invalid_fraction_before": before.invalid_fraction,
        "eval/invalid_fraction_after": after.invalid_fraction,
        "eval/attribute_pairs_before": before.mean_pairs,
        "eval/attribute_pairs_after": after.mean_pairs,
    }


def _interval(values: np.ndarray, seed: int) -> Interval:
    draw = np.random.default_rng(seed)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))
