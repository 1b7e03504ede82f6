"""Prompts and seeds of a training step, and the columns of a learner's batch: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.errors import CatalogueError
from afmrl_ray.models.annotate import GeneratorRef
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.prompts import prompt_fits
from afmrl_ray.rar.loss import Aggregation, token_weights
from afmrl_ray.rar.messages import PromptGroup
from afmrl_ray.rar.module import ADVANTAGE, COMPLETION, DENOMINATOR, GROUP, MASK, OLD_LOGP, REWARD, ROW, TOKENS, WEIGHT


@dataclass(frozen=True)
class UsablePrompts:
    """Query items that can be trained or evaluated on.

    Attributes:
        rows: [P] catalogue rows.
        dropped: number of query items that were left out.
    """

    rows: np.ndarray
    dropped: int


def usable_prompts(
    catalogue: StagedCatalogue, generator: GeneratorRef, query: ItemSelector, gallery_rows: np.ndarray
) -> UsablePrompts:
    """Query items that have a positive in the gallery and whose prompt is within `generator.max_prompt_tokens`.

    Raises:
        CatalogueError: there are none.
    """
    processor = ItemProcessor.from_pretrained(generator.path, generator.config.image)
    products = catalogue.column("product_id")
    by_product: dict[str, set[int]] = {}
    for row in gallery_rows.tolist():
        if products[row] is not None:
            by_product.setdefault(products[row], set()).add(row)
    rows = catalogue.rows(query).tolist()
    kept = [
        row
        for row in rows
        if by_product.get(products[row], set()) - {row}
        and prompt_fits(processor, catalogue, row, config=generator.config)
    ]
    if not kept:
        raise CatalogueError(
            f"rar.task: of {len(rows)} queries of split {' or '.join(query.split)} none has a positive in the gallery "
            "and a prompt within generator.max_prompt_tokens"
        )
    return UsablePrompts(np.array(kept), len(rows) - len(kept))


def prompts_of_step(rows: np.ndarray, step: int, count: int, seed: int) -> np.ndarray:
    """[count] catalogue rows of a step's prompts; every epoch is a seeded shuffle of `rows` [P]."""
    places = np.arange(step * count, (step + 1) * count)
    orders = {
        epoch: np.random.default_rng([seed, int(epoch)]).permutation(len(rows))
        for epoch in np.unique(places // len(rows))
    }
    return np.array([rows[orders[place // len(rows)][place % len(rows)]] for place in places])


def other_prompts(rows: np.ndarray, used: np.ndarray, step: int, draw: int, count: int, seed: int) -> np.ndarray:
    """Up to `count` prompts that a step has not used yet, to replace prompts of zero variance.

    Args:
        rows: [P] catalogue rows of all prompts.
        used: rows that the step has used.
        step: training step.
        draw: number of the replacement within the step, from 1.
        count: how many are wanted.
        seed: seed of the run.
    """
    left = rows[~np.isin(rows, used)]
    return np.random.default_rng([seed, step, draw, 11]).permutation(left)[:count]


def group_seeds(seed: int, step: int, count: int, *, draw: int = 0) -> list[int]:
    """[count] sampling seeds of a step's groups, or of its `draw`-th replacements; step -1 = held-out prompts."""
    return np.random.default_rng([seed, step + 1, 7, *([draw] if draw else [])]).integers(2**62, size=count).tolist()


def batch_columns(
    groups: list[PromptGroup],
    advantages: np.ndarray,
    rewards: np.ndarray,
    *,
    loss_aggregation: Aggregation = "token",
    max_tokens: int = 0,
    mask_truncated_completions: bool = False,
    exclude_zero_variance: bool = False,
    minibatches: int = 1,
) -> dict[str, np.ndarray]:
    """Columns of the learners' batch: one row per completion, the completions of a group next to each other.

    Weights and denominator are those of the whole mini-batch, so that the loss is the same sum however it is split
    over learners and micro-batches. Group g belongs to mini-batch g modulo `minibatches`, so that every learner's
    shard has groups of each.

    Args:
        groups: groups of G completions.
        advantages: [groups, G].
        rewards: [groups, G], NaN where the reward failed: such a completion has weight 0, in the KL term too.
        loss_aggregation: see `rar.loss.token_weights`.
        max_tokens: see `rar.loss.token_weights`.
        mask_truncated_completions: give completions without an end-of-text token weight 0; they still count in the
            number of completions.
        exclude_zero_variance: give groups whose known rewards are all equal weight 0; they do not count.
        minibatches: optimizer updates that the batch is split into.
    """
    longest = max(group.ids.shape[1] for group in groups)

    def padded(name: str, kind: type) -> np.ndarray:
        arrays = [getattr(group, name) for group in groups]
        return np.concatenate([np.pad(a, ((0, 0), (0, longest - a.shape[1]))) for a in arrays]).astype(kind)

    mask = padded("mask", np.bool_)
    ended = np.array([complete or not mask_truncated_completions for group in groups for _, complete in group.texts])
    lengths = torch.from_numpy(mask.sum(1) * ended)
    counted = ~np.isnan(rewards)
    if exclude_zero_variance:
        counted &= ~equal_rewards(rewards)[:, None]
    group = np.repeat(np.arange(len(groups)), [len(each.ids) for each in groups])
    weight, denominator, tokens = (np.zeros(len(mask), dtype=np.float32) for _ in range(3))
    for minibatch in range(minibatches):
        own = group % minibatches == minibatch
        weights, total = token_weights(
            lengths[torch.from_numpy(own)],
            torch.from_numpy(counted.reshape(-1)[own]),
            loss_aggregation=loss_aggregation,
            max_tokens=max_tokens,
        )
        weight[own], denominator[own] = weights.numpy() * ended[own], total
        tokens[own] = max(1.0, float((mask.sum(1) * (weight > 0))[own].sum()))
    return {
        ROW: np.repeat([group.row for group in groups], [len(group.ids) for group in groups]),
        GROUP: group,
        COMPLETION: padded("ids", np.int64),
        MASK: mask,
        OLD_LOGP: padded("logp", np.float32),
        ADVANTAGE: advantages.reshape(-1).astype(np.float32),
        REWARD: rewards.reshape(-1).astype(np.float32),
        WEIGHT: weight,
        DENOMINATOR: denominator,
        TOKENS: tokens,
    }


def equal_rewards(rewards: np.ndarray) -> np.ndarray:
    """[groups] whether the known rewards of a group, [groups, G], are all equal; NaN = unknown."""
    known = ~np.isnan(rewards)
    return np.where(known, rewards, -np.inf).max(1) <= np.where(known, rewards, np.inf).min(1)
