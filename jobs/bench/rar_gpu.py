"""Stage 2's update at a real size: a group's prompt computed once against a row for every completion.

Qwen2.5-VL-3B's shape, random weights. Needs torch and transformers alone (peft with `--adapter lora`), so that it runs
on a machine without Ray. Equality comes first: log-probabilities and gradients of both ways at a tiny shape in float32,
then of one group at the shape and in the type that are timed. Then tokens per second and peak memory of both, with and
without gradient checkpointing, each in micro-batches of as many tokens as a learner's; a way that runs out of memory is
told so in its line. All tokens are those of rows of their own, whichever way they were computed. The
optimizer is AdamW on the weights as they are: no float32 masters in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gpu import device_name, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from afmrl_ray.models.logprobs import CompletionLogprobs, completion_batch
from afmrl_ray.models.microbatches import cut_by_tokens, cut_shared_prefix
from afmrl_ray.models.model_input import ModelInput, PixelFormat, Visual, mrope_positions
from afmrl_ray.models.shared_prefix import pack, use_shared_prefix
from afmrl_ray.models.unwrap import unwrap_model
from afmrl_ray.models.vision_attention import use_attention_by_length
from afmrl_ray.rar.loss import group_advantages, grpo_loss

OUT = Path("runs/bench/rar_gpu.json")
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
"""Mean gap of log-probabilities in nats, and relative gap of gradients, up to which both ways count as equal."""
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@dataclass(frozen=True)
class PromptGroup:
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
    """Random weights of a published shape; the vision tower is frozen, as stage 2 has it by default."""
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
            if "lora_B" in name:  # zero at first, which would hide the gradient of the other factor
                parameter.data.normal_(std=0.02)
    use_shared_prefix(model)
    return CompletionLogprobs(model).train()


def make_groups(
    count: int, size: int, *, pixels: int, prompt_tokens: int, completion: Sequence[int], vocabulary: int
) -> list[PromptGroup]:
    """Prompts of `prompt_tokens`, a square image of `pixels` among them, and completions of a length in `completion`.

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
        groups.append(PromptGroup(prompt, completions, group_advantages(rewards)[0].float()))
    return groups


class Update:
    """The gradient of a whole update, `packed` or in plain rows, in parts of `part_tokens` as a learner cuts them."""

    def __init__(
        self, policy: CompletionLogprobs, groups: Sequence[PromptGroup], part_tokens: int, *, packed: bool
    ) -> None:
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
        """Add the update's gradient to the parameters'; returns each part's log-probabilities at completion tokens."""
        found = []
        for part in self.parts:
            inputs, mask = self._inputs(part)
            logp = self._policy(inputs, mask)
            # Of a sampler a little off and a reference a little further: ratio and KL have gradients to give.
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


def forget_gradients(policy: CompletionLogprobs) -> None:
    policy.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def set_checkpointing(policy: CompletionLogprobs, on: bool) -> None:
    model = unwrap_model(policy.backbone)
    # By the names that transformers before 5.23 has too: a machine with a GPU may have an older one than the package.
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def equality(
    policy: CompletionLogprobs, groups: Sequence[PromptGroup], part_tokens: int, dtype: str
) -> dict[str, float]:
    """How far the packed way is from the plain one; the packed one may use no kernel that holds a dense mask's weights.

    Raises:
        AssertionError: farther than `LIMITS`.
    """
    set_checkpointing(policy, True)
    plain = torch.cat(Update(policy, groups, part_tokens, packed=False).backward())
    expected = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    forget_gradients(policy)
    with sdpa_kernel(FUSED):
        packed = torch.cat(Update(policy, groups, part_tokens, packed=True).backward())
    assert plain.shape == packed.shape, "completion tokens are missing"
    found = {
        "rollout_logprob_diff": float((packed - plain).abs().mean()),
        "gradient_gap": _relative(((p.grad, expected.get(name)) for name, p in policy.named_parameters())),
    }
    forget_gradients(policy)
    for (name, gap), limit in zip(found.items(), LIMITS[dtype], strict=True):
        assert gap <= limit, f"{name} {gap:.2g} in {dtype} is above {limit:g}"
    return found


