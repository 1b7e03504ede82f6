"""The loss of a micro-batch from the settings, its columns and the policy's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from afmrl_ray.config.rar import RARConfig
from afmrl_ray.rar.loss import grpo_loss, importance_weights
from afmrl_ray.rar.module import (
    ADVANTAGE,
    DENOMINATOR,
    ENTROPY,
    LEARNER_LOGP,
    LOGP,
    MASK,
    OLD_LOGP,
    REF_LOGP,
    TOKENS,
    WEIGHT,
)  # fmt: skip


def microbatch_loss(
    rar: RARConfig, batch: dict[str, Tensor], outputs: dict[str, Tensor], *, kl_coef: float, entropy_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of a micro-batch: sums over its tokens, over denominators of the whole mini-batch.

    Args:
        rar: settings.
        batch: columns of B completions.
        outputs: outputs of the policy module for them.
        kl_coef: coefficient of the KL in the loss, as scheduled.
        entropy_coef: coefficient of the entropy.
    """
    counted = batch[MASK].bool() & (batch[WEIGHT] > 0)[:, None]
    logp, sampler_logp = outputs[LOGP], batch[OLD_LOGP]
    # Before the first update of a batch the learner's old log-probabilities are the present ones.
    old_logp = batch.get(LEARNER_LOGP, logp.detach()) if rar.old_is_learner else sampler_logp
    importance = importance_weights(old_logp, sampler_logp, cap=rar.tis_cap) if rar.old_is_learner else None
    loss, stats = grpo_loss(
        logp,
        old_logp,
        outputs.get(REF_LOGP),
        batch[ADVANTAGE],
        counted,
        epsilon=rar.epsilon,
        epsilon_high=rar.epsilon_high,
        kl_coef=kl_coef,
        denominator=batch[DENOMINATOR][0],
        weights=batch[WEIGHT],
        importance_sampling_level=rar.grpo.importance_sampling_level,
        delta=rar.grpo.delta,
        dual_clip=rar.grpo.dual_clip,
        kl=rar.grpo.kl,
        kl_times_ratio=rar.grpo.kl_times_ratio,
        kl_clamp=rar.grpo.kl_clamp,
        importance=importance,
        policy_loss=rar.grpo.policy_loss,
        entropy=outputs.get(ENTROPY),
        entropy_coef=entropy_coef,
    )

    def mean(values: Tensor) -> Tensor:
        return torch.where(counted, values, 0.0).sum() / batch[TOKENS][0]

    stats |= {"loss": loss.detach(), "rollout_logprob_diff": mean((logp.detach() - sampler_logp).abs())}
    if importance is not None:
        capped = (importance >= rar.tis_cap).float()
        stats |= {"tis_weight": mean(importance), "tis_capped_fraction": mean(capped)}
    return loss, stats
