"""Rollouts of a step with their rewards; a chunk is scored while later ones are still being sampled.

Only the parser makes a completion invalid. A failure of the infrastructure gives NaN, never a bad reward.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from afmrl_ray.attributes.text import Attributes, InvalidAttributes, format_attributes, parse_attributes
from afmrl_ray.rar.messages import PromptGroup
from afmrl_ray.rar.prompts import equal_rewards, group_seeds, other_prompts, prompts_of_step
from afmrl_ray.rar.reward.spec import METRICS, Query, Scores


def parse_completions(
    texts: Sequence[tuple[str, bool]], *, max_attributes: int
) -> list[Attributes | InvalidAttributes]:
    """Parse completions strictly; each is a text and whether it ended with an end-of-text token."""
    return [parse_attributes(text, max_attributes=max_attributes, complete=complete) for text, complete in texts]


def with_invalid(rewards: np.ndarray, invalid: np.ndarray, *, penalty: float, chance: float | None) -> np.ndarray:
    """Fill in the rewards of completions that the parser rejected.

    Args:
        rewards: [groups, G] rewards of valid completions, NaN where scoring failed.
        invalid: [groups, G] bool, which completions were rejected.
        penalty: `rar.reward.invalid`.
        chance: none = `penalty` is the reward, for metrics of which 0 is the smallest value. Else `penalty` is added to
            the lowest known reward of the group's valid completions, so that no valid one is worse, and to `chance` if
            there are none.

    Returns:
        [groups, G] float64.
    """
    if chance is None:
        return np.where(invalid, penalty, rewards)
    known = ~invalid & ~np.isnan(rewards)
    lowest = np.where(known, rewards, np.inf).min(1)
    return np.where(invalid, np.where(known.any(1), lowest, chance)[:, None] + penalty, rewards)


class Rollouts(Protocol):
    """Samples completions, as `rar.rollout.RolloutPool` does."""

    def stream(
        self, rows: Sequence[int], seeds: Sequence[int] | None, *, group_size: int
    ) -> Iterator[tuple[int, list[PromptGroup]]]: ...


class PendingScores(Protocol):
    """Scores that are being computed, as `concurrent.futures.Future`."""

    def result(self) -> Scores: ...


class Rewards(Protocol):
    """Scores completions, as `rar.reward.client.RewardPool` does."""

    def submit(self, gallery: str, queries: Sequence[Query]) -> PendingScores: ...

    def check(self, rewards: np.ndarray) -> None: ...


@dataclass(frozen=True)
class RolloutBatch:
    """The rollouts of a training step.

    Attributes:
        groups: one group per prompt, in the order of the prompts.
        rewards: [groups, G], NaN where scoring failed.
        parsed: parsed completions, group after group.
        metrics: `time/rollout` until the last completion, `time/reward` from there to the last score (seconds),
            `rollout/resampled_groups`, and `reward/<metric>`, the mean of each retrieval metric over scored queries.
    """

    groups: list[PromptGroup]
    rewards: np.ndarray
    parsed: list[Attributes | InvalidAttributes]
    metrics: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """JSON values; `parsed` is left out, since the texts give it again."""
        groups = [
            {**vars(g), "ids": g.ids.tolist(), "mask": g.mask.tolist(), "logp": g.logp.tolist()} for g in self.groups
        ]
        return {"groups": groups, "rewards": self.rewards.tolist(), "metrics": self.metrics}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, max_attributes: int) -> RolloutBatch:
        """Inverse of `as_dict`."""
        groups = [
            PromptGroup(
                row=group["row"],
                version=group["version"],
                ids=np.array(group["ids"], dtype=np.int64),
                mask=np.array(group["mask"], dtype=bool),
                logp=np.array(group["logp"], dtype=np.float32),
                texts=[(text, complete) for text, complete in group["texts"]],
            )
            for group in values["groups"]
        ]
        parsed = parse_completions([text for g in groups for text in g.texts], max_attributes=max_attributes)
        return cls(groups, np.array(values["rewards"], dtype=np.float64), parsed, values["metrics"])

    def zero_variance_groups(self) -> np.ndarray:
        """[groups] bool: True where all known rewards are equal, so that all advantages are 0."""
        return equal_rewards(self.rewards)


@dataclass(frozen=True)
class RolloutRequest:
    """How prompts are sampled and scored.

    Attributes:
        gallery: name of the gallery that rewards search.
        group_size: completions per prompt.
        max_attributes: most attributes that the parser accepts.
        invalid_reward: `rar.reward.invalid`.
        chance: see `with_invalid`.
    """

    gallery: str
    group_size: int
    max_attributes: int
    invalid_reward: float
    chance: float | None = None


@dataclass(frozen=True)
class _Chunk:
    """Groups of consecutive prompts, with the scores of their valid completions in the making."""

    groups: list[PromptGroup]
    parsed: list[Attributes | InvalidAttributes]
    valid: list[int]
    pending: PendingScores | None


class Collector:
    """Samples and scores; the result is a function of the request and of the weights that the rollout actors hold.

    Args:
        rollouts: pool that samples.
        rewards: service that scores.
    """

    def __init__(self, rollouts: Rollouts, rewards: Rewards) -> None:
        self._rollouts, self._rewards = rollouts, rewards

    def collect(self, rows: Sequence[int], seeds: Sequence[int] | None, request: RolloutRequest) -> RolloutBatch:
        """Sample a group for each row, or decode it greedily without seeds, and score every chunk as soon as it is
        sampled.

        Raises:
            RewardServiceError: too many rewards failed.
        """
        start = time.monotonic()
        stream = self._rollouts.stream(rows, seeds, group_size=request.group_size)
        chunks = {place: self._submit(groups, request) for place, groups in stream}
        sampled = time.monotonic()
        in_order = [chunks[place] for place in sorted(chunks)]
        rewards, invalid, scores = [], [], []
        for chunk in in_order:
            own = np.full(len(chunk.parsed), np.nan)
            rejected = np.ones(len(chunk.parsed), dtype=bool)
            if chunk.pending is not None:
                scores.append(chunk.pending.result())
                own[chunk.valid], rejected[chunk.valid] = scores[-1].rewards, False
            rewards.append(own)
            invalid.append(rejected)
        scored = Scores(
            np.concatenate([np.empty(0), *(each.rewards for each in scores)]),
            {name: np.concatenate([np.empty(0), *(each.metrics[name] for each in scores)]) for name in METRICS},
        )
        self._rewards.check(scored.rewards)
        groups = [group for chunk in in_order for group in chunk.groups]
        shape = len(groups), request.group_size
        return RolloutBatch(
            groups=groups,
            rewards=with_invalid(
                np.concatenate(rewards).reshape(shape),
                np.concatenate(invalid).reshape(shape),
                penalty=request.invalid_reward,
                chance=request.chance,
            ),
            parsed=[completion for chunk in in_order for completion in chunk.parsed],
            metrics={
                "time/rollout": sampled - start,
                "time/reward": time.monotonic() - sampled,
                "rollout/resampled_groups": 0.0,
                **scored.means(),
            },
        )

    def _submit(self, groups: list[PromptGroup], request: RolloutRequest) -> _Chunk:
        parsed = parse_completions([text for g in groups for text in g.texts], max_attributes=request.max_attributes)
        rows = [group.row for group in groups for _ in group.texts]
        queries = {
            index: (rows[index], format_attributes(completion))
            for index, completion in enumerate(parsed)
            if not isinstance(completion, InvalidAttributes)
        }
        pending = self._rewards.submit(request.gallery, list(queries.values())) if queries else None
        return _Chunk(groups, parsed, list(queries), pending)

    def collect_step(
        self,
        rows: np.ndarray,
        step: int,
        *,
        count: int,
        seed: int,
        request: RolloutRequest,
        dynamic_sampling_rounds: int,
    ) -> RolloutBatch:
        """Rollouts of a training step; prompts whose rewards are all equal are replaced by others.

        Args:
            rows: [P] prompts to choose from, catalogue rows.
            step: training step.
            count: prompts per step.
            seed: seed of the run.
            request: how they are sampled and scored.
            dynamic_sampling_rounds: how many times such prompts are replaced; those left afterwards stay.
        """
        used = prompts_of_step(rows, step, count, seed)
        batch = self.collect(used.tolist(), group_seeds(seed, step, count), request)
        for draw in range(1, dynamic_sampling_rounds + 1):
            zero_variance = np.flatnonzero(batch.zero_variance_groups())
            if not len(zero_variance):
                break
            others = other_prompts(rows, used, step, draw, len(zero_variance), seed)
            used = np.concatenate([used, others])
            seeds = group_seeds(seed, step, len(others), draw=draw)
            batch = _replaced(batch, zero_variance[: len(others)], self.collect(others.tolist(), seeds, request))
        return batch


def _replaced(old: RolloutBatch, places: np.ndarray, new: RolloutBatch) -> RolloutBatch:
    """`old` with the groups at `places` replaced by those of `new`."""
    groups, rewards, size = list(old.groups), old.rewards.copy(), old.rewards.shape[1]
    parsed = list(old.parsed)
    for index, place in enumerate(places.tolist()):
        groups[place], rewards[place] = new.groups[index], new.rewards[index]
        parsed[place * size : (place + 1) * size] = new.parsed[index * size : (index + 1) * size]
    # Means of retrieval metrics stay those of the first draw, which selection has not biased.
    added = {name: old.metrics[name] + new.metrics[name] for name in ("time/rollout", "time/reward")}
    resampled = old.metrics["rollout/resampled_groups"] + len(places)
    return RolloutBatch(groups, rewards, parsed, {**old.metrics, **added, "rollout/resampled_groups": resampled})
