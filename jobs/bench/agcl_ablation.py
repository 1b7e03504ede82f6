"""Which reading of stage 1's loss retrieves best: every reading and kind of batch, on two catalogues, several seeds.

Each seed trains a common start by plain InfoNCE, then goes on from it by every reading for equally many steps. A cell
that is done is not done again; the table and the image show what there is.
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
from ablation_report import summary, write
from ablation_worlds import OFF, Cell, World, grocery, synthetic
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

FOLDER = Path("runs/bench/agcl_ablation")
GROCERY = Path("../shared/data/grocery/products.parquet")
_ROWS = 256
_LOGGED = ("masked_fraction", "weight_p10", "weight_p50", "weight_p90", "accuracy", "loss")


class Bench:
    """Trains and measures one cell after another; an actor with one CPU."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo")

    def start(self, world: World, seed: int, out: str) -> None:
        """A tiny encoder that knows the catalogue's images and words, written to `out`."""
        config = world.config(
            seed,
            **OFF,
            steps=world.start_steps,
            adapter={"kind": "full", "train_vision": True},
            optimizer={"learning_rate": 1e-3},
        )
        raw = f"{out}.raw"
        make_tiny(config, "encoder", world.reference, raw)
        self._train(world, config, raw, f"{out}.partial")
        os.replace(f"{out}.partial", out)

    def cell(self, world: World, seed: int, start: str, agcl: dict[str, Any], out: str) -> None:
        """Go on from `start` by the settings `agcl`, evaluate, and write the numbers to `out`."""
        config = world.config(
            seed, **agcl, steps=world.steps, adapter={"kind": "full"}, optimizer={"learning_rate": 3e-4}
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
        stats = self._train(world, config, start, trained)
        protocols = self._evaluate(world, config, trained)
        storage.remove(trained)
        storage.write_json(out, {"stats": stats, "protocols": protocols})

    def _train(self, world: World, config: Config, start: str, out: str) -> dict[str, float]:
        """Numbers of the steps, averaged over the second half of the training."""
        agcl = config.agcl
        model = load_for_training(start, "encoder", agcl.adapter, seed=config.run.seed)
        processor = ItemProcessor.from_pretrained(start, config.encoder.image)
        catalogue = world.reference.open()
        encoder = TrainableQwen2VL(config, model, processor, catalogue)
        engine = Engine(encoder.module, agcl.optimizer, steps=agcl.steps, zero_stage=0)
        preparer = Preparer(config, catalogue, encoder, read_attributes(world.attributes))
        step_fn = AGCLStep(agcl, encoder, preparer, engine)
        found = []
        for step in range(agcl.steps):
            seed_step(config.run.seed, step, 0)
            found.append(step_fn(step))
            engine.step()
        engine.close()
        save_trained(model, out, processor=start)
        return {name: statistics.fmean(s[f"train/{name}"] for s in found[len(found) // 2 :]) for name in _LOGGED}

    def _evaluate(self, world: World, config: Config, trained: str) -> dict[str, Any]:
        encoder = Encoder(EncoderRef(trained, config.encoder), world.reference)
        catalogue, store = world.reference.open(), read_attributes(world.attributes)

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


def run(worlds: Sequence[World], seeds: int, temperatures: Sequence[float], processes: int) -> None:
    """Run what is not done yet, `processes` cells at a time."""
    with ray_session(RayConfig(num_cpus=processes, object_store_mb=128)):
        actor = ray.remote(num_cpus=1)(Bench)
        pool = ray.util.ActorPool([actor.remote() for _ in range(processes)])
        starts = [
            (world, seed, str(folder(world) / f"start-{seed}"))
            for world, seed in product(worlds, range(seeds))
            if not (folder(world) / f"start-{seed}").exists()
        ]
        wait = pool.map_unordered(lambda bench, task: bench.start.remote(*task), starts)
        for _ in tqdm(wait, total=len(starts), desc="starts"):
            pass
        tasks = []
        for world in worlds:
            for cell in world.cells(seeds, temperatures):
                out = path_of(world, cell)
                if not out.exists():
                    tasks.append((world, cell.seed, str(folder(world) / f"start-{cell.seed}"), cell.agcl, str(out)))
        wait = pool.map_unordered(lambda bench, task: bench.cell.remote(*task), tasks)
        for _ in tqdm(wait, total=len(tasks), desc="cells"):
            pass


def folder(world: World) -> Path:
    return (FOLDER / world.name).absolute()


def path_of(world: World, cell: Cell) -> Path:
    name = f"{cell.batches}--{cell.reading}--{cell.seed}".replace(" ", "_").replace(",", "")
    return folder(world) / f"{name}.json"


def finished(world: World, seeds: int, temperatures: Sequence[float]) -> dict[tuple[str, str], dict[int, Any]]:
    """What the cells that are done wrote, by (batches, reading) and seed."""
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for cell in world.cells(seeds, temperatures):
        path = path_of(world, cell)
        if path.exists():
            found.setdefault((cell.batches, cell.reading), {})[cell.seed] = storage.read_json(str(path))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", nargs="+", choices=("synthetic", "grocery"), default=["synthetic", "grocery"])
    parser.add_argument("--catalogue", type=Path, default=GROCERY, help="the grocery catalogue")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.02], help="beside 0.05, plain only")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time, one CPU each")
    parser.add_argument("--report", action="store_true", help="only the table and image of what is done")
    options = parser.parse_args(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    makers = {"synthetic": lambda: synthetic(FOLDER), "grocery": lambda: grocery(FOLDER, options.catalogue)}
    if "grocery" in options.worlds and not options.catalogue.exists():
        print(f"--catalogue {options.catalogue}: there is no such file; left out: grocery", file=sys.stderr)
        options.worlds.remove("grocery")
    worlds = [makers[name]() for name in options.worlds]
    if not options.report:
        run(worlds, options.seeds, options.temperatures, options.processes)
    protocols = {world.name: [p["name"] for p in world.values["evaluation"]["protocols"]] for world in worlds}
    rows = {
        world.name: summary(finished(world, options.seeds, options.temperatures), protocols[world.name])
        for world in worlds
    }
    write(rows, protocols, FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
