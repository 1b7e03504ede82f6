"""Stage 2's update at a real size: packed groups, whose prompt is computed once, against one row per completion.

Qwen2.5-VL-3B's shape, random weights. Needs only torch and transformers (peft with `--adapter lora`), so that it runs
on a machine without Ray. Equality is checked first: log-probabilities and gradients at a tiny shape in float32, then of
one group at the timed shape and dtype. Then tokens per second and peak memory of both, with and without gradient
checkpointing, in micro-batches of at most `--part-tokens`. A configuration that runs out of memory is reported as such.
`all_tokens` counts one prompt per completion for both. The optimizer is AdamW without float32 master weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from afmrl_ray.models.logprobs import CompletionLogprobs
from jobs.benchmarks.gpu import device_name, timed
from jobs.benchmarks.rar_gpu_update import (
    LIMITS,
    PUBLISHED,
    TINY,
    Update,
    clear_gradients,
    equality,
    make_groups,
    make_policy,
    set_checkpointing,
)

OUT = Path("runs/bench/rar_gpu.json")


def measure(step: Any, policy: CompletionLogprobs, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds and, on a GPU, peak memory of a step; `seconds` is None if it ran out of memory."""
    clear_gradients(policy)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds: list[float] | None = timed(step, device, repeats)
    except torch.OutOfMemoryError:
        seconds = None
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    clear_gradients(policy)
    median = statistics.median(seconds) if seconds else None
    return {"seconds": seconds, "median": median, "peak_memory_gib": peak, "out_of_memory": seconds is None}


def line(row: dict[str, Any]) -> str:
    """A measurement as one line of text."""
    kept = "checkpointing" if row["checkpointing"] else "no checkpointing"
    head = f"{row['layout']:<7}G {row['group_size']:<3} {kept:<17} {row['parts']:>2} parts "
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
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, for a test of the script")
    parser.add_argument("--adapter", choices=("full", "lora"), default="full", help="trained parameters")
    parser.add_argument("--prompts", type=int, default=4, help="groups per update")
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 16], help="completions per group")
    parser.add_argument("--pixels", type=int, default=448, help="side of a prompt's image")
    parser.add_argument("--prompt-tokens", type=int, default=400, help="tokens per prompt, image and text")
    parser.add_argument(
        "--completion", type=int, nargs=2, default=(48, 80), help="fewest and most tokens of a completion"
    )
    parser.add_argument("--part-tokens", type=int, default=16_384, help="tokens per micro-batch")
    parser.add_argument("--checkpointing", choices=("both", "on", "off"), default="both")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates of each configuration")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write (default: %(default)s)")
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
        for layout in ("plain", "packed"):
            update = Update(policy, groups, options.part_tokens, packed=layout == "packed")

            def step(update: Update = update) -> None:
                update.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)

            row = {"layout": layout, "group_size": size, "checkpointing": checkpointing, "parts": len(update.parts)}
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
    report = {
        "device": name,
        "options": {**vars(options), "out": str(options.out)},
        "versions": versions,
        "equality": equal,
        "updates": found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{name}, {options.dtype}, {options.adapter}, torch {torch.__version__}")
    for what, gaps in equal.items():
        print(f"{what}: " + ", ".join(f"{gap.replace('_', ' ')} {value:.1e}" for gap, value in gaps.items()))
    for row in found:
        print(line(row))
    print(f"-> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
