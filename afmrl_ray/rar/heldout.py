"""Reward of held-out items, which are never trained on, before and after RAR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from afmrl_ray.attributes.text import Attributes, InvalidAttributes
from afmrl_ray.rar.rollout_metrics import mean_pairs, valid_attributes
from afmrl_ray.retrieval import bootstrap
from afmrl_ray.retrieval.bootstrap import Value

_RESAMPLES = 2000


@dataclass(frozen=True)
class HeldOut:
    """Rewards and sizes of held-out completions.

    Attributes:
        rewards: [P] mean reward of each prompt's completions, NaN where all failed.
        valid_rewards: [P] mean reward of each prompt's valid completions, NaN where there are none.
        invalid_fraction: fraction of completions that the parser rejected.
        mean_pairs: mean attribute pairs of valid completions.
    """

    rewards: list[float]
    valid_rewards: list[float]
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
    accepted = np.array([not isinstance(completion, InvalidAttributes) for completion in parsed])
    of_valid = np.where(accepted.reshape(rewards.shape), rewards, np.nan)
    valid = valid_attributes(parsed)
    return HeldOut(_means(rewards), _means(of_valid), 1 - len(valid) / len(parsed), mean_pairs(valid))


def _means(rewards: np.ndarray) -> list[float]:
    """Mean of the known values in each row [P, G], NaN where there are none."""
    known = ~np.isnan(rewards)
    found: list[float] = (np.where(known, rewards, 0.0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)).tolist()
    return found


def compare(before: HeldOut, after: HeldOut, *, seed: int) -> dict[str, Any]:
    """`eval/reward` and `eval/reward_valid` as `compare_paired` gives them, and sizes before and after.

    `eval/reward_valid` is over valid completions, so that it leaves out what is gained by keeping the format, and over
    the prompts with valid ones before and after.
    """
    return {
        **compare_paired("eval/reward", before.rewards, after.rewards, seed=seed),
        **compare_paired("eval/reward_valid", before.valid_rewards, after.valid_rewards, seed=seed),
        "eval/prompts": int((~np.isnan(np.array(before.rewards) + after.rewards)).sum()),
        "eval/invalid_fraction_before": before.invalid_fraction,
        "eval/invalid_fraction_after": after.invalid_fraction,
        "eval/attribute_pairs_before": before.mean_pairs,
        "eval/attribute_pairs_after": after.mean_pairs,
    }


def compare_paired(name: str, before: Sequence[float], after: Sequence[float], *, seed: int) -> dict[str, Any]:
    """`<name>_before`, `_after` and `_gain`, paired by prompt, with intervals; empty if no prompt is known in both.

    Args:
        name: of the metric.
        before: [P], NaN where unknown.
        after: the same of the same prompts.
        seed: of the bootstrap.
    """
    first, second = np.array(before), np.array(after)
    both = ~np.isnan(first + second)
    values = {"before": first[both], "after": second[both], "gain": (second - first)[both]}
    return {f"{name}_{key}": asdict(interval(each, seed)) for key, each in values.items()} if both.any() else {}


def interval(values: np.ndarray, seed: int) -> Value:
    """Mean of values [P], P > 0, and its 95 % percentile bootstrap interval over prompts."""
    return bootstrap.interval(values, samples=_RESAMPLES, seed=seed)
