"""Formats in which weights are pushed to vLLM: tensors of a checkpoint, or a PEFT adapter. Nothing here imports vLLM.

An adapter is not merged into its base: a small one would mostly be lost to rounding in 16-bit weights, and the sampler
would stay at the old policy. Unmerged it is also about a hundredth of the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from afmrl_ray.errors import ConfigError
from afmrl_ray.models.adapters import ADAPTER_FILE
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.rar.weights import trained_tensors

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Maximum ranks that vLLM accepts."""


@dataclass(frozen=True)
class Trained:
    """The trained part of the policy.

    Attributes:
        tensors: meta tensors by the policy's names.
        base: checkpoint that holds the other weights.
        lora: PEFT's config of the adapter; none if the weights themselves are trained.
    """

    tensors: dict[str, Tensor]
    base: str
    lora: Any = None

    @classmethod
    def of(cls, spec: PolicySpec) -> Trained:
        """Load the policy and read names, shapes and adapter from it.

        Raises:
            ConfigError: vLLM does not support its adapter.
        """
        policy = spec.load_policy()
        tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in trained_tensors(policy).items()}
        lora = policy.backbone.peft_config["default"] if hasattr(policy.backbone, "peft_config") else None
        if lora is None:
            return cls(tensors, spec.start)
        in_vision = [name for name in tensors if ".visual." in name]
        if in_vision or lora.use_dora or lora.r > _RANKS[-1]:
            wrong = "the vision tower is adapted" if in_vision else "DoRA" if lora.use_dora else f"rank {lora.r}"
            raise ConfigError(f"rar.rollout.engine vllm does not apply such adapters ({wrong}); set it to transformers")
        return cls(tensors, str(lora.base_model_name_or_path), lora)

    def max_rank(self) -> int:
        """vLLM's `max_lora_rank`: the smallest that fits the adapter."""
        return next(rank for rank in _RANKS if rank >= self.lora.r)


def checkpoint_name(name: str) -> str:
    """Name in a checkpoint of a tensor of the policy."""
    return name.removeprefix("backbone.")


def adapter_name(name: str) -> str:
    """Name in a PEFT folder of an adapter's tensor of the policy."""
    return checkpoint_name(name).replace(".default.", ".")


def write_adapter(folder: Path, lora: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write a PEFT folder, which stock `peft` reads too.

    Args:
        lora: PEFT's config.
        tensors: by the policy's names.
    """
    folder.mkdir(parents=True)
    lora.save_pretrained(str(folder))
    save_file({adapter_name(name): tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_FILE)
