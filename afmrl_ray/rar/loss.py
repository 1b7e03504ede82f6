"""The numbers of GRPO: advantages within a group, and the clipped surrogate with a k3 KL term.

Sources: DeepSeekMath (arXiv 2402.03300) for GRPO; Schulman, "Approximating KL divergence" (2020), for k3. Pure
functions: tensors in, tensors out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageScale = Literal["group", "batch", "none"]


def group_advantages(rewards: Tensor, *, scale: AdvantageScale = "group", eps: float = 1e-4) -> Tensor:
    """Rewards relative to their group.

    Args:
        rewards: [N, G], one row for each group; NaN = the reward could not be computed.
        scale: what the difference from the group's mean is divided by: `group` = the group's unbiased standard
            deviation, `batch` = that of all rewards, `none` = nothing.
        eps: added to the deviation.

    Returns:
        [N, G]; NaN rewards take no part in means and deviations and get 0, and so does a group that has fewer than two
        rewards or whose rewards are all equal.
    """
    valid = ~rewards.isnan()
    known = torch.where(valid, rewards, 0.0)
    centred = _centred(known, valid)
    if scale == "group":
        deviation = _deviation(centred, valid)
    elif scale == "batch":
        deviation = _deviation(_centred(known.reshape(1, -1), valid.reshape(1, -1)), valid.reshape(1, -1))
    spread = known.masked_fill(~valid, -torch.inf).amax(1) - known.masked_fill(~valid, torch.inf).amin(1)
    # Rounding of the mean would leave equal rewards with tiny differences, which the division blows up.
    centred = torch.where((spread > 0)[:, None], centred, 0.0)
    return centred if scale == "none" else centred / (deviation + eps)


def _centred(known: Tensor, valid: Tensor) -> Tensor:
    mean = known.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
    return torch.where(valid, known - mean, 0.0)


def _deviation(centred: Tensor, valid: Tensor) -> Tensor:
    return (centred.square().sum(1, keepdim=True) / (valid.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    denominator: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate plus k3 KL, summed over tokens and divided by the caller's denominator.

    Per token `-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef (e^d - d - 1)` with `r = e^{logp - old_logp}`
    and `d = ref_logp - logp`, in float32. With the token count of the whole optimizer step as denominator, the sum over
    micro-batches is the token mean of the step, however it is cut.

    Args:
        logp: [B, C] log-probabilities of the completion tokens under the policy, with gradient.
        old_logp: [B, C] under the policy that sampled them.
        ref_logp: [B, C] under the reference; may be none if `kl_coef` is 0.
        advantages: [B] one for each completion.
        mask: [B, C] bool or 0/1, which tokens count; what the tensors hold elsewhere does not matter.
        clip_low: lower clip of the ratio is `1 - clip_low`.
        clip_high: upper clip of the ratio is `1 + clip_high`.
        kl_coef: weight of the KL term.
        denominator: of the whole optimizer step.

    Returns:
        The scalar loss and detached scalars: `policy_loss`, `kl`, `clip_low`, `clip_high` (tokens at which the clip
        takes the gradient away) and `ratio` are masked sums over `denominator`, to be added up over micro-batches like
        the loss; `ratio_max` is a maximum.

    Raises:
        ValueError: `kl_coef` is not 0 and there is no `ref_logp`.
    """
    if ref_logp is None and kl_coef:
        raise ValueError(f"grpo_loss: kl_coef {kl_coef} needs ref_logp")
    counts = mask.bool()
    logp = torch.where(counts, logp.float(), 0.0)
    ratio = (logp - torch.where(counts, old_logp.float(), 0.0)).exp()
    gain = advantages.float()[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = -torch.where(counts, torch.minimum(ratio * gain, clipped * gain), 0.0)
    loss = policy.sum() / denominator
    divergence = torch.zeros_like(policy)
    if ref_logp is not None:
        gap = torch.where(counts, ref_logp.float(), 0.0) - logp
        divergence = gap.exp() - gap - 1
        if kl_coef:
            loss = loss + kl_coef * divergence.sum() / denominator
    with torch.no_grad():
        stats = {
            "policy_loss": policy.sum() / denominator,
            "kl": divergence.sum() / denominator,
            "clip_low": (counts & (ratio < 1 - clip_low) & (gain < 0)).sum() / denominator,
            "clip_high": (counts & (ratio > 1 + clip_high) & (gain > 0)).sum() / denominator,
            "ratio": torch.where(counts, ratio, 0.0).sum() / denominator,
            "ratio_max": torch.where(counts, ratio, 0.0).amax(),
        }
    return loss, stats
