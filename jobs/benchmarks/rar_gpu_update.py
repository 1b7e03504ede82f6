"""An update of stage 2 at a given shape, with packed groups or plain rows, and the equality of both.

Needs only torch and transformers (peft with LoRA).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from afmrl_ray.models.logprobs import CompletionLogprobs, completion_batch
from afmrl_ray.models.microbatches import cut_by_tokens, cut_shared_prefix
from afmrl_ray.models.model_input import ModelInput, PixelFormat, Visual, mrope_positions
from afmrl_ray.models.shared_prefix import pack, use_shared_prefix
from afmrl_ray.models.unwrap import unwrap_model
from afmrl_ray.models.vision_attention import use_attention_by_length
from afmrl_ray.rar.loss import group_advantages, grpo_loss

IMAGE, START, END, PAD = 5, 6, 7, 0
PATCH, MERGE, CHANNELS, FRAMES = 14, 2, 3, 2
PUBLISHED: dict[str, Any] = {
    "text": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
"""Qwen/Qwen2.5-VL-3B-Instruct's config.json."""
TINY: dict[str, Any] = {
    "text": {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    "vision": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
}
LIMITS = {"float32": (1e-4, 1e-4), "bfloat16": (0.05, 0.1)}
"""Largest mean difference of log-probabilities in nats, and largest relative difference of gradients, by dtype."""
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@dataclass(frozen=True)
class Group:
    """A prompt and its G completions.

    Attributes:
        prompt: an image, then text.
        completions: G arrays of token ids.
        advantages: [G].
    """

    prompt: ModelInput
    completions: list[np.ndarray]
    advantages: Tensor


def make_policy(shape: dict[str, Any], adapter: str, device: torch.device, dtype: torch.dtype) -> CompletionLogprobs:
    """A policy of a published shape with random weights and a frozen vision tower."""
    config = Qwen2_5_VLConfig(
        text_config={**shape["text"], "tie_word_embeddings": True},
        vision_config={**shape["vision"], "patch_size": PATCH, "spatial_merge_size": MERGE},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with device:
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    use_attention_by_length(model)
    model.model.visual.requires_grad_(False)
    if adapter == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # initially zero, which makes the gradient of the other factor zero
                parameter.data.normal_(std=0.02)
    use_shared_prefix(model)
    return CompletionLogprobs(model).train()


def make_groups(
    count: int, size: int, *, pixels: int, prompt_tokens: int, completion: Sequence[int], vocabulary: int
) -> list[Group]:
    """Prompts of `prompt_tokens` tokens with a square image, and completions of a random length in `completion`.

    Raises:
        ValueError: the image alone is longer than the prompt.
    """
    draw = np.random.default_rng(0)
    side = pixels // (PATCH * MERGE) * MERGE
    visual = [START, *[IMAGE] * (side // MERGE) ** 2, END]
    if len(visual) >= prompt_tokens:
        raise ValueError(f"an image of {pixels} px has {len(visual)} tokens; make --prompt-tokens larger")
    colours = PixelFormat(scale=(1 / 64,) * CHANNELS, shift=(-2.0,) * CHANNELS, frames=FRAMES)
    groups = []
    for _ in range(count):
        ids = np.array([*visual, *draw.integers(10, vocabulary, size=prompt_tokens - len(visual))])
        types = (ids == IMAGE).astype(np.int64)
        grid = (1, side, side)
        patches = draw.integers(0, 256, size=(side * side, CHANNELS, PATCH**2), dtype=np.uint8)
        prompt = ModelInput(ids, types, mrope_positions(types, [grid], MERGE), (Visual(grid, patches, colours),))
        lengths = draw.integers(completion[0], completion[1] + 1, size=size)
        rewards = torch.from_numpy(draw.random((1, size)))
        completions = [draw.integers(10, vocabulary, size=n) for n in lengths]
        groups.append(Group(prompt, completions, group_advantages(rewards)[0].float()))
    return groups


class Update:
    """The gradient of a whole update, with packed groups or plain rows, in micro-batches of at most `part_tokens`."""

    def __init__(self, policy: CompletionLogprobs, groups: Sequence[Group], part_tokens: int, *, packed: bool) -> None:
        self._policy, self._packed = policy, packed
        self._device = next(policy.parameters()).device
        self._prompts = [group.prompt for group in groups for _ in group.completions]
        self._completions = [ids for group in groups for ids in group.completions]
        self._advantages = torch.cat([group.advantages for group in groups]).to(self._device)
        lengths = [len(ids) for ids in self._completions]
        prefixes = [len(prompt) for prompt in self._prompts]
        self.tokens, self.all_tokens = sum(lengths), sum(lengths) + sum(prefixes)
        if packed:
            owners = [index for index, group in enumerate(groups) for _ in group.completions]
            self.parts = cut_shared_prefix(owners, prefixes, lengths, part_tokens)
        else:
            cut = cut_by_tokens([p + n for p, n in zip(prefixes, lengths, strict=True)], part_tokens, in_order=True)
            self.parts = [slice(part[0], part[-1] + 1) for part in cut]

    def _inputs(self, part: slice) -> tuple[Any, Tensor]:
        prompts, completions = self._prompts[part], self._completions[part]
        if not self._packed:
            return completion_batch(prompts, completions, PAD, self._device)
        shared = [list(own) for _, own in groupby(range(len(prompts)), key=lambda index: id(prompts[index]))]
        own = [[completions[index] for index in indices] for indices in shared]
        packed = pack([prompts[indices[0]] for indices in shared], own, PAD, self._device)
        return packed, packed.mask

    def backward(self) -> list[Tensor]:
        """Add the update's gradient to the parameters; returns each part's log-probabilities at completion tokens."""
        found = []
        for part in self.parts:
            inputs, mask = self._inputs(part)
            logp = self._policy(inputs, mask)
            # Slightly different log-probabilities of sampler and reference, so that ratio and KL have gradients.
            old, reference = logp.detach() + 0.01, logp.detach() - 0.05
            loss, _ = grpo_loss(
                logp,
                old,
                reference,
                self._advantages[part],
                mask,
                epsilon=0.2,
                epsilon_high=0.2,
                kl_coef=0.04,
                denominator=float(self.tokens),
            )
            loss.backward()
            found.append(logp.detach()[mask])
        return found


def clear_gradients(policy: CompletionLogprobs) -> None:
    """Free the gradients' memory."""
    policy.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def set_checkpointing(policy: CompletionLogprobs, on: bool) -> None:
    """Switch gradient checkpointing on or off."""
    model = unwrap_model(policy.backbone)
    # Methods that older versions of transformers have too: a GPU machine may have one older than the package needs.
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def equality(policy: CompletionLogprobs, groups: Sequence[Group], part_tokens: int, dtype: str) -> dict[str, float]:
    """Differences of packed and plain updates; packed attention is restricted to fused kernels.

    Raises:
        AssertionError: a difference is above its limit (`LIMITS`).
    """
    set_checkpointing(policy, True)
    plain = torch.cat(Update(policy, groups, part_tokens, packed=False).backward())
    expected = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    clear_gradients(policy)
    with sdpa_kernel(FUSED):
        packed = torch.cat(Update(policy, groups, part_tokens, packed=True).backward())
    assert plain.shape == packed.shape, "completion tokens are missing"
    found = {
        "rollout_logprob_diff": float((packed - plain).abs().mean()),
        "gradient_gap": _relative(((p.grad, expected.get(name)) for name, p in policy.named_parameters())),
    }
    clear_gradients(policy)
    for (name, gap), limit in zip(found.items(), LIMITS[dtype], strict=True):
        assert gap <= limit, f"{name} {gap:.2g} in {dtype} is above {limit:g}"
    return found


def _relative(pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> float:
    """Norm of all differences, relative to the norm of all second tensors."""
    apart = total = 0.0
    for first, second in pairs:
        assert (first is None) == (second is None), "only one of both has a gradient"
        if first is not None and second is not None:
            apart += float((first.float() - second.float()).square().sum())
            total += float(second.float().square().sum())
    return (apart / total) ** 0.5
