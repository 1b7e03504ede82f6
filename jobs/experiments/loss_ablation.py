"""Ablation of stage 1's loss: retrieval of every variant of the loss and kind of batch, on two datasets, several seeds.

Each seed trains a common start with plain InfoNCE, then continues from it with every variant for the same number of
steps. Finished cells are not run again; table and chart show all finished cells.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import distributed as dist
from tqdm import tqdm

from afmrl_ray import storage
from afmrl_ray.agcl.prepare import Preparer
from afmrl_ray.agcl.qwen2_vl import TrainableQwen2VL
from afmrl_ray.agcl.step import AGCLStep
from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.cit.tiny import make_tiny
from afmrl_ray.config import Config
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.cluster import RayConfig
from afmrl_ray.models.adapters import load_for_training, save_trained
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.retrieval.embed import Encoder, EncoderRef
from afmrl_ray.retrieval.evaluate import evaluate
from afmrl_ray.training.cluster import ray_session
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.fit import seed_step
from jobs.experiments.loss_ablation_report import summary, write
from jobs.experiments.loss_variants import OFF, Cell, Dataset, grocery, synthetic

FOLDER = Path("runs/bench/agcl_ablation")
GROCERY = Path("../shared/data/grocery/products.parquet")
_ROWS = 256
_LOGGED = ("masked_fraction", "weight_gradient_fraction", "accuracy", "loss")


class CellRunner:
    """Trains and measures cells, one after another; an actor with one CPU."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo")

    def start(self, dataset: Dataset, seed: int, out: str) -> None:
        """Train a tiny encoder on the dataset with plain InfoNCE and write it to `out`."""
        config = dataset.config(
            seed,
            **OFF,
            steps=dataset.start_steps,
            adapter={"kind": "full", "train_vision": True},
            optimizer={"learning_rate": 1e-3},
        )
        raw = f"{out}.raw"
        make_tiny(config, "encoder", dataset.reference, raw)
        self._train(dataset, config, raw, f"{out}.partial")
        os.replace(f"{out}.partial", out)

    def cell(self, dataset: Dataset, seed: int, start: str, agcl: dict[str, Any], out: str) -> None:
        """Continue from `start` with the settings `agcl`, evaluate, and write the numbers to `out`."""
        config = dataset.config(
            seed, **agcl, steps=dataset.steps, adapter={"kind": "full"}, optimizer={"learning_rate": 3e-4}
        )
        config = config.model_copy(
            update={
                "encoder": config.encoder.model_copy(
                    update={
                        "vision_cache": config.encoder.vision_cache.model_copy(
                            update={"enabled": True, "folder": str(Path(start).parent / "vision")}
                        )
                    }
                )
            }
        )
        trained = f"{out}.model"
        stats = self._train(dataset, config, start, trained)
        protocols = self._evaluate(dataset, config, trained)
        storage.remove(trained)
        storage.write_json(out, {"stats": stats, "protocols": protocols})

    def _train(self, dataset: Dataset, config: Config, start: str, out: str) -> dict[str, float]:
        """Means of the logged values over the second half of the training."""
        agcl = config.agcl
        model = load_for_training(start, "encoder", agcl.adapter, seed=config.run.seed)
        processor = ItemProcessor.from_pretrained(start, config.encoder.image)
        catalogue = dataset.reference.open()
        encoder = TrainableQwen2VL(config, model, processor, catalogue)
        engine = Engine(encoder.module, agcl.optimizer, steps=agcl.steps, zero_stage=0)
        preparer = Preparer(config, catalogue, encoder, read_attributes(dataset.attributes))
        step_fn = AGCLStep(agcl, encoder, preparer, engine)
        found = []
        for step in range(agcl.steps):
            seed_step(config.run.seed, step, 0)
            found.append(step_fn(step))
            engine.step()
        engine.close()
        save_trained(model, out, processor=start)
        return {
            name: statistics.fmean(s.get(f"train/{name}", 0.0) for s in found[len(found) // 2 :]) for name in _LOGGED
        }

    def _evaluate(self, dataset: Dataset, config: Config, trained: str) -> dict[str, Any]:
        encoder = Encoder(EncoderRef(trained, config.encoder), dataset.reference)
        catalogue, store = dataset.reference.open(), read_attributes(dataset.attributes)

        def embed(side: ItemSelector, with_attributes: bool) -> tuple[np.ndarray, np.ndarray]:
            rows = catalogue.rows(side)
            texts = [store.text(encoder.items[row]) if with_attributes else "" for row in rows.tolist()]
            parts = [
                encoder.embed(
                    rows[first : first + _ROWS].tolist(),
                    texts[first : first + _ROWS],
                    inputs=side.inputs,
                    title_columns=side.title_columns,
                )
                for first in range(0, len(rows), _ROWS)
            ]
            return rows, np.concatenate(parts)

        measured = evaluate(config.evaluation, catalogue, embed, seed=config.run.seed)
        return {name: found.record for name, found in measured.items()}


def run(datasets: Sequence[Dataset], seeds: int, temperatures: Sequence[float], processes: int, out: Path) -> None:
    """Run the starts and cells that are not finished, `processes` at a time."""
    with ray_session(RayConfig(num_cpus=processes, object_store_mb=128)):
        actor = ray.remote(num_cpus=1)(CellRunner)
        pool = ray.util.ActorPool([actor.remote() for _ in range(processes)])
        starts = [
            (dataset, seed, str(start_path(out, dataset, seed)))
            for dataset, seed in product(datasets, range(seeds))
            if not start_path(out, dataset, seed).exists()
        ]
        wait = pool.map_unordered(lambda runner, task: runner.start.remote(*task), starts)
        for _ in tqdm(wait, total=len(starts), desc="starts"):
            pass
        tasks = []
        for dataset in datasets:
            for cell in dataset.cells(seeds, temperatures):
                path = cell_path(out, dataset, cell)
                if not path.exists():
                    start = start_path(out, dataset, cell.seed)
                    tasks.append((dataset, cell.seed, str(start), cell.agcl, str(path)))
        wait = pool.map_unordered(lambda runner, task: runner.cell.remote(*task), tasks)
        for _ in tqdm(wait, total=len(tasks), desc="cells"):
            pass


def start_path(out: Path, dataset: Dataset, seed: int) -> Path:
    """Folder of a common start."""
    return (out / dataset.name).absolute() / f"start-{seed}"


def cell_path(out: Path, dataset: Dataset, cell: Cell) -> Path:
    """File of a cell's results."""
    name = f"{cell.batches}--{cell.variant}--{cell.seed}".replace(" ", "_").replace(",", "")
    return (out / dataset.name).absolute() / f"{name}.json"


def finished(
    out: Path, dataset: Dataset, seeds: int, temperatures: Sequence[float]
) -> dict[tuple[str, str], dict[int, Any]]:
    """Results of the finished cells, by (batches, variant) and seed."""
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for cell in dataset.cells(seeds, temperatures):
        path = cell_path(out, dataset, cell)
        if path.exists():
            found.setdefault((cell.batches, cell.variant), {})[cell.seed] = storage.read_json(str(path))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", nargs="+", choices=("synthetic", "grocery"), default=["synthetic", "grocery"])
    parser.add_argument("--catalogue", type=Path, default=GROCERY, help="the grocery catalogue")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--temperatures", type=float, nargs="*", default=[0.02], help="of further runs of plain InfoNCE, beside 0.05"
    )
    parser.add_argument("--processes", type=int, default=2, help="cells at a time, one CPU each")
    parser.add_argument("--report", action="store_true", help="write only table and chart of finished cells")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the cells (default: %(default)s)")
    options = parser.parse_args(argv)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    makers = {"synthetic": lambda: synthetic(out), "grocery": lambda: grocery(out, options.catalogue)}
    if "grocery" in options.datasets and not options.catalogue.exists():
        print(f"--catalogue {options.catalogue}: no such file, so grocery is left out", file=sys.stderr)
        options.datasets.remove("grocery")
    datasets = [makers[name]() for name in options.datasets]
    if not options.report:
        run(datasets, options.seeds, options.temperatures, options.processes, out)
    protocols = {dataset.name: [p["name"] for p in dataset.values["evaluation"]["protocols"]] for dataset in datasets}
    rows = {
        dataset.name: summary(finished(out, dataset, options.seeds, options.temperatures), protocols[dataset.name])
        for dataset in datasets
    }
    write(rows, protocols, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
