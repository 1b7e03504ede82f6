"""Rollouts of a step together with their rewards; chunks are scored while others are still being sampled.

Only the parser gives `rar.reward.invalid`. What fails for reasons of infrastructure is NaN: not a bad answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from afmrl_ray.attributes.text import Attributes, InvalidAttributes, format_attributes, parse_attributes
from afmrl_ray.rar.messages import PromptGroup
from afmrl_ray.rar.prompts import group_seeds, other_prompts, prompts_of_step
from afmrl_ray.rar.reward_spec import KINDS, Query, Scores


def parse_completions(
    texts: Sequence[tuple[str, bool]], *, max_attributes: int
) -> list[Attributes | InvalidAttributes]:
    """What the strict parser makes of completions (text, whether it ended by itself)."""
    return [parse_attributes(text, max_attributes=max_attributes, complete=complete) for text, complete in texts]


class Rollouts(Protocol):
    """What samples; `rar.rollout.RolloutPool` is one."""

    def stream(
        self, rows: Sequence[int], seeds: Sequence[int], *, group_size: int
    ) -> Iterator[tuple[int, list[PromptGroup]]]: ...


class Scoring(Protocol):
    """Rewards on their way."""

    def result(self) -> Scores: ...


class Rewards(Protocol):
    """What scores; `rar.reward.RewardPool` is one."""

    def submit(self, gallery: str, queries: Sequence[Query]) -> Scoring: ...

    def check(self, rewards: np.ndarray) -> None: ...


@dataclass(frozen=True)
class RolloutBatch:
    """What a step learns from.

    Attributes:
        groups: of the prompts, in order.
        rewards: [groups, G], NaN where scoring failed.
        parsed: what the parser made of each completion, group after group.
        numbers: `seconds_rollout` until the last completion, `seconds_reward` waited beyond it, `resampled_groups`,
            and `reward_<kind>`, the mean of each measure over what was scored.
    """

    groups: list[PromptGroup]
    rewards: np.ndarray
    parsed: list[Attributes | InvalidAttributes]
    numbers: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; what the parser made of the texts is left out, since it makes the same of them again."""
        groups = [
            {**vars(g), "ids": g.ids.tolist(), "mask": g.mask.tolist(), "logp": g.logp.tolist()} for g in self.groups
        ]
        return {"groups": groups, "rewards": self.rewards.tolist(), "numbers": self.numbers}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, max_attributes: int) -> RolloutBatch:
        """What `as_dict` gave."""
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
        return cls(groups, np.array(values["rewards"], dtype=np.float64), parsed, values["numbers"])

    def zero_variance(self) -> np.ndarray:
        """[groups] bool, True where all rewards that are known are equal, so that nothing can be learned."""
        known = ~np.isnan(self.rewards)
        highest = np.where(known, self.rewards, -np.inf).max(1)
        lowest = np.where(known, self.rewards, np.inf).min(1)
        return highest <= lowest


@dataclass(frozen=True)
class RolloutRequest:
    """Which prompts, and how.

    Attributes:
        gallery: that rewards search.
        group_size: completions per prompt.
        max_attributes: that the parser accepts.
        invalid: reward of a completion that the parser refuses.
    """

    gallery: str
    group_size: int
    max_attributes: int
    invalid: float


class Collector:
    """Samples and scores; a function of the weights that the rollout actors hold.

    Args:
        rollouts: the pool that samples.
        rewards: the service that scores.
    """

    def __init__(self, rollouts: Rollouts, rewards: Rewards) -> None:
        self._rollouts, self._rewards = rollouts, rewards

    def collect(self, rows: Sequence[int], seeds: Sequence[int], ask: RolloutRequest) -> RolloutBatch:
        """Sample a group for each row and score every chunk of them as soon as it is there.

        Raises:
            RewardServiceError: more failed than may.
        """
        began = time.monotonic()
        chunks: dict[int, tuple[list[PromptGroup], list[Any], list[int], Scoring | None]] = {}
        for place, groups in self._rollouts.stream(rows, seeds, group_size=ask.group_size):
            parsed = parse_completions([text for g in groups for text in g.texts], max_attributes=ask.max_attributes)
            rows_of = [group.row for group in groups for _ in group.texts]
            valid = [index for index, found in enumerate(parsed) if not isinstance(found, InvalidAttributes)]
            queries = [(rows_of[index], format_attributes(parsed[index])) for index in valid]  # type: ignore[arg-type]
            chunks[place] = groups, parsed, valid, self._rewards.submit(ask.gallery, queries) if queries else None
        sampled = time.monotonic()
        every_group: list[PromptGroup] = []
        every_parsed: list[Any] = []
        rewards: list[np.ndarray] = []
        measures: list[Scores] = []
        for place in sorted(chunks):
            groups, parsed, valid, scoring = chunks[place]
            own = np.full(len(parsed), ask.invalid, dtype=np.float64)
            if scoring is not None:
                scores = scoring.result()
                own[valid] = scores.rewards
                measures.append(scores)
            every_group += groups
            every_parsed += parsed
            rewards.append(own)
        scored = Scores(
            np.concatenate([np.empty(0), *(scores.rewards for scores in measures)]),
            {kind: np.concatenate([np.empty(0), *(s.measures[kind] for s in measures)]) for kind in KINDS},
        )
        self._rewards.check(scored.rewards)
        return RolloutBatch(
            groups=every_group,
            rewards=np.concatenate(rewards).reshape(len(every_group), ask.group_size),
            parsed=every_parsed,
            numbers={
                "seconds_rollout": sampled - began,
                "seconds_reward": time.monotonic() - sampled,
                "resampled_groups": 0.0,
                **scored.means(),
            },
        )

    def collect_step(
        self, rows: np.ndarray, step: int, *, count: int, seed: int, ask: RolloutRequest, dynamic_sampling_rounds: int
    ) -> RolloutBatch:
        """The experience of a training step; prompts whose rewards are all equal make way for others.

        Args:
            rows: [P] all prompts that can be asked.
            step: of the training.
            count: prompts per step.
            seed: of the run.
            dynamic_sampling_rounds: how often such prompts are replaced; those that are left after it stay.
        """
        asked = prompts_of_step(rows, step, count, seed)
        found = self.collect(asked.tolist(), group_seeds(seed, step, count), ask)
        for round_ in range(1, dynamic_sampling_rounds + 1):
            zero_variance = np.flatnonzero(found.zero_variance())
            if not len(zero_variance):
                break
            instead = other_prompts(rows, asked, step, round_, len(zero_variance), seed)
            asked = np.concatenate([asked, instead])
            seeds = group_seeds(seed, step, len(instead), draw=round_)
            found = _replaced(found, zero_variance[: len(instead)], self.collect(instead.tolist(), seeds, ask))
        return found


def _replaced(old: RolloutBatch, places: np.ndarray, new: RolloutBatch) -> RolloutBatch:
    """`old` with the groups at `places` replaced by those of `new`."""
    groups, rewards, size = list(old.groups), old.rewards.copy(), old.rewards.shape[1]
    parsed = list(old.parsed)
    for index, place in enumerate(places.tolist()):
        groups[place], rewards[place] = new.groups[index], new.rewards[index]
        parsed[place * size : (place + 1) * size] = new.parsed[index * size : (index + 1) * size]
    # Means of measures stay those of the first draw, which no choice of ours has touched.
    spent = {name: old.numbers[name] + new.numbers[name] for name in ("seconds_rollout", "seconds_reward")}
    numbers = {**old.numbers, **spent, "resampled_groups": old.numbers["resampled_groups"] + len(places)}
    return RolloutBatch(groups, rewards, parsed, numbers)
