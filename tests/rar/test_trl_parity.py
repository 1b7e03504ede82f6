"""Losses, gradients and advantages equal those that TRL gave (`jobs/benchmarks/record_trl_golden.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from afmrl_ray.rar.loss import group_advantages, grpo_loss, token_weights

RECORD = json.loads((Path(__file__).parent / "goldens/trl_grpo.json").read_text())
AGGREGATIONS = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant", "cispo": "token"}
GIVEN = {name: torch.tensor(value) for name, value in RECORD["inputs"].items()}


def ours(golden: dict) -> tuple[float, torch.Tensor]:
    logp = GIVEN["logp"].clone().requires_grad_()
    mask, complete = GIVEN["mask"], GIVEN["complete"]
    ended = complete if golden["mask_truncated_completions"] else torch.ones_like(complete)
    weights, denominator = token_weights(
        mask.sum(1) * ended,
        torch.ones_like(complete),
        loss_aggregation=AGGREGATIONS[golden["loss_type"]],
        max_tokens=RECORD["max_tokens"],
    )
    loss, _ = grpo_loss(
        logp,
        GIVEN["old_logp"],
        GIVEN["ref_logp"],
        GIVEN["advantages"],
        mask & ended[:, None],
        epsilon=RECORD["epsilon"],
        epsilon_high=golden["epsilon_high"],
        kl_coef=golden["beta"],
        denominator=denominator,
        weights=weights,
        importance_sampling_level=golden["importance_sampling_level"],
        delta=golden["delta"],
        kl_times_ratio=golden["use_bias_correction_kl"],
    )
    loss.backward()
    return float(loss.detach()), logp.grad


def name(golden: dict) -> str:
    return "-".join(str(value) for key, value in golden.items() if key not in ("loss", "gradient"))


@pytest.mark.parametrize("golden", RECORD["losses"], ids=name)
def test_loss_and_gradient_equal_trl(golden):
    loss, gradient = ours(golden)
    assert loss == pytest.approx(golden["loss"], abs=1e-6)
    assert (gradient - torch.tensor(golden["gradient"])).abs().max() <= 1e-6


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(scale):
    advantages = group_advantages(torch.tensor(RECORD["rewards"]), scale=scale, eps=1e-4)
    torch.testing.assert_close(advantages, torch.tensor(RECORD["advantages"][scale]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("loss_type", {}),
        ("beta", {}),
        ("importance_sampling_level", {}),
        ("epsilon_high", {}),
        ("delta", {}),
        ("use_bias_correction_kl", {"beta": 0.04}),
        ("mask_truncated_completions", {}),
    ],
)
def test_every_setting_changes_the_recorded_gradient(setting, where):
    """A golden that equals its neighbour would prove nothing."""
    chosen = [g for g in RECORD["losses"] if all(g[key] == value for key, value in where.items())]
    by_rest: dict[str, list[dict]] = {}
    for golden in chosen:
        rest = {key: value for key, value in golden.items() if key not in (setting, "loss", "gradient")}
        by_rest.setdefault(json.dumps(rest), []).append(golden)
    for neighbours in by_rest.values():
        if setting == "loss_type":  # bnpo and dapo differ between micro-batches alone
            neighbours = [g for g in neighbours if g["loss_type"] != "bnpo"]
        gradients = {json.dumps(golden["gradient"]) for golden in neighbours}
        assert len(gradients) == len(neighbours)


def updates_name(golden: dict) -> str:
    return "-".join(str(value) for key, value in golden.items() if key != "updates")


@pytest.mark.parametrize("golden", RECORD["updates"], ids=updates_name)
def test_several_updates_on_one_batch_equal_trl(golden):
    """The old log-probabilities stay those of the sampler, so that ratios move and clips act."""
    logp = GIVEN["old_logp"].double()
    mask = GIVEN["mask"]
    weights, denominator = token_weights(
        mask.sum(1),
        torch.ones(len(mask), dtype=torch.bool),
        loss_aggregation=AGGREGATIONS[golden["loss_type"]],
        max_tokens=RECORD["max_tokens"],
    )
    clipped = []
    for expected in golden["updates"]:
        trained = logp.float().requires_grad_()
        loss, stats = grpo_loss(
            trained,
            GIVEN["old_logp"],
            GIVEN["ref_logp"],
            GIVEN["advantages"],
            mask,
            epsilon=RECORD["epsilon"],
            epsilon_high=0.28,
            kl_coef=golden["beta"],
            denominator=denominator,
            weights=weights,
            importance_sampling_level=golden["importance_sampling_level"],
            policy_loss="cispo" if golden["loss_type"] == "cispo" else "clip",
        )
        loss.backward()
        assert float(loss.detach()) == pytest.approx(expected["loss"], abs=1e-6)
        torch.testing.assert_close(trained.grad, torch.tensor(expected["gradient"]), atol=1e-6, rtol=1e-5)
        logp = logp - RECORD["learning_rate"] * torch.tensor(expected["gradient"], dtype=torch.float64)
        clipped.append(float(stats["clip_ratio_high"] + stats["clip_ratio_low"]))
    assert clipped[0] == 0
    assert golden["importance_sampling_level"] == "sequence" or clipped[-1] > 0, "no clip ever acted"
