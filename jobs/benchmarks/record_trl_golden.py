"""Write tests/rar/goldens/trl_grpo.json: losses, gradients and advantages as TRL computes them.

Runs where TRL is installed (`make record-trl`); the tests read the file and do not need TRL. Losses are those of TRL's
`GRPOTrainer._compute_loss`, with given log-probabilities in place of a model.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from importlib import metadata
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

FILE = Path(__file__).parents[2] / "tests/rar/goldens/trl_grpo.json"
ROWS, TOKENS, MAX_TOKENS = 6, 5, 8
SETTINGS: dict[str, tuple[Any, ...]] = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo"),
    "beta": (0.0, 0.04),
    "importance_sampling_level": ("token", "sequence"),
    "epsilon_high": (0.2, 0.28),
    "delta": (None, 1.5),
    "use_bias_correction_kl": (False, True),
    "mask_truncated_completions": (False, True),
}
UPDATES, LEARNING_RATE = 4, 4.0
"""Of log-probabilities that are trained themselves; the rate takes some ratios beyond the clips by the last update."""
UPDATE_SETTINGS: dict[str, tuple[Any, ...]] = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "cispo"),
    "importance_sampling_level": ("token", "sequence"),
    "beta": (0.0, 0.04),
}
REWARDS = [[0.0, 1.0, 0.5, 1.0], [0.25, 0.25, 0.25, 0.25], [-0.1, 0.0, 1.0, 0.0]]


def inputs() -> dict[str, Tensor]:
    """Log-probabilities far enough apart to reach every clip, rounded so that the file is short and exact."""
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) * 1000).round() / 1000

    logp = normal(ROWS, TOKENS) - 2
    lengths = torch.tensor([5, 3, 4, 1, 5, 2])
    old_logp = logp + 0.4 * normal(ROWS, TOKENS)
    # Ratios that only the cap and only the upper clip change, of a token and of a whole completion.
    old_logp[3, :1], old_logp[5, :2] = logp[3, :1] - 0.6, logp[5, :2] - 0.22
    return {
        "logp": logp,
        "old_logp": old_logp,
        "ref_logp": logp + 0.5 * normal(ROWS, TOKENS),
        "advantages": torch.tensor([1.25, -0.75, 0.5, -1.5, 0.0, 1.0], dtype=torch.float64),
        "mask": torch.arange(TOKENS) < lengths[:, None],
        "complete": torch.tensor([True, False, True, True, False, True]),
    }


def trl_loss(given: dict[str, Tensor], settings: dict[str, Any]) -> tuple[float, list[list[float]]]:
    """TRL's loss and its gradient with respect to the log-probabilities."""
    logp = given["logp"].float().requires_grad_()
    mask = given["mask"].long()
    if settings["mask_truncated_completions"]:
        # As `_generate_and_score_completions` does before the loss.
        mask = mask * given["complete"][:, None]
    itself = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, **_: x
        ),
        args=SimpleNamespace(
            delta=settings["delta"],
            use_bias_correction_kl=settings["use_bias_correction_kl"],
            steps_per_generation=1,
        ),
        aux_loss_enabled=False,
        beta=settings["beta"],
        current_gradient_accumulation_steps=1,
        epsilon_high=settings["epsilon_high"],
        epsilon_low=0.2,
        importance_sampling_level=settings["importance_sampling_level"],
        loss_type=settings["loss_type"],
        max_completion_length=MAX_TOKENS,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
    )
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    batch = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": given["advantages"].float(),
        "old_per_token_logps": given["old_logp"].float(),
        "ref_per_token_logps": given["ref_logp"].float(),
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(itself, None, batch)
    loss.backward()
    return float(loss), logp.grad.tolist()  # type: ignore[union-attr]


def trl_updates(given: dict[str, Tensor], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses and log-probabilities of several SGD updates on one batch, whose old log-probabilities are kept."""
    logp, found = given["old_logp"].clone(), []
    for _ in range(UPDATES):
        loss, gradient = trl_loss({**given, "logp": logp}, settings)
        found.append({"loss": loss, "gradient": gradient})
        logp = logp - LEARNING_RATE * torch.tensor(gradient, dtype=torch.float64)
    return found


def trl_advantages(scale: str) -> list[list[float]]:
    """Advantages of `REWARDS` as computed by a trainer for the completions of three prompts."""
    from afmrl_ray.models.item_processor import load_processors
    from jobs.benchmarks.tiny import make_generator_bench
    from jobs.benchmarks.trl_side import TRL

    bench = make_generator_bench(image=False, words=8, new_tokens=4)
    rewards = iter([reward for group in REWARDS for reward in group])
    side = TRL(
        bench.checkpoint,
        load_processors(bench.checkpoint, padding_side="left")[0],
        [(None, f"mug {index}") for index in range(len(REWARDS))],
        prompts=len(REWARDS),
        group_size=len(REWARDS[0]),
        new_tokens=4,
        kl_coef=0.0,
        reward=lambda _: next(rewards),
        scale_rewards=scale,
    )
    found: list[list[float]] = []
    score = side.trainer._generate_and_score_completions

    def kept(batch: Any) -> Any:
        scored = score(batch)
        found.append(scored["advantages"].tolist())
        return scored

    side.trainer._generate_and_score_completions = kept
    side.step()
    side.close()
    return [found[0][start : start + len(REWARDS[0])] for start in range(0, len(found[0]), len(REWARDS[0]))]


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    given = inputs()
    losses = []
    for values in product(*SETTINGS.values()):
        settings = dict(zip(SETTINGS, values, strict=True))
        if settings["use_bias_correction_kl"] and not settings["beta"]:
            continue
        loss, gradient = trl_loss(given, settings)
        losses.append({**settings, "loss": loss, "gradient": gradient})
    updates = []
    for values in product(*UPDATE_SETTINGS.values()):
        settings = dict(zip(UPDATE_SETTINGS, values, strict=True))
        if settings["loss_type"] == "cispo" and settings["importance_sampling_level"] == "sequence":
            continue
        # TRL's bound of CISPO is the largest weight, not its distance from 1.
        high = 1.28 if settings["loss_type"] == "cispo" else 0.28
        full = {**settings, "epsilon_high": high, "delta": None}
        full |= {"use_bias_correction_kl": False, "mask_truncated_completions": False}
        updates.append({**settings, "updates": trl_updates(given, full)})
    record = {
        "trl": metadata.version("trl"),
        "epsilon": 0.2,
        "max_tokens": MAX_TOKENS,
        "inputs": {name: value.tolist() for name, value in given.items()},
        "losses": losses,
        "learning_rate": LEARNING_RATE,
        "updates": updates,
        "rewards": REWARDS,
        "advantages": {scale: trl_advantages(scale) for scale in ("group", "batch", "none")},
    }
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(record) + "\n")
    print(f"-> {FILE}: {len(losses)} losses of TRL {record['trl']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
