"""hit@1 against milliseconds per query for attributes of several sources, with the models of a committed run.

Queries are searched without attributes, with the first m pairs, with all pairs from a cache, and with all pairs
generated at query time. The gallery is embedded beforehand, with its own attributes if the queries have attributes and
the protocol uses them in the gallery. Queries are timed one at a time. Before it is timed, every source is checked to
give the attributes that are searched with. Queries whose stored text is invalid have no attributes; their first m pairs
are generated, since an output that is cut after m pairs can be valid where the whole is not.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from afmrl_ray import storage
from afmrl_ray.cli import job_main
from afmrl_ray.config import Config
from afmrl_ray.errors import StorageError
from afmrl_ray.report.drawing import Draw, Panel, Theme, draw_png
from afmrl_ray.report.text_table import TextTable, print_tables
from afmrl_ray.runs import RunDirectory
from jobs.experiments.attribute_sources import Measurement, SearchedRound

OUT = Path("runs/bench")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="folder of a run with an evaluated round")
    parser.add_argument("--round", type=int, default=0, help="round whose encoder and generator are used")
    parser.add_argument("--cut", type=int, nargs="*", default=[1, 2, 4], help="numbers of pairs to generate")
    parser.add_argument("--timed", type=int, default=32, help="number of random queries that are timed")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each source, in turn")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of JSON and chart (default: %(default)s)")


def body(_: Config, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    path = storage.absolute(options.run)
    run = RunDirectory(*storage.split(path))
    if not storage.exists(storage.join(path, "run.json")):
        raise StorageError(f"--run {options.run}: no run.json, so no run")
    searched = SearchedRound(run, options.round)
    sources = searched.sources(options.cut)
    count = len(searched.queries)
    sample = np.random.default_rng(0).choice(count, min(options.timed, count), replace=False).tolist()
    searched.check(sources, sample)
    samples = searched.time(sources, sample, options.repeats)
    found = [searched.measure(source, samples[source.name]) for source in sources]
    print_tables([table(found)])
    write(found, searched, options)


def table(found: Sequence[Measurement]) -> TextTable:
    """A row per source."""
    rows = [
        [
            each.name,
            f"{100 * each.hit1:.1f}",
            f"{100 * each.low:.1f} to {100 * each.high:.1f}",
            f"{each.milliseconds:.1f}",
            f"{min(each.samples):.1f} to {max(each.samples):.1f}",
        ]
        for each in found
    ]
    return TextTable("", ["attributes of the query", "hit@1 %", "95 %", "ms per query", "range"], rows)


def write(found: Sequence[Measurement], searched: SearchedRound, options: argparse.Namespace) -> None:
    """Write the JSON file and the chart."""
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    record = {
        "run": searched.name,
        "round": options.round,
        "protocol": searched.protocol.name,
        "queries": len(searched.queries),
        "timed": options.timed,
        "threads": options.threads,
        "points": [asdict(each) for each in found],
        "versions": {"python": platform.python_version(), **versions},
    }
    out = options.out / f"inference_cost-{searched.name}.json"
    out.write_text(json.dumps(record, indent=2) + "\n")
    title = f"{searched.protocol.name}: hit@1, %, against ms per query"
    out.with_suffix(".png").write_bytes(draw_png([Panel(title, chart(found), 3.4)]))
    print(f"-> {out}, {out.with_suffix('.png')}")


def chart(found: Sequence[Measurement]) -> Draw:
    """A point with a 95 % interval per source, on a logarithmic axis of milliseconds."""

    def draw(axes: Axes, theme: Theme) -> None:
        for index, each in enumerate(found):
            ends = [[100 * (each.hit1 - each.low)], [100 * (each.high - each.hit1)]]
            colour = theme.series[index % len(theme.series)]
            axes.errorbar([each.milliseconds], [100 * each.hit1], yerr=ends, marker="o", color=colour, label=each.name)
        axes.set_xscale("log")
        # The default labels of a logarithmic axis are TeX, which these charts do not parse.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("milliseconds per query")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3)

    return draw


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
