"""GRPO's pure functions: advantages within a group, and the clipped surrogate loss with a KL term.

Sources: DeepSeekMath (arXiv 2402.03300) for GRPO; Schulman, "Approximating KL divergence" (2020), for k1, k2 and k3.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

AdvantageScale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]
RatioLevel = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token", "sequence", "constant"]
PolicyLoss = Literal["clip", "cispo"]
KLSchedule = Literal["constant", "linear", "cosine"]


def group_advantages(
    rewards: Tensor, *, scale: AdvantageScale = "group", eps: float = 1e-4, baseline: Baseline = "mean"
) -> Tensor:
    """Advantages: rewards relative to those of their group.

    Args:
        rewards: [N, G], one row per group; NaN = the reward could not be computed.
        scale: divisor of the centred rewards: `group` = unbiased standard deviation of the group, `batch` = that of
            all rewards, `none` = 1.
        eps: added to the standard deviation.
        baseline: subtracted from a reward: `mean` = mean of its group, `leave_one_out` = mean of the other rewards of
            its group (RLOO).

    Returns:
        [N, G]. NaN rewards are excluded from means and deviations, and their advantage is 0. So are the advantages of
        a group with fewer than two known rewards or with all rewards equal.
    """
    valid = ~rewards.isnan()
    known = torch.where(valid, rewards, 0.0)
    centred = _centred(known, valid)
    if scale == "group":
        deviation = _deviation(centred, valid)
    elif scale == "batch":
        deviation = _deviation(_centred(known.reshape(1, -1), valid.reshape(1, -1)), valid.reshape(1, -1))
    spread = known.masked_fill(~valid, -torch.inf).amax(1) - known.masked_fill(~valid, torch.inf).amin(1)
    # The mean is rounded, so equal rewards would keep tiny differences, which the division would amplify.
    centred = torch.where((spread > 0)[:, None], centred, 0.0)
    if baseline == "leave_one_out":
        # r - (n m - r) / (n - 1) = (r - m) n / (n - 1)
        count = valid.sum(1, keepdim=True)
        centred = centred * count / (count - 1).clamp(min=1)
    return centred if scale == "none" else centred / (deviation + eps)


def _centred(known: Tensor, valid: Tensor) -> Tensor:
    mean = known.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
    return torch.where(valid, known - mean, 0.0)


def _deviation(centred: Tensor, valid: Tensor) -> Tensor:
    return (centred.square().sum(1, keepdim=True) / (valid.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()


def rewards_less_kl(
    rewards: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl: KLEstimator,
    kl_clamp: float | None = None,
) -> Tensor:
    """Rewards minus the KL to the reference (Ziegler et al. 2019; per token as in verl).

    Args:
        rewards: [B] rewards of completions.
        logp: [B, C] log-probabilities of their tokens under the policy that sampled them.
        ref_logp: [B, C] under the reference.
        mask: [B, C] which tokens count.
        kl_coef: coefficient of the KL.
        kl: estimator, see `grpo_loss`.
        kl_clamp: see `grpo_loss`.

    Returns:
        [B] `rewards - kl_coef * sum over tokens of KL`, detached.
    """
    log_ratio = torch.where(mask.bool(), ref_logp.detach().float() - logp.detach().float(), 0.0)
    return rewards - kl_coef * _kl_estimate(log_ratio, kl, kl_clamp).sum(1)


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float,
    epsilon_high: float,
    kl_coef: float,
    denominator: float | Tensor,
    weights: Tensor | None = None,
    importance_sampling_level: RatioLevel = "token",
    delta: float | None = None,
    dual_clip: float | None = None,
    kl: KLEstimator = "k3",
    kl_times_ratio: bool = False,
    kl_clamp: float | None = None,
    importance: Tensor | None = None,
    policy_loss: PolicyLoss = "clip",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate plus a KL term, summed over tokens and divided by the caller's denominator.

    Per token `-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + kl_coef KL` with `r = exp(logp - old_logp)`, in
    float32. With the token count of the whole optimizer step as denominator, micro-batches add up to the token mean of
    the step, however it is cut; other means come from `weights`, see `token_weights`.

    Args:
        logp: [B, C] log-probabilities of the completion tokens under the policy, with gradient.
        old_logp: [B, C] under the policy that the ratio is relative to.
        ref_logp: [B, C] under the reference; may be none if `kl_coef` is 0.
        advantages: [B] one per completion.
        mask: [B, C] bool or 0/1, which tokens count; the values of other tokens are ignored.
        epsilon: the ratio is clipped from below at `1 - epsilon`.
        epsilon_high: the ratio is clipped from above at `1 + epsilon_high`.
        kl_coef: coefficient of the KL term.
        denominator: denominator of the whole optimizer step.
        weights: [B] weight of each completion's tokens, in the KL term too; none = 1.
        importance_sampling_level: `token`, or `sequence` = one ratio per completion, the geometric mean of its
            tokens' ratios (GSPO, arXiv 2507.18071, as in TRL).
        delta: upper bound of the ratio where the clip does not apply (INTELLECT-2's delta, as in TRL); none = no
            bound.
        dual_clip: upper bound of the loss for negative advantages, as a multiple of `-A` (arXiv 1912.09729, as in
            verl); none = no bound.
        kl: Schulman's estimator: with `d = ref_logp - logp`, `k1 = -d`, `k2 = d^2 / 2`, `k3 = e^d - d - 1`.
        kl_times_ratio: multiply the KL by the ratio, with its gradient (DeepSeek-V3.2's unbiased estimate).
        kl_clamp: bound of `|d|` in the estimators, beyond which they have no gradient; none = no bound.
        importance: [B, C] weights of the surrogate, not of the KL, see `importance_weights`; none = 1.
        policy_loss: `clip`, as above; or `cispo` = `-min(r, 1 + epsilon_high) A logp` with no gradient through the
            minimum, so that every token keeps its gradient (arXiv 2506.13585, as in TRL); `epsilon`, `delta` and
            `dual_clip` then do not apply.
        entropy: [B, C] of the policy at each token, with gradient if `entropy_coef` is not 0.
        entropy_coef: `entropy_coef * entropy` is subtracted from the loss per token.

    Returns:
        The scalar loss and detached scalars. `policy_loss`, `kl`, `clip_ratio_low`, `clip_ratio_high` (fractions of
        tokens whose gradient the lower or upper clip removes) and `ratio` are weighted masked sums over
        `denominator`, to be added up over micro-batches like the loss, and so is `entropy`, if given; `ratio_max` is a
        maximum. For `cispo`, clipped tokens are those whose weight the minimum bounds.

    Raises:
        ValueError: `kl_coef` is not 0 and there is no `ref_logp`, or `entropy_coef` is not 0 and there is no `entropy`.
    """
    if ref_logp is None and kl_coef:
        raise ValueError(f"grpo_loss: kl_coef {kl_coef} needs ref_logp")
    if entropy is None and entropy_coef:
        raise ValueError(f"grpo_loss: entropy_coef {entropy_coef} needs entropy")
    counted = mask.bool()
    weight = counted.float() if weights is None else counted * weights.float()[:, None]
    logp = torch.where(counted, logp.float(), 0.0)
    log_ratio = logp - torch.where(counted, old_logp.float(), 0.0)
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(1) / counted.sum(1).clamp(min=1))[:, None].expand_as(logp)
    ratio = log_ratio.exp()
    advantage = advantages.float()[:, None]
    if policy_loss == "cispo":
        policy = -ratio.detach().clamp(max=1 + epsilon_high) * advantage * logp
    else:
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        policy = -torch.minimum(bounded * advantage, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantage)
        if dual_clip is not None:
            policy = torch.where(advantage < 0, torch.minimum(policy, -dual_clip * advantage), policy)
    if importance is not None:
        policy = policy * torch.where(counted, importance.float(), 0.0)
    policy = policy * weight
    loss = policy.sum() / denominator
    divergence = torch.zeros_like(policy)
    if ref_logp is not None:
        divergence = _kl_estimate(torch.where(counted, ref_logp.float(), 0.0) - logp, kl, kl_clamp)
        if kl_times_ratio:
            divergence = divergence * ratio
        divergence = divergence * weight
        if kl_coef:
            loss = loss + kl_coef * divergence.sum() / denominator
    if entropy is not None:
        entropy = torch.where(counted, entropy.float(), 0.0) * weight
        if entropy_coef:
            loss = loss - entropy_coef * entropy.sum() / denominator
    with torch.no_grad():
        low = torch.zeros_like(counted) if policy_loss == "cispo" else (ratio < 1 - epsilon) & (advantage < 0)
        high = ratio > 1 + epsilon_high if policy_loss == "cispo" else (ratio > 1 + epsilon_high) & (advantage > 0)
        stats = {
            "policy_loss": policy.sum() / denominator,
            "kl": divergence.sum() / denominator,
            "clip_ratio_low": (weight * low).sum() / denominator,
            "clip_ratio_high": (weight * high).sum() / denominator,
            "ratio": (weight * ratio).sum() / denominator,
            "ratio_max": torch.where(counted, ratio, 0.0).amax(),
        }
        if entropy is not None:
            stats["entropy"] = entropy.sum() / denominator
    return loss, stats


