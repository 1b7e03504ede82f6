"""Tables of rollouts with their rewards, as Parquet: what the policy wrote, and what it earned."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from afmrl_ray import storage
from afmrl_ray.attributes.text import InvalidAttributes
from afmrl_ray.rar.rollout_batch import RolloutBatch


def write_samples(folder: str, step: int, batch: RolloutBatch, advantages: np.ndarray, item_ids: list[str]) -> str:
    """Write the rollouts of a step to `<folder>/step_<step>.parquet`, one row per completion; returns the path.

    Columns: `step`, `item_id`, `row` (of the catalogue), `sample` (0 to G - 1), `version` of the weights that sampled
    it, `text`, `tokens`, `ended` (with an end-of-text token), `invalid` (why the parser rejected it, else null),
    `reward` (null = scoring failed), `advantage`, `logp` (mean per token, nats).

    Args:
        folder: of the tables.
        step: training step.
        batch: its rollouts.
        advantages: [groups, G].
        item_ids: of the groups' prompts.

    Raises:
        StorageError: it cannot be written.
    """
    path = storage.join(folder, f"step_{step:07d}.parquet")
    sizes = [len(group.texts) for group in batch.groups]
    lengths = [group.mask.sum(1) for group in batch.groups]
    means = [
        np.where(group.mask, group.logp, 0).sum(1) / np.maximum(count, 1)
        for group, count in zip(batch.groups, lengths, strict=True)
    ]
    rewards = [None if np.isnan(reward) else float(reward) for reward in batch.rewards.reshape(-1)]
    table = pa.table(
        {
            "step": pa.array([step] * sum(sizes), pa.int64()),
            "item_id": pa.array(np.repeat(np.array(item_ids, dtype=object), sizes).tolist(), pa.string()),
            "row": pa.array(np.repeat([group.row for group in batch.groups], sizes), pa.int64()),
            "sample": pa.array([index for size in sizes for index in range(size)], pa.int64()),
            "version": pa.array(np.repeat([group.version for group in batch.groups], sizes), pa.int64()),
            "text": pa.array([text for group in batch.groups for text, _ in group.texts], pa.string()),
            "tokens": pa.array(np.concatenate(lengths), pa.int64()),
            "ended": pa.array([ended for group in batch.groups for _, ended in group.texts], pa.bool_()),
            "invalid": pa.array(
                [each.reason if isinstance(each, InvalidAttributes) else None for each in batch.parsed], pa.string()
            ),
            "reward": pa.array(rewards, pa.float64()),
            "advantage": pa.array(advantages.reshape(-1), pa.float64()),
            "logp": pa.array(np.concatenate(means), pa.float64()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(path, buffer.getvalue())
    return path
