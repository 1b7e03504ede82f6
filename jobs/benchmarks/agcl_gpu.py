"""Throughput of stage 1's step at a real size: Qwen2-VL-2B's shape, random weights, LoRA, images of 224 to 448 px.

Needs only torch, transformers and peft, so that it runs on a machine without Ray. Prints items per second and model
FLOPs utilisation of the plain and the GradCache step, and the relative difference of their gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from afmrl_ray.agcl.gradcache import backward_in_parts
from afmrl_ray.agcl.loss import weighted_info_nce
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.flops import EncoderFlops, peak_tflops
from afmrl_ray.models.microbatches import cut_by_tokens
from afmrl_ray.models.vision_attention import use_attention_by_length
from jobs.benchmarks.gpu import device_name, timed

OUT = Path("runs/bench/agcl_gpu.json")
IMAGE, START, END, PAD = 5, 6, 7, 0
PATCH, MERGE, CHANNELS, FRAMES = 14, 2, 3, 2
TEMPERATURE = 0.05
PUBLISHED: dict[str, Any] = {
    "text": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536},
}
"""Qwen/Qwen2-VL-2B-Instruct's config.json."""
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
    "vision": {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
}


@dataclass(frozen=True)
class Visual:
    """An image, as `EncoderFlops` reads it: patch grid and, if cached, the vision tower's output."""

    grid: tuple[int, int, int]
    features: Tensor | None


@dataclass(frozen=True)
class Item:
    """An item: an image, then text."""

    ids: Tensor
    visual: Visual
    patches: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def visuals(self) -> tuple[Visual, ...]:
        return (self.visual,)


