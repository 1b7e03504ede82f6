"""A step under Ray Train and DeepSpeed against the same step in a bare torch loop, in the same worker."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from afmrl_ray import storage
from jobs.benchmarks.harness import Comparison, comparison
from jobs.benchmarks.tiny import Bench, make_bench

PAIRS, WARMUPS, REPEATS = 32, 2, 9


def loop(payload: dict[str, Any]) -> None:
    """Train loop that runs both kinds of step in turn and writes their seconds to `payload["out"]`."""
    import torch

    from afmrl_ray.agcl.prepare import Preparer
    from afmrl_ray.agcl.qwen2_vl import TrainableQwen2VL
    from afmrl_ray.agcl.step import AGCLStep
    from afmrl_ray.training.engine import Engine
    from afmrl_ray.training.fit import seed_step

    bench: Bench = payload["bench"]
    torch.set_num_threads(2)

    class Bare:
        """The engine's interface with torch alone."""

        device = torch.device("cpu")

        def __init__(self, model: torch.nn.Module) -> None:
            self._model = model.train()
            self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
            self.parameters = list(model.parameters())

        def __call__(self, **batch: torch.Tensor) -> torch.Tensor:
            return self._model(**batch)

        def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
            loss.backward()

        def step(self) -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()

    agcl = bench.config.agcl
    encoders = {
        name: TrainableQwen2VL(bench.config, bench.model(), bench.processor(), bench.catalogue)
        for name in ("ours", "bare")
    }
    ours = Engine(encoders["ours"].module, agcl.optimizer, steps=10_000, zero_stage=0)
    bare = Bare(encoders["bare"].module)
    steps = {}
    for name, engine in (("ours", ours), ("bare", bare)):
        preparer = Preparer(bench.config, bench.catalogue, encoders[name], None)
        steps[name] = AGCLStep(agcl, encoders[name], preparer, engine)  # type: ignore[arg-type]
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    gap = 0.0
    for step in range(WARMUPS + REPEATS):
        losses = {}
        for name, engine in (("ours", ours), ("bare", bare)):
            began = time.perf_counter()
            seed_step(0, step, 0)
            losses[name] = steps[name](step)["train/loss"]
            engine.step()
            if step >= WARMUPS:
                times[name].append(time.perf_counter() - began)
        gap = max(gap, abs(losses["ours"] - losses["bare"]) / losses["bare"]) if step == 0 else gap
    storage.write_json(payload["out"], {**times, "gap": gap})


def comparisons() -> list[Comparison]:
    """Time both kinds of step in a worker of Ray Train.

    Raises:
        AssertionError: the first losses differ.
    """
    from afmrl_ray.config.cluster import RayConfig, WorkersConfig
    from afmrl_ray.training.cluster import ray_session
    from afmrl_ray.training.fit import fit

    bench = make_bench(PAIRS, 4 * PAIRS)
    with ray_session(RayConfig(num_cpus=2, object_store_mb=128)), tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/times.json"
        workers = WorkersConfig(cpus_per_worker=2)
        fit(loop, {"bench": bench, "out": out}, name="bench", directory=folder, workers=workers)
        found = storage.read_json(out)
    assert found["gap"] < 1e-5, f"the first losses differ by {found['gap']:g}"
    return [
        comparison(
            f"step under Ray Train + DeepSpeed, {PAIRS} pairs",
            "bare torch loop",
            list(zip(found["ours"], found["bare"], strict=True)),
            target=1.08,
            equality=f"first losses equal within {found['gap']:.0e}",
        )
    ]
