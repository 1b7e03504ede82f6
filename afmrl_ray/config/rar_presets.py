"""Published variants of GRPO by name: the settings of RAR in which each differs from the defaults."""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"]

PRESETS: dict[Preset, dict[str, Any]] = {
    # DeepSeekMath, arXiv 2402.03300
    "grpo": {"kl_coef": 0.04, "grpo": {"loss_aggregation": "sequence"}},
    # arXiv 2503.14476. Its penalty of overlong completions has a counterpart already: they are invalid.
    "dapo": {
        "kl_coef": 0.0,
        "epsilon_high": 0.28,
        "dynamic_sampling_rounds": 3,
        "grpo": {"loss_aggregation": "token", "exclude_zero_variance": True},
    },
    # arXiv 2503.20783
    "dr_grpo": {"kl_coef": 0.0, "scale_rewards": "none", "grpo": {"loss_aggregation": "constant"}},
    # arXiv 2507.18071, whose batches of rollouts are split into four mini-batches
    "gspo": {
        "kl_coef": 0.0,
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "updates_per_batch": 4,
        "grpo": {"loss_aggregation": "sequence", "importance_sampling_level": "sequence"},
    },
    # arXiv 2506.13585; the bound is TRL's, the paper states none
    "cispo": {
        "kl_coef": 0.0,
        "epsilon_high": 4.0,
        "grpo": {"loss_aggregation": "token", "policy_loss": "cispo"},
    },
}


def preset_keys(preset: Preset) -> list[str]:
    """Dotted names of the settings, relative to `rar`, that a preset changes."""
    found = []
    for name, value in PRESETS[preset].items():
        found += [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name]
    return found
