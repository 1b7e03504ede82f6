"""Advantages and the GRPO loss against plain Python, one number at a time."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from afmrl_ray.rar.loss import group_advantages, grpo_loss

torch.set_num_threads(1)
NAN = float("nan")
B, C = 6, 5
CLIPS: dict[str, Any] = {"epsilon": 0.2, "epsilon_high": 0.28}


def _rows(rewards: Tensor, scale: str, eps: float) -> list[list[float]]:
    everything = [r for row in rewards.tolist() for r in row if not math.isnan(r)]
    out = []
    for row in rewards.tolist():
        valid = [r for r in row if not math.isnan(r)]
        divisor = 1.0
        if scale != "none":
            over = valid if scale == "group" else everything
            divisor = statistics.stdev(over) + eps if len(over) > 1 else 1.0
        flat = len(set(valid)) < 2
        out.append([0.0 if flat or math.isnan(r) else (r - statistics.fmean(valid)) / divisor for r in row])
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_plain_statistics(scale: str) -> None:
    rewards = torch.tensor(
        [
            [1.0, 0.0, -0.1, 0.5],
            [0.3, NAN, 0.9, NAN],
            [NAN, NAN, 0.7, NAN],
            [NAN] * 4,
            [0.1] * 4,
            [-0.1, NAN, -0.1, -0.1],
        ]
    )
    found = group_advantages(rewards, scale=scale, eps=1e-3)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(_rows(rewards, scale, 1e-3)), rtol=1e-5, atol=1e-6)
    assert not found[2:].any(), "equal rewards must give exactly zero"


def test_equal_rewards_give_exactly_zero_although_their_mean_is_rounded() -> None:
    assert not group_advantages(torch.full((1, 7), 0.1), eps=1e-12).any()


def test_advantages_do_not_depend_on_other_groups() -> None:
    rewards = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(group_advantages(rewards)[1:2], group_advantages(rewards[1:2]))


def _batch() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(5)
    logp = -2 * torch.rand(B, C, generator=draw)
    mask = torch.arange(C)[None] < torch.tensor([5, 3, 1, 4, 0, 2])[:, None]
    return {
        "logp": logp,
        "old_logp": logp + torch.randn(B, C, generator=draw) * 0.4,
        "ref_logp": logp + torch.randn(B, C, generator=draw) * 0.4,
        "advantages": torch.randn(B, generator=draw),
        "mask": mask,
    }


def _reference(batch: dict[str, Tensor], kl_coef: float, denominator: float) -> tuple[float, list[list[float]]]:
    """Loss and its derivative by `logp`, worked out by hand for each token."""
    total, grads = 0.0, [[0.0] * C for _ in range(B)]
    for b in range(B):
        gain = batch["advantages"][b].item()
        for c in range(C):
            if not batch["mask"][b, c]:
                continue
            new, old, ref = (batch[name][b, c].item() for name in ("logp", "old_logp", "ref_logp"))
            ratio = math.exp(new - old)
            bounded = min(max(ratio, 1 - CLIPS["epsilon"]), 1 + CLIPS["epsilon_high"])
            total += -min(ratio * gain, bounded * gain) + kl_coef * (math.exp(ref - new) - (ref - new) - 1)
            through = ratio * gain <= bounded * gain
            grads[b][c] = ((-ratio * gain if through else 0.0) + kl_coef * (1 - math.exp(ref - new))) / denominator
    return total / denominator, grads


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_loss_and_gradient_equal_a_loop_over_tokens(kl_coef: float, kind: torch.dtype) -> None:
    batch = _batch()
    expected, grads = _reference(batch, kl_coef, 15)
    batch["mask"] = batch["mask"].to(kind)
    batch["logp"].requires_grad_()
    loss, _ = grpo_loss(**batch, **CLIPS, kl_coef=kl_coef, denominator=15)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert batch["logp"].grad is not None
    torch.testing.assert_close(batch["logp"].grad, torch.tensor(grads), rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up() -> None:
    batch = _batch()
    whole = batch["logp"].clone().requires_grad_()
    expected, stats = grpo_loss(**{**batch, "logp": whole}, **CLIPS, kl_coef=0.1, denominator=15)
    expected.backward()
    cut = batch["logp"].clone().requires_grad_()
    total, summed = 0.0, dict.fromkeys(stats, 0.0)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {name: value[rows] for name, value in {**batch, "logp": cut}.items()}
        loss, found = grpo_loss(**part, **CLIPS, kl_coef=0.1, denominator=torch.tensor(15))
        loss.backward()
        total += loss.item()
        summed = {name: summed[name] + value.item() for name, value in found.items()}
    assert total == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(cut.grad, whole.grad)
    for name in stats.keys() - {"ratio_max"}:
        assert summed[name] == pytest.approx(stats[name].item(), abs=1e-6)


def test_on_policy_gradient_is_reinforce() -> None:
    batch = _batch()
    ours, plain = (batch["logp"].clone().requires_grad_() for _ in range(2))
    on_policy = {**batch, "logp": ours, "old_logp": batch["logp"], "ref_logp": None}
    grpo_loss(**on_policy, **CLIPS, kl_coef=0.0, denominator=15)[0].backward()
    (-(plain * batch["advantages"][:, None] * batch["mask"]).sum() / 15).backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_kl_pulls_towards_the_reference() -> None:
    logp = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    ref = torch.tensor([[-0.5, -1.0, -2.0]])
    none = torch.zeros(1)
    loss, stats = grpo_loss(logp, logp.detach(), ref, none, torch.ones(1, 3), **CLIPS, kl_coef=1.0, denominator=3)
    loss.backward()
    assert logp.grad is not None
    assert logp.grad.sign().tolist() == [[-1.0, 0.0, 1.0]], "descent raises the tokens that the reference prefers"
    assert stats["kl"].item() == pytest.approx(loss.item())


def test_values_of_masked_tokens_are_ignored() -> None:
    batch = _batch()
    clean, _ = grpo_loss(**batch, **CLIPS, kl_coef=0.1, denominator=15)
    dirty = {name: batch[name].clone() for name in ("logp", "old_logp", "ref_logp")}
    dirty["logp"][~batch["mask"]] = -torch.inf
    dirty["old_logp"][~batch["mask"]] = NAN
    dirty["ref_logp"][~batch["mask"]] = torch.inf
    dirty["logp"].requires_grad_()
    loss, stats = grpo_loss(**{**batch, **dirty}, **CLIPS, kl_coef=0.1, denominator=15)
    loss.backward()
    assert torch.equal(loss, clean)
    assert dirty["logp"].grad is not None
    assert dirty["logp"].grad.isfinite().all()
    assert all(value.isfinite() and not value.requires_grad for value in stats.values())


def test_clip_ratios_count_the_tokens_whose_gradient_is_clipped() -> None:
    ratios = torch.tensor([[2.0, 0.5, 1.0, 9.0], [2.0, 0.5, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    logp = ratios.log().requires_grad_()
    loss, stats = grpo_loss(
        logp, torch.zeros(2, 4), None, torch.tensor([1.0, -1.0]), mask, **CLIPS, kl_coef=0.0, denominator=7
    )
    loss.backward()
    assert logp.grad is not None
    assert (logp.grad == 0).tolist() == [[True, False, False, True], [False, True, False, False]]
    assert stats["clip_ratio_high"].item() == pytest.approx(1 / 7)
    assert stats["clip_ratio_low"].item() == pytest.approx(1 / 7)
    assert stats["ratio"].item() == pytest.approx((3.5 + 4.5) / 7)
    assert stats["ratio_max"].item() == pytest.approx(2.0)


def test_kl_without_a_reference_is_refused() -> None:
    batch = {**_batch(), "ref_logp": None}
    with pytest.raises(ValueError, match="ref_logp"):
        grpo_loss(**batch, **CLIPS, kl_coef=0.1, denominator=1)