def _kl_estimate(log_ratio: Tensor, kl: KLEstimator, bound: float | None) -> Tensor:
    """[B, C] estimates of the KL from the policy to the reference; `log_ratio` = reference minus policy."""
    if bound is not None:
        log_ratio = log_ratio.clamp(-bound, bound)
    if kl == "k1":
        return -log_ratio
    return log_ratio.square() / 2 if kl == "k2" else log_ratio.exp() - log_ratio - 1


def importance_weights(logp: Tensor, sampler_logp: Tensor, *, cap: float) -> Tensor:
    """[B, C] truncated importance weights of tokens that another policy sampled, detached.

    `min(exp(logp - sampler_logp), cap)`. Source: truncated importance sampling (Ionides 2008).

    Args:
        logp: [B, C] under the policy at the start of the update.
        sampler_logp: [B, C] under the policy that sampled them.
        cap: largest weight.
    """
    return (logp.detach().float() - sampler_logp.float()).exp().clamp(max=cap)


def token_weights(
    lengths: Tensor, counted: Tensor, *, loss_aggregation: Aggregation, max_tokens: int
) -> tuple[Tensor, float]:
    """Weights and denominator with which a weighted sum over tokens is the wanted mean of a whole step.

    `token` = mean over all tokens (DAPO), `sequence` = mean over completions of the mean over their tokens (GRPO as
    first published), `constant` = sum over tokens / (completions * `max_tokens`) (Dr. GRPO, arXiv 2503.20783).

    Args:
        lengths: [B] tokens of all completions of the step.
        counted: [B] bool, which completions count.
        loss_aggregation: which mean.
        max_tokens: token limit of sampling.

    Returns:
        [B] weights, 0 for completions that do not count, and the denominator.
    """
    weights = counted.float()
    if loss_aggregation == "token":
        return weights, max(1.0, float((lengths * weights).sum()))
    if loss_aggregation == "sequence":
        return weights / lengths.clamp(min=1), max(1.0, float(weights.sum()))
    return weights, max(1.0, float(weights.sum())) * max_tokens


def kl_factor(schedule: KLSchedule, progress: float, *, final: float) -> float:
    """Factor of the KL's coefficient: from 1 to `final` over the training, along a line or half a cosine.

    Args:
        schedule: its shape; `constant` = 1 throughout.
        progress: fraction of the steps that are done, 0 to 1.
        final: factor at the end.
    """
    if schedule == "constant":
        return 1.0
    done = progress if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return 1.0 + (final - 1.0) * done
