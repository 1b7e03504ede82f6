"""Peak memory of a GradCache step by batch size, each in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from jobs.benchmarks.harness import Comparison, comparison

SIZES, PART, REPEATS = (64, 256, 1024), 32, 5


def child(pairs: int) -> dict[str, float]:
    """Peak memory of a step in MiB: of the process, and above its memory just before the step."""
    import torch

    from afmrl_ray.agcl.batches import PairSampler
    from afmrl_ray.agcl.directions import local_items
    from afmrl_ray.agcl.gradcache import backward_in_parts
    from afmrl_ray.agcl.loss import weighted_info_nce
    from afmrl_ray.agcl.masks import mask_by_candidate
    from afmrl_ray.models.encoder import EmbeddingModel
    from afmrl_ray.models.microbatches import cut_by_tokens
    from afmrl_ray.models.model_input import collate
    from afmrl_ray.models.prompts import encoder_input
    from jobs.benchmarks.tiny import make_bench

    bench = make_bench(pairs, max(SIZES))
    catalogue, processor = bench.catalogue, bench.processor()
    model = EmbeddingModel(bench.model()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    sampler = PairSampler(catalogue, bench.config.agcl, seed=0)

    def step(pairs_of_step: int) -> None:
        items, _ = local_items(sampler.batch(0)[:pairs_of_step])
        rows = [
            encoder_input(processor, catalogue, item.row, config=bench.config.encoder, inputs="both") for item in items
        ]
        index = torch.arange(pairs_of_step)

        def loss(embeddings: torch.Tensor) -> tuple[torch.Tensor, None]:
            queries, positives = embeddings.chunk(2)
            mask = mask_by_candidate(positives.detach(), index, threshold=0.9, min_negatives=8)
            return weighted_info_nce(queries @ positives.T, index, temperature=0.05, negative_mask=mask)[0], None

        parts = cut_by_tokens([len(row) for row in rows], PART * max(map(len, rows)))
        backward_in_parts(
            lambda wanted: model(**collate([rows[row] for row in wanted], processor.pad_id)),
            parts,
            loss,
            lambda value, last: value.backward(),
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    # Gradients, optimizer state and allocator arenas exist before the measured step.
    step(4)
    # Reset the peak, which loading has raised.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    step(pairs)
    return {"peak": _memory("VmHWM"), "beyond": _memory("VmHWM") - before}


def _memory(name: str) -> float:
    """Memory of this process in MiB: `VmRSS` = now, `VmHWM` = peak since the last reset."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "needs Linux' /proc"
    return int(found[1]) / 1024


def comparisons() -> list[Comparison]:
    """Peaks of the larger batch sizes against that of the smallest one."""
    samples: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    for _ in range(REPEATS):
        for size in SIZES:
            out = subprocess.run(
                [sys.executable, "-m", "jobs.benchmarks.agcl_memory", str(size)],
                capture_output=True,
                text=True,
                check=True,
            )
            samples[size].append(json.loads(out.stdout.splitlines()[-1]))
    found = []
    for measure, what in (("peak", "whole process"), ("beyond", "the step alone")):
        for size in SIZES[1:]:
            pairs = [(a[measure], b[measure]) for a, b in zip(samples[size], samples[SIZES[0]], strict=True)]
            found.append(
                comparison(
                    f"GradCache peak memory, {size} pairs, {what}",
                    f"{SIZES[0]} pairs",
                    pairs,
                    target=1.15,
                    unit="MiB",
                    equality="the same code path, checked in the step's own benchmark",
                )
            )
    return found


if __name__ == "__main__":
    print(json.dumps(child(int(sys.argv[1]))))
