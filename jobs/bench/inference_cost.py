"""What a query's attributes cost and give: hit@1 against milliseconds, for a committed run.

Searched without attributes, with the first m pairs, with all of them from a cache, and with all of them written on the
spot. The gallery is embedded beforehand in any case, with its own attributes where the query has some and the protocol
shows them. One query at a time on the threads given; before a way is timed, it is checked to give the attributes that
are searched with: those that the run stored, or the first of them. Queries whose stored text is invalid have none, but
for the first m pairs, which may be valid where the whole is not: those are written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from tqdm import tqdm

from afmrl_ray import storage
from afmrl_ray.attributes.store import AttributeStore, read_attributes
from afmrl_ray.attributes.text import SEPARATOR
from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue
from afmrl_ray.cli import job_main
from afmrl_ray.config import Config, validate
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.errors import ConfigError, StorageError
from afmrl_ray.models.annotate import Annotator, GeneratorRef
from afmrl_ray.report.plots import Draw, Panel, Theme, draw_png
from afmrl_ray.retrieval.embed import Encoder, EncoderRef
from afmrl_ray.retrieval.evaluate import interval, rank
from afmrl_ray.retrieval.metrics import hit_at_k
from afmrl_ray.runs import RunDirectory, Stage

OUT = Path("runs/bench")
_BATCH = 64


@dataclass(frozen=True)
class Way:
    """A way to get a query's attributes.

    Attributes:
        name: in the table.
        texts: attribute text of every query.
        write: attribute text of one catalogue row, timed; none = it is not asked for.
        with attributes: whether queries have attributes, and the gallery too where the protocol shows them.
    """

    name: str
    texts: list[str]
    write: Callable[[int], str] | None
    with_attributes: bool = True


@dataclass(frozen=True)
class Point:
    """A measured way: hit@1 over all queries with its 95 % interval, and milliseconds a query."""

    name: str
    hit1: float
    low: float
    high: float
    milliseconds: float
    samples: list[float]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="folder of a run with an evaluated round")
    parser.add_argument("--round", type=int, default=0, help="round whose encoder and generator are used")
    parser.add_argument("--cut", type=int, nargs="*", default=[1, 2, 4], help="pairs that writing stops after")
    parser.add_argument("--timed", type=int, default=32, help="queries that are timed, drawn by seed")
    parser.add_argument("--repeats", type=int, default=5, help="times that each way is timed, in turn")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")


def body(_: Config, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    path = storage.absolute(options.run)
    run = RunDirectory(*storage.split(path))
    if not storage.exists(storage.join(path, "run.json")):
        raise StorageError(f"--run {options.run}: no run.json, so no run")
    bench = Bench(run, options.round)
    ways = bench.ways(options.cut)
    sample = np.random.default_rng(0).choice(len(bench.queries), min(options.timed, len(bench.queries)), replace=False)
    bench.check(ways, sample.tolist())
    samples = bench.time(ways, sample.tolist(), options.repeats)
    points = [bench.point(way, samples[way.name]) for way in ways]
    write(points, bench, options)


class Bench:
    """Models, items and stored attributes of one round."""

    def __init__(self, run: RunDirectory, number: int) -> None:
        config = validate(run.read_run()["config"])
        encoder, generator, attributes, catalogue = (
            _committed(run, name)
            for name in (f"agcl-r{number}", f"rar-r{number}", f"attributes-r{number + 1}", "catalogue")
        )
        path = storage.absolute(config.catalogue.path or catalogue.output("catalogue"))
        reference = CatalogueRef(path, config.catalogue, catalogue.metrics["fingerprint"])
        primary_protocol = next(p for p in config.evaluation.protocols if p.name == config.evaluation.primary_protocol)
        if not isinstance(primary_protocol, RetrievalProtocol):
            raise ConfigError(f"evaluation.primary_protocol {primary_protocol.name!r} is no retrieval protocol")
        if primary_protocol.with_attributes == "none":
            raise ConfigError(
                f"evaluation.primary_protocol {primary_protocol.name!r} shows no attributes, so they cost and "
                "give nothing"
            )
        self.name, self.config, self.protocol = storage.split(run.path)[1], config, primary_protocol
        self.catalogue: StagedCatalogue = reference.open()
        self.store: AttributeStore = read_attributes(attributes.output("attributes"))
        self.annotator = Annotator(GeneratorRef(generator.output("model"), config.generator), reference)
        self.encoder = Encoder(EncoderRef(encoder.output("model"), config.encoder), reference)
        self.queries, self.gallery = (
            self.catalogue.rows(side) for side in (primary_protocol.query, primary_protocol.gallery)
        )
        self._galleries: dict[bool, np.ndarray] = {}

    def stored(self, row: int) -> str:
        return self.store.text(self.encoder.items[row])

    def ways(self, cuts: Sequence[int]) -> list[Way]:
        """From the cheapest to the dearest."""
        full = [self.stored(row) for row in self.queries.tolist()]
        cache = {self._key(row): text for row, text in zip(self.queries.tolist(), full, strict=True)}

        def written(pairs: int | None) -> Callable[[int], str]:
            return lambda row: self.annotator.annotate([row], max_pairs=pairs)[0][0]

        return [
            Way("no attributes", [""] * len(full), None, with_attributes=False),
            Way("all, from a cache", full, lambda row: cache[self._key(row)]),
            *(Way(f"first {m}", self._first(full, m, written(m)), written(m)) for m in cuts),
            Way("all, written", full, written(None)),
        ]

    def _first(self, full: Sequence[str], pairs: int, write: Callable[[int], str]) -> list[str]:
        """The first pairs of every query: those of its stored text, or written where that is invalid as a whole."""
        rows = zip(self.queries.tolist(), full, strict=True)
        return [
            first_pairs(text, pairs) if text else write(row)
            for row, text in tqdm(rows, desc=f"first {pairs}", total=len(full))
        ]

    def _key(self, row: int) -> str:
        """What a cache is asked by: the image and the title."""
        title = self.catalogue.title(row, self.config.generator.title_columns)
        return hashlib.sha256(self.catalogue.image_bytes(row) + title.encode()).hexdigest()

    def check(self, ways: Sequence[Way], sample: Sequence[int]) -> None:
        """Make sure that every way gives what is counted for it.

        Raises:
            RuntimeError: one gives other attributes.
        """
        for way in ways:
            for place in tqdm(sample, desc=f"checking {way.name}"):
                row = int(self.queries[place])
                if way.write is None:
                    continue
                if (found := way.write(row)) != way.texts[place]:
                    raise RuntimeError(
                        f"{way.name}: {found!r} for {self.encoder.items[row]}, searched with {way.texts[place]!r}"
                    )

    def time(self, ways: Sequence[Way], sample: Sequence[int], repeats: int) -> dict[str, list[float]]:
        """Milliseconds a query of every way and repeat, ways in turn; a first round is not counted."""
        found: dict[str, list[float]] = {way.name: [] for way in ways}
        for repeat in tqdm(range(repeats + 1), desc="timing"):
            for way in ways:
                began = time.perf_counter()
                for place in sample:
                    row = int(self.queries[place])
                    self._embed([row], [way.write(row) if way.write is not None else ""], self.protocol.query)
                if repeat:
                    found[way.name].append(1e3 * (time.perf_counter() - began) / len(sample))
        return found

    def point(self, way: Way, samples: list[float]) -> Point:
        """Search with all queries."""
        with_attributes = way.with_attributes and self.protocol.with_attributes == "both"
        if with_attributes not in self._galleries:
            texts = [self.stored(row) if with_attributes else "" for row in self.gallery.tolist()]
            self._galleries[with_attributes] = self._all(self.gallery, texts, self.protocol.gallery, "gallery")
        queries = self._all(self.queries, way.texts, self.protocol.query, way.name)
        ranking = rank(
            self.catalogue,
            self.protocol.label,
            self.queries,
            queries,
            self.gallery,
            self._galleries[with_attributes],
            depth=1,
        )
        evaluation = self.config.evaluation
        hit = interval(hit_at_k(ranking, 1), samples=evaluation.bootstrap_samples, seed=self.config.run.seed)
        low, high = (hit.mean if end is None else end for end in (hit.low, hit.high))
        return Point(way.name, hit.mean, low, high, statistics.median(samples), samples)

    def _all(self, rows: np.ndarray, texts: list[str], side: Any, name: str) -> np.ndarray:
        starts = tqdm(range(0, len(rows), _BATCH), desc=f"embedding {name}")
        parts = [self._embed(rows[i : i + _BATCH].tolist(), texts[i : i + _BATCH], side) for i in starts]
        return np.concatenate(parts)

    def _embed(self, rows: list[int], texts: list[str], side: Any) -> np.ndarray:
        return self.encoder.embed(rows, texts, inputs=side.inputs, title_columns=side.title_columns)


def _committed(run: RunDirectory, name: str) -> Stage:
    stage = run.committed(name)
    if stage is None:
        raise StorageError(f"{run.path}: stage {name} is not committed; run the round first, or give another --round")
    return stage


def first_pairs(text: str, count: int) -> str:
    """The first pairs of a canonical attribute text."""
    return f"{SEPARATOR} ".join(text.split(f"{SEPARATOR} ")[:count])


def write(points: Sequence[Point], bench: Bench, options: argparse.Namespace) -> None:
    """Table, JSON and chart."""
    print(f"{'attributes of the query':<24}{'hit@1 %':>9}{'95 %':>16}{'ms a query':>12}{'spread':>18}")
    for point in points:
        spread = f"{min(point.samples):.1f} to {max(point.samples):.1f}"
        between = f"{100 * point.low:.1f} to {100 * point.high:.1f}"
        print(f"{point.name:<24}{100 * point.hit1:>9.1f}{between:>16}{point.milliseconds:>12.1f}{spread:>18}")
    OUT.mkdir(parents=True, exist_ok=True)
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    record = {
        "run": bench.name,
        "round": options.round,
        "protocol": bench.protocol.name,
        "queries": len(bench.queries),
        "timed": options.timed,
        "threads": options.threads,
        "points": [asdict(point) for point in points],
        "versions": {"python": platform.python_version(), **versions},
    }
    out = OUT / f"inference_cost-{bench.name}.json"
    out.write_text(json.dumps(record, indent=2) + "\n")
    title = f"{bench.protocol.name}: hit@1, %, against ms a query"
    out.with_suffix(".png").write_bytes(draw_png([Panel(title, curve(points), 3.4)]))
    print(f"-> {out}, {out.with_suffix('.png')}")


def curve(points: Sequence[Point]) -> Draw:
    """Every way as a point with its name."""

    def draw(axes: Axes, theme: Theme) -> None:
        for index, point in enumerate(points):
            ends = [[100 * (point.hit1 - point.low)], [100 * (point.high - point.hit1)]]
            colour = theme.series[index % len(theme.series)]
            axes.errorbar(
                [point.milliseconds], [100 * point.hit1], yerr=ends, marker="o", color=colour, label=point.name
            )
        axes.set_xscale("log")
        # Log axes label themselves in TeX, which is off in these charts.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("milliseconds a query")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3)

    return draw


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
