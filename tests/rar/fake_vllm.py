"""A stand-in for the parts of vLLM that `rar.vllm_engine` calls, driven by stock transformers.

It expands placeholders, forces the tokens that a test scripted for each seed, ends them as vLLM does, and computes
their log-probabilities from a plain forward pass by the sampling parameters alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

SCRIPT: dict[int, list[int]] = {}
"""Tokens of the completion with a seed."""


@dataclass
class SamplingParams:
    seed: int | None
    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logit_bias: dict[int, float]
    logprobs: int
    detokenize: bool


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Worker:
    """vLLM's worker; `worker_extension_cls` is mixed in."""

    model: Any

    def get_model(self) -> Any:
        return SimpleNamespace(load_weights=self._load_weights)

    def _load_weights(self, weights: Any) -> set[str]:
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            return {name for name, tensor in weights if own[name].copy_(tensor) is not None}


@dataclass
class LLMEngine:
    base: Any
    adapted: dict[int, Any] = field(default_factory=dict)
    encoder_resets: int = 0

    def add_lora(self, request: LoRARequest) -> bool:
        from peft import PeftModel

        from afmrl_ray.models.backbones import load_backbone

        fresh = load_backbone(self.base.name_or_path, "generator")
        adapted = PeftModel.from_pretrained(fresh, request.lora_path)
        self.adapted = {request.lora_int_id: adapted.get_base_model().eval()}
        return True

    def list_loras(self) -> set[int]:
        return set(self.adapted)

    def reset_encoder_cache(self) -> None:
        self.encoder_resets += 1


class LLM:
    def __init__(self, model: str, **options: Any) -> None:
        from transformers import AutoImageProcessor

        from afmrl_ray.models.backbones import load_backbone

        self.options = options
        self._base = load_backbone(model, "generator", dtype=options["dtype"]).eval()
        self._images = AutoImageProcessor.from_pretrained(model, backend="pil")
        self.llm_engine = LLMEngine(self._base)
        self.prefix_resets = 0
        self.resets = True

    def reset_prefix_cache(self) -> bool:
        self.prefix_resets += 1
        return self.resets

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        module, name = self.options["worker_extension_cls"].rsplit(".", 1)
        extension = getattr(__import__(module, fromlist=[name]), name)
        worker = type("Extended", (Worker, extension), {})(self._base)
        return [getattr(worker, method)(*args)]

    def generate(
        self,
        prompts: list[dict[str, Any]],
        sampling_params: list[SamplingParams],
        *,
        lora_request: LoRARequest | None,
        use_tqdm: bool,
    ) -> list[Any]:
        assert not use_tqdm
        model = self.llm_engine.adapted[lora_request.lora_int_id] if lora_request else self._base
        return [self._one(model, *pair) for pair in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def _one(self, model: Any, prompt: dict[str, Any], params: SamplingParams) -> Any:
        assert params.ignore_eos
        assert not params.detokenize
        ids, images = self._expanded(prompt)

        def next_logits(tokens: list[int]) -> torch.Tensor:
            """[len(tokens) + 1, V] logits of each token and of the one that follows."""
            full = torch.tensor([[*ids, *tokens]])
            types = (full == model.config.image_token_id).long()
            logits = model(input_ids=full, mm_token_type_ids=types, **images).logits[0, len(ids) - 1 :].float()
            for token, bias in params.logit_bias.items():
                logits[:, token] += bias
            return logits

        tokens, reason = [], "length"
        script = None if params.temperature == 0 else SCRIPT[params.seed]
        for place in range(params.max_tokens if script is None else min(params.max_tokens, len(script))):
            tokens.append(int(next_logits(tokens)[-1].argmax()) if script is None else script[place])
            if tokens[-1] in params.stop_token_ids:
                reason = "stop"
                break
        logp = torch.log_softmax(next_logits(tokens)[:-1] / (params.temperature or 1), -1)
        steps = [{token: SimpleNamespace(logprob=float(row[token]))} for token, row in zip(tokens, logp, strict=True)]
        completion = SimpleNamespace(token_ids=tokens, logprobs=steps, finish_reason=reason)
        return SimpleNamespace(prompt_token_ids=ids, outputs=[completion])

    def _expanded(self, prompt: dict[str, Any]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Token ids with every placeholder repeated, and what the model takes of the images."""
        ids: list[int] = prompt["prompt_token_ids"]
        images: list[Image.Image] = prompt.get("multi_modal_data", {}).get("image", [])
        if not images:
            return ids, {}
        budget = self.options["mm_processor_kwargs"]
        size = {"shortest_edge": budget["min_pixels"], "longest_edge": budget["max_pixels"]}
        found = self._images(images=images, size=size, return_tensors="pt")
        counts = iter(np.prod(found["image_grid_thw"].numpy(), axis=1) // self._images.merge_size**2)
        image = self._base.config.image_token_id
        return [token for one in ids for token in [one] * (next(counts) if one == image else 1)], dict(found)


def modules() -> dict[str, ModuleType]:
    """What to put into `sys.modules`."""
    made = {}
    for name, content in (
        ("vllm", {"LLM": LLM, "SamplingParams": SamplingParams}),
        ("vllm.lora", {}),
        ("vllm.lora.request", {"LoRARequest": LoRARequest}),
    ):
        module = module_from_spec(ModuleSpec(name, None, is_package=name != "vllm.lora.request"))
        vars(module).update(content)
        made[name] = module
    assert "vllm" not in sys.modules, "the real one is imported"
    return made
