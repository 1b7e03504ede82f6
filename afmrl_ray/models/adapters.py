"""Trainable parameters of a model, and checkpoints of it that stock transformers and peft can read."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from afmrl_ray.config.models import AdapterConfig
from afmrl_ray.errors import CheckpointError, ConfigError
from afmrl_ray.models.backbones import fetch, load_backbone, module_names
from afmrl_ray.models.unwrap import unwrap_model

ADAPTER_FILE = "adapter_model.safetensors"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "added_tokens.json",
)


def make_trainable(model: Any, config: AdapterConfig) -> Any:
    """Freeze the parameters that `config` does not train and return the model, wrapped by PEFT for LoRA.

    An adapter has the dtype of the weights that it adapts: the engine keeps float32 masters, and rollouts, rewards and
    evaluation compute with the same numbers as the training.

    Args:
        model: a model with a vision tower, see `vision_tower`.
        config: what is trained.

    Raises:
        CheckpointError: `targets` matches no module.
    """
    if config.kind == "full":
        model.requires_grad_(True)
        if not config.train_vision:
            vision_tower(model).requires_grad_(False)
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
        use_rslora=config.rslora,
        use_dora=config.dora,
        bias="none",
    )
    try:
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise CheckpointError(f"adapter.targets {config.targets!r} matches no module of the model") from error


def check_targets(path: str, role: str, config: AdapterConfig, *, setting: str) -> None:
    """Check that an adapter would adapt something of a checkpoint.

    Args:
        path: of the checkpoint.
        role: `encoder`, `generator` or `dual_encoder`.
        config: the adapter's settings.
        setting: its name, for the message.

    Raises:
        ConfigError: `targets` matches no module.
    """
    if config.kind != "lora":
        return
    names = module_names(path, role)
    if not any(re.fullmatch(config.targets, name) for name in names):
        example = next((name for name in reversed(names) if name.endswith("_proj")), names[-1])
        raise ConfigError(
            f"{setting}.targets {config.targets!r} matches no module of {path}; it has {example} and others"
        )


def vision_tower(model: Any) -> Any:
    """The vision tower of a Qwen2-VL, a Qwen2.5-VL or a dual encoder."""
    return model.vision_model if hasattr(model, "vision_model") else model.model.visual


def is_adapter(path: str) -> bool:
    """Whether a local folder holds a PEFT adapter rather than a whole model."""
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def save_trained(model: Any, path: str, *, processor: str) -> None:
    """Save an adapter (PEFT layout) or a whole model with tokenizer and image processor, in safetensors.

    Args:
        model: the trained model, PEFT-wrapped or not.
        path: local folder.
        processor: checkpoint whose tokenizer and image processor belong to the model.
    """
    Path(path).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, safe_serialization=True)
    if is_adapter(path):
        config_file = Path(path) / "adapter_config.json"
        config = json.loads(config_file.read_text())
        config["base_model_name_or_path"] = unwrap_model(model).name_or_path
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True))
    copy_processor(fetch(processor), path)


def copy_processor(source: str, target: str) -> None:
    """Copy tokenizer and image processor into a model's folder; those of a hub name are loaded and saved.

    Args:
        source: local checkpoint folder or hub name.
        target: local folder.
    """
    if os.path.isdir(source):
        for name in PROCESSOR_FILES:
            if os.path.isfile(os.path.join(source, name)):
                shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
        return
    from transformers import AutoImageProcessor, AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    AutoImageProcessor.from_pretrained(source, backend="pil").save_pretrained(target)


def load_trained(
    path: str,
    role: str,
    *,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    trainable: bool = False,
) -> Any:
    """Load a whole model, or an adapter on the base that it names, strictly.

    Args:
        path: folder or URI of a model or of an adapter, or a hub name of a model.
        role: `encoder`, `generator` or `dual_encoder`.
        dtype: of the weights.
        device: of the weights.
        trainable: keep the adapter separate and trainable; otherwise it is merged into the weights for speed.

    Raises:
        CheckpointError: a path is missing or of another architecture, or any LoRA tensor is missing or unexpected.
    """
    local = fetch(path)
    if not is_adapter(local):
        return load_backbone(path, role, dtype=dtype, device=device)
    from peft import PeftConfig, PeftModel

    base = str(PeftConfig.from_pretrained(local).base_model_name_or_path)
    backbone = load_backbone(base, role, dtype=dtype, device=device)
    # An adapter is merged in float32; for one that is trained see `make_trainable`.
    model = PeftModel.from_pretrained(backbone, local, is_trainable=trainable, autocast_adapter_dtype=not trainable)
    check_adapter(model, local)
    return model if trainable else model.merge_and_unload()


def load_for_training(path: str, role: str, config: AdapterConfig, *, seed: int, dtype: str = "float32") -> Any:
    """Load the model that a training starts from: an adapter is trained further, a model passes `make_trainable`.

    Args:
        path: folder or URI of a model or of an adapter, or a hub name of a model.
        role: `encoder`, `generator` or `dual_encoder`.
        config: what is trained.
        seed: of a new adapter's initial weights, which PEFT would draw differently in every process.
        dtype: of the weights.

    Raises:
        CheckpointError: see `load_trained`; or `path` is an adapter and `config.kind` is `full`.
    """
    adapter = is_adapter(fetch(path))
    if adapter and config.kind == "full":
        raise CheckpointError(
            f"{path} is an adapter, but adapter.kind is full; use lora, or merge it into its base first"
        )
    model = load_trained(path, role, dtype=dtype, trainable=True)
    if adapter:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_trainable(model, config)


def check_adapter(model: Any, path: str) -> None:
    """Check that a model holds exactly the tensors of an adapter's file.

    Raises:
        CheckpointError: a LoRA tensor is missing, unexpected, or did not reach the model.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(os.path.join(path, ADAPTER_FILE))
    held = get_peft_model_state_dict(model)
    missing, unexpected = sorted(held.keys() - saved.keys()), sorted(saved.keys() - held.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: the adapter does not fit: {len(missing)} tensors missing, {len(unexpected)} unexpected "
            f"(first: {(missing + unexpected)[0]})"
        )
    changed = [name for name, tensor in saved.items() if not torch.equal(held[name].cpu(), tensor.to(held[name].dtype))]
    if changed:
        raise CheckpointError(f"{path}: {len(changed)} adapter tensors did not reach the model (first: {changed[0]})")
