"""The ladder over seeds: every rung of the paper's table, as committed stages of one run a seed, and its record.

A first run makes the catalogue and the checkpoints that every seed begins with, as there is one published checkpoint of
each model; seeds vary everything that is trained. Any of it may be killed: the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ladder_runs import begin, run_side_by_side

from afmrl_ray import storage
from afmrl_ray.cit.driver import open_run
from afmrl_ray.cit.ladder import RUNGS, check_ladder
from afmrl_ray.cit.ladder_record import ladder_record
from afmrl_ray.cli import job_main
from afmrl_ray.config import Config, with_values
from afmrl_ray.errors import ConfigError
from afmrl_ray.report import write_report
from afmrl_ray.report.ladder import LADDER, ladder_table, read_ladder
from afmrl_ray.report.ladder_plots import ladder_panels
from afmrl_ray.report.plots import draw_png
from afmrl_ray.runs import RunDirectory

_KEYS = [rung.key for rung in RUNGS]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the trainings")
    parser.add_argument("--rungs", nargs="+", choices=_KEYS, default=_KEYS, help="what is measured")
    parser.add_argument("--share", type=float, default=0.3, help="of the products, in the branch with fewer")
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time")
    parser.add_argument("--title", default="", help="of the tables; the run's name if left out")
    parser.add_argument("--report", action="store_true", help="only the record of what is done")


def body(config: Config, options: argparse.Namespace) -> None:
    check_ladder(config)
    name = config.run.name
    seeds = [with_values(config, {"run.name": f"{name}-s{seed}", "run.seed": seed}) for seed in options.seeds]
    runs = [RunDirectory(of_seed.run.storage_path, of_seed.run.name) for of_seed in seeds]
    if options.report:
        return write(config, runs, options.title)
    with open_run(config) as start:
        beginning = begin(start, options.rungs)
        shared = [with_values(of_seed, {"catalogue.path": start.catalogue_ref.path}) for of_seed in seeds]
        run_side_by_side(shared, options.rungs, beginning, share=options.share, processes=options.processes)
        write(config, runs, options.title)
        write_report(runs[0], items=start.catalogue)
    return None


def write(config: Config, runs: Sequence[RunDirectory], title: str) -> None:
    """The record as JSON, chart and table; it stands in the report of the first seed too."""
    record: dict[str, Any] = ladder_record(config, runs, title=title or config.run.name)
    run = RunDirectory(config.run.storage_path, config.run.name)
    if not record["rungs"]:
        raise ConfigError(f"ladder: no rung is measured by any of the seeds beside {run.path}; run it without --report")
    for each in (run, runs[0]):
        storage.write_json(storage.join(each.path, LADDER), record)
    ladder = read_ladder(record)
    table = ladder_table(ladder)
    storage.write_bytes(storage.join(run.path, "ladder.md"), table.encode())
    storage.write_bytes(storage.join(run.path, "ladder.png"), draw_png(ladder_panels(ladder)))
    print(table)
    print(f"-> {storage.join(run.path, LADDER)}, {storage.join(run.path, 'ladder.png')}")


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
