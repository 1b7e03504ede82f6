"""The numbers of GRPO: advantages within a group, and the clipped surrogate with a KL term.

Sources: DeepSeekMath (arXiv 2402.03300) for GRPO; Schulman, "Approximating KL divergence" (2020), for k3. Pure
functions: tensors in, tensors out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageScale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]
RatioLevel = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token", "sequence", "constant"]


def group_advantages(
    rewards: Tensor, *, scale: AdvantageScale = "group", eps: float = 1e-4, baseline: Baseline = "mean"
) -> Tensor:
    """Rewards relative to their group.

    Args:
        rewards: [N, G], one row for each group; NaN = the reward could not be computed.
        scale: what the difference from the group's mean is divided by: `group` = the group's unbiased standard
            deviation, `batch` = that of all rewards, `none` = nothing.
        eps: added to the deviation.
        baseline: what is taken off a reward: `mean` = its group's mean, `leave_one_out` = that of the others of its
            group (RLOO).

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
    rewards: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, *, kl_coef: float, kl: KLEstimator
) -> Tensor:
    """Rewards with the KL to the reference taken off (Ziegler et al. 2019; per token as verl has it).

    Args:
        rewards: [B] of completions.
        logp: [B, C] log-probabilities of their tokens under the policy that sampled them.
        ref_logp: [B, C] under the reference.
        mask: [B, C] which tokens count.
        kl_coef: weight of the KL.
        kl: its estimator, see `grpo_loss`.

    Returns:
        [B] `rewards - kl_coef * sum over tokens of KL`, detached.
    """
    gap = torch.where(mask.bool(), ref_logp.detach().float() - logp.detach().float(), 0.0)
    return rewards - kl_coef * _divergence(gap, kl).sum(1)


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
    importance: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate plus a KL term, summed over tokens and divided by the caller's denominator.

    Per token `-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + kl_coef KL` with `r = e^{logp - old_logp}`, in
    float32. With the token count of the whole optimizer step as denominator, the sum over micro-batches is the token
    mean of the step, however it is cut; other means come from `weights`, see `token_weights`.

    Args:
        logp: [B, C] log-probabilities of the completion tokens under the policy, with gradient.
        old_logp: [B, C] under the policy that the ratio is relative to.
        ref_logp: [B, C] under the reference; may be none if `kl_coef` is 0.
        advantages: [B] one for each completion.
        mask: [B, C] bool or 0/1, which tokens count; what the tensors hold elsewhere does not matter.
        epsilon: lower clip of the ratio is `1 - epsilon`.
        epsilon_high: upper clip of the ratio is `1 + epsilon_high`.
        kl_coef: weight of the KL term.
        denominator: of the whole optimizer step.
        weights: [B] of each completion's tokens, the KL's too; none = 1.
        importance_sampling_level: `token`, or `sequence` = one ratio per completion, the geometric mean of its
            tokens' ratios (GSPO, arXiv 2507.18071, as in TRL).
        delta: largest ratio where the clip does not hold, of either sign of the advantage (INTELLECT-2's delta, as
            TRL has it); none = no cap.
        dual_clip: for negative advantages the loss is at most this times `-A` (arXiv 1912.09729, as verl has it);
            none = no bound.
        kl: Schulman's estimator: with `d = ref_logp - logp`, `k1 = -d`, `k2 = d^2 / 2`, `k3 = e^d - d - 1`.
        kl_times_ratio: multiply the KL by the ratio, whose gradient then counts (DeepSeek-V3.2's unbiased estimate).
        importance: [B, C] weights of the surrogate, not of the KL, see `importance_weights`; none = 1.

    Returns:
        The scalar loss and detached scalars: `policy_loss`, `kl`, `epsilon`, `epsilon_high` (tokens at which the clip
        takes the gradient away) and `ratio` are weighted masked sums over `denominator`, to be added up over
        micro-batches like the loss; `ratio_max` is a maximum.

    Raises:
        ValueError: `kl_coef` is not 0 and there is no `ref_logp`.
    """
    if ref_logp is None and kl_coef:
        raise ValueError(f"grpo_loss: kl_coef {kl_coef} needs ref_logp")
    counts = mask.bool()
    share = counts.float() if weights is None else counts * weights.float()[:, None]
    logp = torch.where(counts, logp.float(), 0.0)
    log_ratio = logp - torch.where(counts, old_logp.float(), 0.0)
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(1) / counts.sum(1).clamp(min=1))[:, None].expand_as(logp)
    ratio = log_ratio.exp()
    gain = advantages.float()[:, None]
    free = ratio if delta is None else ratio.clamp(max=delta)
    policy = -torch.minimum(free * gain, ratio.clamp(1 - epsilon, 1 + epsilon_high) * gain)
    if dual_clip is not None:
        policy = torch.where(gain < 0, torch.minimum(policy, -dual_clip * gain), policy)
    if importance is not None:
        policy = policy * torch.where(counts, importance.float(), 0.0)
    policy = policy * share
    loss = policy.sum() / denominator
    divergence = torch.zeros_like(policy)
    if ref_logp is not None:
        divergence = _divergence(torch.where(counts, ref_logp.float(), 0.0) - logp, kl)
        if kl_times_ratio:
            divergence = divergence * ratio
        divergence = divergence * share
        if kl_coef:
            loss = loss + kl_coef * divergence.sum() / denominator
    with torch.no_grad():
        stats = {
            "policy_loss": policy.sum() / denominator,
            "kl": divergence.sum() / denominator,
            "epsilon": (share * ((ratio < 1 - epsilon) & (gain < 0))).sum() / denominator,
            "epsilon_high": (share * ((ratio > 1 + epsilon_high) & (gain > 0))).sum() / denominator,
            "ratio": (share * ratio).sum() / denominator,
            "ratio_max": torch.where(counts, ratio, 0.0).amax(),
        }
    return loss, stats


def _divergence(gap: Tensor, kl: KLEstimator) -> Tensor:
    """[B, C] estimates of the KL from the policy to the reference, `gap` being the log of their ratio."""
    if kl == "k1":
        return -gap
    return gap.square() / 2 if kl == "k2" else gap.exp() - gap - 1


def importance_weights(logp: Tensor, sampler_logp: Tensor, *, cap: float) -> Tensor:
    """[B, C] truncated weights of tokens that another policy sampled: `min(e^{logp - sampler_logp}, cap)`, detached.

    Source: truncated importance sampling (Ionides 2008), as trainers with a lagging sampler use it.

    Args:
        logp: [B, C] under the policy at the beginning of the update.
        sampler_logp: [B, C] under the policy that sampled them.
        cap: largest weight.
    """
    return (logp.detach().float() - sampler_logp.float()).exp().clamp(max=cap)


def token_weights(
    lengths: Tensor, counted: Tensor, *, loss_aggregation: Aggregation, max_tokens: int
) -> tuple[Tensor, float]:
    """Weights of completions and the denominator that make a plain sum over tokens the wanted mean of a whole step.

    `token` = mean over all tokens (DAPO), `sequence` = mean over completions of the mean over their tokens (GRPO as
    first published), `constant` = sum over all tokens by completions times `max_tokens` (Dr. GRPO, arXiv 2503.20783).

    Args:
        lengths: [B] tokens of all completions of the step.
        counted: [B] bool, which completions count at all.
        aggregation: the mean.
        max_tokens: longest completion that sampling allows.

    Returns:
        [B] weights, 0 where a completion does not count, and the denominator.
    """
    weights = counted.float()
    if loss_aggregation == "token":
        return weights, max(1.0, float((lengths * weights).sum()))
    if loss_aggregation == "sequence":
        return weights / lengths.clamp(min=1), max(1.0, float(weights.sum()))
    return weights, max(1.0, float(weights.sum())) * max_tokens