def _relative(pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> float:
    """Norm of all differences over the norm of all second ones."""
    apart = total = 0.0
    for first, second in pairs:
        assert (first is None) == (second is None), "one way gives no gradient where the other does"
        if first is not None and second is not None:
            apart += float((first.float() - second.float()).square().sum())
            total += float(second.float().square().sum())
    return (apart / total) ** 0.5


def measure(step: Any, policy: CompletionLogprobs, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds and, on a GPU, peak memory of a step; `seconds` is none where the memory did not suffice."""
    forget_gradients(policy)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds: list[float] | None = timed(step, device, repeats)
    except torch.OutOfMemoryError:
        seconds = None
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    forget_gradients(policy)
    median = statistics.median(seconds) if seconds else None
    return {"seconds": seconds, "median": median, "peak_memory_gib": peak, "out_of_memory": seconds is None}


def line(row: dict[str, Any]) -> str:
    """A measurement for people."""
    kept = "checkpointing" if row["checkpointing"] else "no checkpointing"
    head = f"{row['way']:<7}G {row['group_size']:<3} {kept:<17} {row['parts']:>2} parts "
    memory = f", {row['peak_memory_gib']:.1f} GiB" if row["peak_memory_gib"] else ""
    if row["out_of_memory"]:
        return f"{head} out of memory"
    spread = f"{min(row['seconds']):.3f} to {max(row['seconds']):.3f} s of {len(row['seconds'])}"
    faster = f", {row['times_plain']:.2f} times plain" if row["times_plain"] else ""
    rates = f"{row['tokens_per_second']:>9.1f} completion, {row['all_tokens_per_second']:>9.1f} all tokens/s"
    return f"{head} {rates}, {row['median']:.3f} s ({spread}){memory}{faster}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(LIMITS), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that it runs")
    parser.add_argument("--adapter", choices=("full", "lora"), default="full", help="what is trained")
    parser.add_argument("--prompts", type=int, default=4, help="groups of an update")
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 16], help="completions of a group")
    parser.add_argument("--pixels", type=int, default=448, help="side of a prompt's image")
    parser.add_argument("--prompt-tokens", type=int, default=400, help="tokens of a prompt, image and text")
    parser.add_argument("--completion", type=int, nargs=2, default=(48, 80), help="tokens of a completion")
    parser.add_argument("--part-tokens", type=int, default=16_384, help="tokens of a micro-batch")
    parser.add_argument("--checkpointing", choices=("both", "on", "off"), default="both")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    shape, device = TINY if options.tiny else PUBLISHED, torch.device(options.device)

    tiny = make_policy(TINY, options.adapter, device, torch.float32)
    small = make_groups(3, 4, pixels=84, prompt_tokens=30, completion=(1, 9), vocabulary=TINY["text"]["vocab_size"])
    equal = {"tiny, float32": equality(tiny, small, 200, "float32")}
    policy = make_policy(shape, options.adapter, device, getattr(torch, options.dtype))
    sizes = {
        "pixels": options.pixels,
        "prompt_tokens": options.prompt_tokens,
        "completion": options.completion,
        "vocabulary": shape["text"]["vocab_size"],
    }
    one = make_groups(1, options.groups[0], **sizes)
    equal[f"as timed, {options.dtype}"] = equality(policy, one, options.part_tokens, options.dtype)

    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.0, fused=True)
    kinds = {"both": (True, False), "on": (True,), "off": (False,)}[options.checkpointing]
    found = []
    for size, checkpointing in tqdm([(size, kind) for size in options.groups for kind in kinds], desc="sizes"):
        groups = make_groups(options.prompts, size, **sizes)
        set_checkpointing(policy, checkpointing)
        rows = []
        for way in ("plain", "packed"):
            update = Update(policy, groups, options.part_tokens, packed=way == "packed")

            def step(update: Update = update) -> None:
                update.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)

            row = {"way": way, "group_size": size, "checkpointing": checkpointing, "parts": len(update.parts)}
            row |= {"completion_tokens": update.tokens, "all_tokens": update.all_tokens}
            row |= measure(step, policy, device, options.repeats)
            row["tokens_per_second"] = update.tokens / row["median"] if row["median"] else None
            row["all_tokens_per_second"] = update.all_tokens / row["median"] if row["median"] else None
            rows.append(row)
        plain, packed = rows
        both = plain["median"] and packed["median"]
        plain["times_plain"], packed["times_plain"] = None, plain["median"] / packed["median"] if both else None
        found += rows
    name = device_name(device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report = {"device": name, "options": vars(options), "versions": versions, "equality": equal, "updates": found}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{name}, {options.dtype}, {options.adapter}, torch {torch.__version__}")
    for what, gaps in equal.items():
        print(f"{what}: " + ", ".join(f"{gap.replace('_', ' ')} {value:.1e}" for gap, value in gaps.items()))
    for row in found:
        print(line(row))
    print(f"-> {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