def make_model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> EmbeddingModel:
    """Random weights of a published shape, LoRA of rank 16 on the language model's projections."""
    config = Qwen2VLConfig(
        text_config={**shape["text"], "tie_word_embeddings": True},
        vision_config={**shape["vision"], "patch_size": PATCH, "spatial_merge_size": MERGE},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    with device:
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    use_attention_by_length(model)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # initially zero, which makes the gradient of the other factor zero
            parameter.data.normal_(std=0.02)
    return EmbeddingModel(adapted).train()


def make_items(count: int, pixels: tuple[int, int], words: tuple[int, int], vocabulary: int) -> list[Item]:
    """Items with square images and texts, of random sizes in the ranges `pixels` and `words`."""
    draw = np.random.default_rng(0)
    step = PATCH * MERGE
    rows = []
    for _ in range(count):
        side = int(draw.integers(pixels[0] // step, pixels[1] // step + 1)) * MERGE
        text = draw.integers(10, vocabulary, size=int(draw.integers(words[0], words[1] + 1)))
        visual = [START, *[IMAGE] * (side * side // MERGE**2), END]
        patches = torch.from_numpy(draw.standard_normal((side * side, CHANNELS * FRAMES * PATCH**2), dtype=np.float32))
        ids = torch.tensor([*visual, *text.tolist()])
        rows.append(Item(ids, Visual((1, side, side), None), patches))
    return rows


@torch.no_grad()
def with_cached_features(model: EmbeddingModel, rows: Sequence[Item]) -> list[Item]:
    """The same items with the vision tower's output instead of pixels."""
    tower = model.backbone.get_base_model().model.visual
    found = []
    for row in rows:
        pixels = row.patches.to(model.device, next(tower.parameters()).dtype)
        features = tower(pixels, grid_thw=torch.tensor([row.visual.grid], device=model.device)).pooler_output
        found.append(replace(row, visual=Visual(row.visual.grid, features)))
    return found


class Inputs:
    """Padded batches of items with position IDs, computed once, so that no step is timed with it."""

    def __init__(self, model: EmbeddingModel, rows: Sequence[Item]) -> None:
        self._rows, self._device = rows, model.device
        self._inner = model.backbone.get_base_model().model
        self._ready: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def __call__(self, wanted: Sequence[int]) -> dict[str, Tensor]:
        key = tuple(wanted)
        if key not in self._ready:
            self._ready[key] = self._make(wanted)
        return dict(self._ready[key])

    def _make(self, wanted: Sequence[int]) -> dict[str, Tensor]:
        rows = [self._rows[index] for index in wanted]
        longest = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row.ids, (longest - len(row), 0), value=PAD) for row in rows])
        mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
        batch = {
            "input_ids": ids.to(self._device),
            "attention_mask": mask.to(self._device),
            "mm_token_type_ids": (ids == IMAGE).int().to(self._device),
            "image_grid_thw": torch.tensor([row.visual.grid for row in rows], device=self._device),
        }
        batch["position_ids"] = self._inner.get_rope_index(**batch)[0]
        features = [row.visual.features for row in rows if row.visual.features is not None]
        if features:
            batch["image_features"] = torch.cat(features)
        else:
            batch["pixel_values"] = torch.cat([row.patches for row in rows]).to(self._device)
        return batch


class Step:
    """One optimizer step over all items; `part_tokens` = largest number of tokens of a GradCache part."""

    def __init__(self, model: EmbeddingModel, rows: Sequence[Item], part_tokens: int | None) -> None:
        self._model, self._inputs = model, Inputs(model, rows)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=0.0)
        lengths = [len(row) for row in rows]
        self._parts = cut_by_tokens(lengths, part_tokens) if part_tokens else [list(range(len(rows)))]
        self._index = torch.arange(len(rows) // 2, device=model.device)

    def _loss(self, embeddings: Tensor) -> tuple[Tensor, None]:
        queries, positives = embeddings.chunk(2)
        return weighted_info_nce(queries @ positives.T, self._index, temperature=TEMPERATURE)[0], None

    def _backward(self) -> None:
        backward_in_parts(
            lambda wanted: self._model(**self._inputs(wanted)),
            self._parts,
            self._loss,
            lambda value, last: value.backward(),
        )

    def __call__(self) -> None:
        self._backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)

    def gradients(self) -> Tensor:
        """All gradients of a step in one vector, float32."""
        self._backward()
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        found = torch.cat([gradient.float().flatten() for gradient in gradients])
        self._optimizer.zero_grad(set_to_none=False)
        return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, for a test of the script")
    parser.add_argument("--pairs", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--plain-pairs", type=int, default=32, help="largest number of pairs for the plain step")
    parser.add_argument("--part-tokens", type=int, default=16_384, help="tokens of a GradCache part")
    parser.add_argument("--pixels", type=int, nargs=2, default=(224, 448), help="smallest and largest side of an image")
    parser.add_argument("--words", type=int, nargs=2, default=(32, 96), help="fewest and most text tokens of an item")
    parser.add_argument("--cached-features", action="store_true", help="use precomputed outputs of the vision tower")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each size")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write (default: %(default)s)")
    options = parser.parse_args(argv)
    shape = TINY if options.tiny else PUBLISHED
    model = make_model(shape, torch.device(options.device), getattr(torch, options.dtype))
    flops = EncoderFlops(model.backbone)
    name = device_name(model.device)
    peak = peak_tflops(name) if options.dtype == "bfloat16" else None
    found = []
    for pairs in tqdm(options.pairs, desc="sizes"):
        rows = make_items(2 * pairs, options.pixels, options.words, shape["text"]["vocab_size"])
        if options.cached_features:
            rows = with_cached_features(model, rows)
        steps = {"GradCache": Step(model, rows, options.part_tokens)}
        gap = None
        if pairs <= options.plain_pairs:
            steps["plain"] = Step(model, rows, None)
            plain = steps["plain"].gradients()
            gap = float((steps["GradCache"].gradients() - plain).norm() / plain.norm())
        for kind, step in steps.items():
            measured = measure(step, model.device, options.repeats, flops.step(rows) / 1e12, peak)
            sizes = {"step": kind, "pairs": pairs, "tokens": sum(map(len, rows)), "gradient_gap": gap}
            found.append({**sizes, "items_per_second": 2 * pairs / measured["median"], **measured})
    settings = {"device": name, "dtype": options.dtype, "cached_features": options.cached_features}
    report = {**settings, "torch": torch.__version__, "steps": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{name}, {options.dtype}, torch {torch.__version__}")
    for row in found:
        print(line(row))
    print(f"-> {options.out}")
    return 0


def measure(
    step: Step, device: torch.device, repeats: int, tera: float, peak: float | None
) -> dict[str, float | list[float] | None]:
    """Seconds, TFLOP/s, utilisation of `peak` TFLOP/s and, on a GPU, peak memory of a step of `tera` TFLOP."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, device, repeats)
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "median": median,
        "tflops_per_second": tera / median,
        "mfu": tera / median / peak if peak else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def line(row: dict[str, Any]) -> str:
    """A measurement as one line of text."""
    used = f"{100 * row['mfu']:.1f} % of peak" if row["mfu"] else f"{row['tflops_per_second']:.3g} TFLOP/s"
    memory = f", {row['peak_memory_gib']:.1f} GiB" if row["peak_memory_gib"] else ""
    gap = f", gradients differ by {row['gradient_gap']:.0e}" if row["gradient_gap"] is not None else ""
    spread = f"{min(row['seconds']):.3f} to {max(row['seconds']):.3f} s"
    rate = f"{row['items_per_second']:>8.1f} items/s"
    return f"{row['step']:<10}{row['pairs']:>5} pairs {rate}, {used}{memory}{gap} ({spread})"


if __name__ == "__main__":
    sys.exit(main())
