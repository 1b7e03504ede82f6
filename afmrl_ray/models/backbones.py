"""Backbones from ordinary Hugging Face folders or hub names."""

from __future__ import annotations

import os
from typing import Any

import torch

from afmrl_ray import storage
from afmrl_ray.errors import CheckpointError
from afmrl_ray.models.packaged import resolve_checkpoint
from afmrl_ray.models.vision_attention import use_attention_by_length

ARCHITECTURES = {"encoder": ("qwen2_vl",), "generator": ("qwen2_5_vl",), "dual_encoder": ("clip", "siglip")}
"""Model types that each role accepts; the encoder's role is `dual_encoder` if `encoder.kind` is."""


def fetch(path: str) -> str:
    """A local folder for a path, URI or packaged checkpoint, fetched once per node; a hub name is returned unchanged.

    Raises:
        CheckpointError: nothing is at the URI.
    """
    if "://" not in path:
        return resolve_checkpoint(path)
    if not storage.exists(storage.join(path, "config.json")) and not storage.exists(
        storage.join(path, "adapter_config.json")
    ):
        raise CheckpointError(f"{path} holds no checkpoint")
    return storage.localise(path, storage.user_cache("models"))


def check_checkpoint(path: str, role: str, *, setting: str | None = None) -> None:
    """Check by its config alone that a checkpoint has the architecture that a role needs.

    Args:
        path: folder, URI or hub name.
        role: key of `ARCHITECTURES`.
        setting: named in the message; none = `<role>.path`.

    Raises:
        CheckpointError: the path is missing, is no checkpoint, or is of another architecture.
    """
    from transformers import AutoConfig

    setting = setting or f"{role}.path"
    try:
        path = resolve_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{setting}: {error}") from error
    if "://" in path:
        if base := adapter_base(path):
            check_checkpoint(base, role, setting=f"{setting} (base of the adapter {path})")
            return
        file = storage.join(path, "config.json")
        if not storage.exists(file):
            raise CheckpointError(f"{setting}: {path} holds no checkpoint")
        _check_type(storage.read_json(file).get("model_type"), path, role, setting)
        return
    looks_local = os.path.isabs(path) or path.startswith(".") or path.count("/") > 1
    if looks_local and not os.path.isdir(path):
        raise CheckpointError(f"{setting}: {path} does not exist")
    if base := adapter_base(path):
        check_checkpoint(base, role, setting=f"{setting} (base of the adapter {path})")
        return
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{setting}: {path} is no checkpoint ({' '.join(str(error).split())[:160]})") from error
    _check_type(config.model_type, path, role, setting)


def adapter_base(path: str) -> str | None:
    """The checkpoint that an adapter's folder or URI names as its base; None if it holds no adapter."""
    file = storage.join(path, "adapter_config.json") if "://" in path else os.path.join(path, "adapter_config.json")
    if not (storage.exists(file) if "://" in path else os.path.isfile(file)):
        return None
    return str(storage.read_json(file).get("base_model_name_or_path") or "") or None


def _check_type(model_type: str | None, path: str, role: str, setting: str) -> None:
    wanted = ARCHITECTURES[role]
    if model_type not in wanted:
        hint = (
            "; set encoder.kind=dual_encoder for it"
            if role == "encoder" and model_type in ARCHITECTURES["dual_encoder"]
            else ""
        )
        raise CheckpointError(f"{setting}: {path} is {model_type}, the {role} must be {' or '.join(wanted)}{hint}")


def load_backbone(path: str, role: str, *, dtype: str = "float32", device: torch.device | str = "cpu") -> Any:
    """Load the model of a role: Qwen2-VL (encoder), Qwen2.5-VL (generator), CLIP or SigLIP (dual encoder).

    Raises:
        CheckpointError: see `check_checkpoint`.
    """
    path = resolve_checkpoint(path)
    local = fetch(path)
    check_checkpoint(local, role)
    model = _model_class(local, role).from_pretrained(local, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    if role != "dual_encoder":
        use_attention_by_length(model)
    # Adapters store this as their base: the shared location of the checkpoint, not this node's copy of it.
    model.name_or_path = path
    return model.to(device)


def module_names(path: str, role: str) -> list[str]:
    """Names of all modules of a checkpoint's architecture (of the base, for an adapter), without loading any weight."""
    from transformers import AutoConfig

    local = fetch(adapter_base(fetch(path)) or path)
    with torch.device("meta"):
        model = _model_class(local, role)(AutoConfig.from_pretrained(local))
    return [name for name, _ in model.named_modules() if name]


def _model_class(local: str, role: str) -> Any:
    from transformers import (
        AutoConfig,
        CLIPModel,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLForConditionalGeneration,
        SiglipModel,
    )

    if role == "dual_encoder":
        return CLIPModel if AutoConfig.from_pretrained(local).model_type == "clip" else SiglipModel
    return Qwen2VLForConditionalGeneration if role == "encoder" else Qwen2_5_VLForConditionalGeneration
