"""How pushed weights reach vLLM: as tensors of a checkpoint, or as a PEFT adapter; nothing here imports vLLM.

An adapter stays apart from its base. Added into 16-bit weights it would mostly be rounded away as long as it is small,
and the sampler would stay at the old policy; apart it is also a hundredth of what it changes.
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
"""What vLLM reserves room for."""


@dataclass(frozen=True)
class Trained:
    """What of the policy is trained.

    Attributes:
        tensors: without storage, by the policy's names.
        base: checkpoint that holds the rest.
        lora: PEFT's config of the adapter, none where the weights themselves are trained.
    """

    tensors: dict[str, Tensor]
    base: str
    lora: Any = None

    @classmethod
    def of(cls, spec: PolicySpec) -> Trained:
        """Load the policy and keep only what is needed of it.

        Raises:
            ConfigError: its adapter is one that vLLM does not apply.
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
        """The room for an adapter that vLLM must reserve."""
        return next(rank for rank in _RANKS if rank >= self.lora.r)


def checkpoint_name(name: str) -> str:
    """The policy's name of a tensor as a checkpoint has it."""
    return name.removeprefix("backbone.")


def adapter_name(name: str) -> str:
    """The policy's name of an adapter's tensor as a PEFT folder has it."""
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
