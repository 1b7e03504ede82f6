"""Leverage: how much held-out queries would gain if the generator wrote their true attributes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from afmrl_ray.rar.heldout import interval
from afmrl_ray.rar.rollout_batch import Rewards

log = logging.getLogger(__name__)


def measure_leverage(
    rewards: Rewards,
    gallery: str,
    rows: Sequence[int],
    generated: Sequence[float],
    truth: Mapping[int, str],
    *,
    seed: int,
) -> dict[str, Any]:
    """Mean reward with true attributes on the queries alone, minus that with generated ones, paired by prompt.

    The gallery stays as it is embedded, so this is what RAR could gain at most with the frozen encoder if the reward
    is highest for true attributes. A warning is logged if the interval's lower bound is not above 0.

    Args:
        rewards: the reward service.
        gallery: name of the gallery that is searched.
        rows: [P] catalogue rows of the queries.
        generated: [P] rewards of the generated attributes, NaN where unknown.
        truth: true attribute texts by catalogue row; queries that it lacks do not count.
        seed: of the bootstrap.

    Returns:
        `eval/leverage` with its 95 % interval; empty if no query has true attributes.

    Raises:
        RewardServiceError: too many rewards failed.
    """
    known = [place for place, row in enumerate(rows) if row in truth]
    if not known:
        return {}
    scored = rewards.submit(gallery, [(rows[place], truth[rows[place]]) for place in known]).result().rewards
    rewards.check(scored)
    gains = scored - np.array(generated)[known]
    gains = gains[~np.isnan(gains)]
    if not len(gains):
        return {}
    found = interval(gains, seed)
    summary = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
    log.info(
        "leverage: true attributes on %d held-out queries instead of generated ones: %s reward", len(gains), summary
    )
    if found.low is None or found.low <= 0:
        log.warning(
            "leverage %s is not above 0: true attributes would retrieve no better than the generated ones, so RAR can "
            "hardly gain; first train an encoder that depends more on attributes (agcl.steps, agcl.attribute_dropout), "
            "or set rar.reward.kind=log_softmax",
            summary,
        )
    return {"eval/leverage": asdict(found)}
