"""Loading of the two backbones from ordinary Hugging Face folders or hub names."""

from __future__ import annotations

import getpass
import os
import tempfile
from typing import Any

import torch

from afmrl_ray import storage
from afmrl_ray.errors import CheckpointError

ARCHITECTURES = {"encoder": "qwen2_vl", "generator": "qwen2_5_vl"}


def fetch(path: str) -> str:
    """A local folder for a path or URI, fetched once per node; a hub name is returned as it is."""
    if "://" not in path:
        return path
    return storage.localise(path, os.path.join(tempfile.gettempdir(), f"afmrl_ray-{getpass.getuser()}", "models"))


def check_checkpoint(path: str, role: str) -> None:
    """Make sure that `path` holds the architecture that `role` needs, by its config alone.

    Raises:
        CheckpointError: the path is missing, is no checkpoint, or is of another architecture.
    """
    from transformers import AutoConfig

    looks_local = os.path.isabs(path) or path.startswith(".") or path.count("/") > 1
    if looks_local and not os.path.isdir(path):
        raise CheckpointError(f"{role}.path: {path} does not exist")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{role}.path: {path} is no checkpoint ({' '.join(str(error).split())[:160]})") from error
    if config.model_type != ARCHITECTURES[role]:
        raise CheckpointError(f"{role}.path: {path} is {config.model_type}, the {role} must be {ARCHITECTURES[role]}")


def load_backbone(path: str, role: str, *, dtype: str = "float32", device: torch.device | str = "cpu") -> Any:
    """Load the `ForConditionalGeneration` model of `role` (encoder: Qwen2-VL, generator: Qwen2.5-VL).

    Raises:
        CheckpointError: see `check_checkpoint`.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

    local = fetch(path)
    check_checkpoint(local, role)
    model_class: Any = Qwen2VLForConditionalGeneration if role == "encoder" else Qwen2_5_VLForConditionalGeneration
    model = model_class.from_pretrained(local, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    # What an adapter will name as its base: where the checkpoint lies for everybody, not this node's copy of it.
    model.name_or_path = path
    return model.to(device)


def inner_model(model: Any) -> Any:
    """The `ForConditionalGeneration` model itself, whether it is wrapped by PEFT or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
