"""Rollouts of a RAR with their rewards: the tables that the training wrote, as far as the report shows them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pyarrow.parquet as pq

from afmrl_ray import storage
from afmrl_ray.runs import Stage

_PROMPTS = 6
"""Prompts that are shown per table."""


@dataclass(frozen=True)
class Rollout:
    """A completion; `reward` is None if scoring failed, `invalid` is why the parser rejected it, else empty."""

    text: str
    reward: float | None
    advantage: float
    invalid: str


@dataclass(frozen=True)
class SampledPrompt:
    """The completions of a prompt, highest reward first."""

    step: int
    item_id: str
    rollouts: list[Rollout]


def read_rollouts(stage: Stage | None) -> list[SampledPrompt]:
    """The first prompts of a RAR stage's first and last table; empty if it has none."""
    if stage is None:
        return []
    folder = storage.join(stage.directory, "samples")
    tables = [name for name in storage.list_files(folder) if name.endswith(".parquet")]
    return [prompt for name in dict.fromkeys(tables[:1] + tables[-1:]) for prompt in _read(storage.join(folder, name))]


def _read(path: str) -> list[SampledPrompt]:
    rows = pq.read_table(io.BytesIO(storage.read_bytes(path))).to_pylist()
    groups: dict[tuple[int, str], list[Rollout]] = {}
    for row in rows:
        rollout = Rollout(row["text"], row["reward"], row["advantage"], row["invalid"] or "")
        groups.setdefault((row["step"], row["item_id"]), []).append(rollout)

    def reward(rollout: Rollout) -> float:
        return rollout.reward if rollout.reward is not None else float("-inf")

    return [
        SampledPrompt(step, item_id, sorted(group, key=reward, reverse=True))
        for (step, item_id), group in list(groups.items())[:_PROMPTS]
    ]
