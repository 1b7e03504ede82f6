"""Greedy evaluations of the policy on held-out prompts during RAR, and which of the policies is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from afmrl_ray.attributes.text import InvalidAttributes
from afmrl_ray.rar.heldout import compare_paired
from afmrl_ray.rar.rollout_batch import RolloutBatch
from afmrl_ray.rar.rollout_metrics import mean_pairs, valid_attributes


@dataclass(frozen=True)
class Evaluation:
    """Greedy completions of the held-out prompts, one per prompt.

    Attributes:
        step: updates that the policy has had.
        rewards: [P] rewards, those of invalid completions included, NaN where scoring failed.
        valid: [P] whether the parser accepted the completion.
        hit_1: hit@1 over all prompts; an invalid completion is no hit.
        mean_pairs: mean attribute pairs of valid completions.
    """

    step: int
    rewards: list[float]
    valid: list[bool]
    hit_1: float
    mean_pairs: float

    @classmethod
    def of(cls, batch: RolloutBatch, step: int) -> Evaluation:
        """From groups of one greedy completion each."""
        valid = [not isinstance(completion, InvalidAttributes) for completion in batch.parsed]
        # The mean over scored queries, which are the valid ones.
        hit = batch.metrics.get("reward/hit_1", 0.0) * float(np.mean(valid))
        return cls(step, batch.rewards[:, 0].tolist(), valid, hit, mean_pairs(valid_attributes(batch.parsed)))

    @property
    def reward(self) -> float:
        """Mean of the known rewards, by which policies are compared."""
        return float(np.nanmean(self.rewards))

    def metrics(self) -> dict[str, float]:
        """`eval/greedy_*` for the log of training steps; `eval/greedy_reward_valid` is left out if none is valid."""
        accepted = np.array(self.rewards)[self.valid]
        of_valid = {"eval/greedy_reward_valid": float(np.nanmean(accepted))} if np.isfinite(accepted).any() else {}
        return {
            "eval/greedy_reward": self.reward,
            **of_valid,
            "eval/greedy_hit": self.hit_1,
            "eval/greedy_invalid_fraction": 1 - float(np.mean(self.valid)),
            "eval/greedy_attribute_pairs": self.mean_pairs,
        }


@dataclass(frozen=True)
class Selection:
    """Evaluations that decide which policy is kept, and when training ends.

    Attributes:
        first: of the initial policy.
        best: the one with the highest mean reward, the earliest of equal ones.
        last: the latest one.
        without_improvement: evaluations since the best one.
    """

    first: Evaluation
    best: Evaluation
    last: Evaluation
    without_improvement: int

    @classmethod
    def start(cls, first: Evaluation) -> Selection:
        """With the evaluation of the initial policy."""
        return cls(first, first, first, 0)

    def add(self, evaluation: Evaluation) -> Selection:
        """With a further evaluation."""
        if evaluation.reward > self.best.reward:
            return Selection(self.first, evaluation, evaluation, 0)
        return Selection(self.first, self.best, evaluation, self.without_improvement + 1)

    def exhausted(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row have brought no improvement; never if it is none."""
        return patience is not None and self.without_improvement >= patience

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Selection:
        """Inverse of `as_dict`."""
        evaluations = {name: Evaluation(**values[name]) for name in ("first", "best", "last")}
        return cls(**evaluations, without_improvement=values["without_improvement"])

    def result(self, kept: Evaluation, *, seed: int) -> dict[str, Any]:
        """Greedy metrics before and after, for the result of the training.

        Returns:
            `eval/greedy_reward_before`, `_after` and `_gain` with intervals, `_before` and `_after` of the other
            `eval/greedy_*`, and `eval/kept_step`, the number of updates of the policy that is kept.
        """
        others = {
            f"{name}_{when}": value
            for when, evaluation in (("before", self.first), ("after", kept))
            for name, value in evaluation.metrics().items()
            if name != "eval/greedy_reward"
        }
        rewards = compare_paired("eval/greedy_reward", self.first.rewards, kept.rewards, seed=seed)
        return {**rewards, **others, "eval/kept_step": kept.step}
