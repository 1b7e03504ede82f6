"""Variants of GRPO that TRL does not have, against plain Python; means of a step with any micro-batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afmrl_ray.rar.loss import group_advantages, grpo_loss, importance_weights, kl_factor, token_weights

NAN = float("nan")
CLIPS: dict[str, Any] = {"epsilon": 0.2, "epsilon_high": 0.28}


def batch(seed: int, lengths: list[int]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    logp = -2 * torch.rand(shape, generator=draw, dtype=torch.float64)
    return {
        "logp": logp,
        "old_logp": logp + torch.randn(shape, generator=draw) * 0.4,
        "ref_logp": logp + torch.randn(shape, generator=draw) * 0.4,
        "advantages": torch.randn(len(lengths), generator=draw),
        "mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
    }


def loop(given: dict[str, torch.Tensor], *, kl_coef: float, kl: str, dual_clip: float | None, weight) -> float:
    """The loss, one token at a time."""
    total = 0.0
    for b, c in given["mask"].nonzero().tolist():
        new, old, ref = (given[name][b, c].item() for name in ("logp", "old_logp", "ref_logp"))
        gain, ratio = given["advantages"][b].item(), math.exp(new - old)
        policy = -min(ratio * gain, min(max(ratio, 0.8), 1.28) * gain)
        if dual_clip is not None and gain < 0:
            policy = min(policy, dual_clip * abs(gain))
        policy *= weight(b, c)
        gap = ref - new
        total += policy + kl_coef * {"k1": -gap, "k2": gap**2 / 2, "k3": math.exp(gap) - gap - 1}[kl]
    return total


@pytest.mark.parametrize("dual_clip", [None, 1.1, 3.0])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_dual_clip_and_kl_equal_a_loop_over_tokens(kl, dual_clip):
    given = batch(1, [5, 3, 1, 4, 2, 5])
    expected = loop(given, kl_coef=0.3, kl=kl, dual_clip=dual_clip, weight=lambda b, c: 1.0)
    found, _ = grpo_loss(**given, **CLIPS, kl_coef=0.3, denominator=7, kl=kl, dual_clip=dual_clip)
    assert found.item() == pytest.approx(expected / 7, rel=1e-5)
    if dual_clip == 1.1:
        assert expected < loop(given, kl_coef=0.3, kl=kl, dual_clip=None, weight=lambda b, c: 1.0) - 1e-3


def test_importance_weights_apply_to_the_surrogate_and_not_to_the_kl():
    given = batch(2, [4, 2, 3])
    sampler = given["logp"] + torch.linspace(-2, 1, 12, dtype=torch.float64).reshape(3, 4)
    importance = importance_weights(given["logp"], sampler, cap=2.0)

    def weight(b: int, c: int) -> float:
        return min(math.exp(given["logp"][b, c].item() - sampler[b, c].item()), 2.0)

    expected = loop(given, kl_coef=0.3, kl="k3", dual_clip=None, weight=weight)
    found, _ = grpo_loss(**given, **CLIPS, kl_coef=0.3, denominator=1, importance=importance)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert (importance == 2.0).any()
    assert not importance_weights(given["logp"].requires_grad_(), sampler, cap=2.0).requires_grad


def test_leave_one_out_subtracts_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 0.0, 0.5, NAN], [0.2, 0.2, 0.2, 0.2], [NAN, NAN, 1.0, NAN]])
    found = group_advantages(rewards, scale="none", baseline="leave_one_out")
    expected = [1 - 0.25, 0 - 0.75, 0.5 - 0.5, 0]
    torch.testing.assert_close(found, torch.tensor([expected, [0] * 4, [0] * 4], dtype=torch.float32))


lengths_of = st.lists(st.integers(1, 6), min_size=2, max_size=8)


@given(lengths_of, st.integers(0, 999), st.sampled_from(["token", "sequence", "constant"]), st.integers(1, 7))
def test_no_mean_depends_on_the_microbatches(lengths, seed, loss_aggregation, cut):
    given = batch(seed, lengths)
    counted = torch.rand(len(lengths), generator=torch.Generator().manual_seed(seed)) < 0.8
    weights, denominator = token_weights(
        torch.tensor(lengths), counted, loss_aggregation=loss_aggregation, max_tokens=6
    )
    how: dict[str, Any] = {**CLIPS, "kl_coef": 0.1, "denominator": denominator, "importance_sampling_level": "sequence"}
    whole, _ = grpo_loss(**given, weights=weights, **how)
    parts = [slice(0, cut), slice(cut, None)]
    cut_up = [
        grpo_loss(**{name: value[part] for name, value in given.items()}, weights=weights[part], **how)[0]
        for part in parts
        if len(weights[part])
    ]
    assert sum(cut_up).item() == pytest.approx(whole.item(), rel=1e-4, abs=1e-6)


@given(lengths_of, st.integers(0, 999))
def test_each_aggregation_is_the_mean_of_its_name(lengths, seed):
    given = batch(seed, lengths)
    on_policy = {**given, "old_logp": given["logp"], "ref_logp": None}
    gains, counted = given["advantages"], torch.ones(len(lengths), dtype=torch.bool)
    sizes = torch.tensor(lengths)
    wanted = {
        "token": -(gains * sizes).sum() / sizes.sum(),
        "sequence": -gains.mean(),
        "constant": -(gains * sizes).sum() / (6 * len(lengths)),
    }
    for loss_aggregation, expected in wanted.items():
        weights, denominator = token_weights(sizes, counted, loss_aggregation=loss_aggregation, max_tokens=6)
        found, _ = grpo_loss(**on_policy, weights=weights, **CLIPS, kl_coef=0.0, denominator=denominator)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


@given(lengths_of, st.integers(0, 999), st.floats(-0.5, 0.5))
def test_with_equal_token_ratios_both_levels_agree(lengths, seed, shift):
    given = batch(seed, lengths)
    given["old_logp"] = given["logp"] - shift
    token, sequence = (
        grpo_loss(**given, **CLIPS, kl_coef=0.0, denominator=1, importance_sampling_level=level)[0]
        for level in ("token", "sequence")
    )
    assert token.item() == pytest.approx(sequence.item(), rel=1e-4, abs=1e-6)


def test_cispo_keeps_the_gradient_of_clipped_tokens_with_a_bounded_weight():
    given = batch(1, [5, 3, 1, 4, 2, 5])
    logp = given["logp"].detach().clone().requires_grad_()
    ratio = (logp.detach() - given["old_logp"]).exp()
    counted = given["mask"].bool()
    assert ((ratio > 1.2) & counted).any()
    loss, stats = grpo_loss(**{**given, "logp": logp}, **CLIPS, kl_coef=0.0, denominator=7, policy_loss="cispo")
    loss.backward()
    expected = torch.where(counted, -ratio.clamp(max=1 + CLIPS["epsilon_high"]) * given["advantages"][:, None], 0.0) / 7
    torch.testing.assert_close(logp.grad, expected)
    assert stats["clip_ratio_high"] > 0
    assert stats["clip_ratio_low"] == 0


def test_the_kl_of_a_token_that_ran_away_is_bounded_and_without_gradient():
    logp = torch.tensor([[-60.0, -2.0]], requires_grad=True)
    given: dict[str, Any] = {"logp": logp, "old_logp": logp.detach(), "ref_logp": torch.tensor([[-1.0, -1.0]])}
    none = torch.zeros(1), torch.ones(1, 2)
    how = {**CLIPS, "kl_coef": 1.0, "denominator": 1}
    loss, _ = grpo_loss(**given, advantages=none[0], mask=none[1], **how, kl_clamp=10.0)
    loss.backward()
    near = math.e - 1 - 1
    assert float(loss.detach()) == pytest.approx(math.exp(10) - 11 + near, rel=1e-5)
    assert logp.grad.tolist()[0] == [0.0, pytest.approx(1 - math.e, rel=1e-5)]
    assert grpo_loss(**given, advantages=none[0], mask=none[1], **how)[0].item() > 1e20


def test_the_entropy_is_subtracted_over_the_same_tokens_and_denominator():
    given = batch(1, [5, 3, 1, 4, 2, 5])
    entropy = torch.rand(given["logp"].shape, generator=torch.Generator().manual_seed(3))
    plain, without = grpo_loss(**given, **CLIPS, kl_coef=0.0, denominator=7)
    found, stats = grpo_loss(**given, **CLIPS, kl_coef=0.0, denominator=7, entropy=entropy, entropy_coef=0.5)
    expected = (entropy * given["mask"].bool()).sum() / 7
    assert float(plain - found) == pytest.approx(0.5 * float(expected), rel=1e-4)
    assert float(stats["entropy"]) == pytest.approx(float(expected), rel=1e-5)
    assert "entropy" not in without
    with pytest.raises(ValueError, match="needs entropy"):
        grpo_loss(**given, **CLIPS, kl_coef=0.0, denominator=7, entropy_coef=0.5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1, 1, 1]), ("linear", [1, 0.6, 0.2]), ("cosine", [1, 0.6, 0.2])],
)
def test_the_kl_schedule_goes_from_one_to_its_final_fraction(schedule, expected):
    assert [kl_factor(schedule, progress, final=0.2) for progress in (0, 0.5, 1)] == pytest.approx(expected)
    assert kl_factor("cosine", 0.25, final=0.2) > kl_factor("linear", 0.25, final=0.2)
