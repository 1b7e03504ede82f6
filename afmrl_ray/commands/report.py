"""Write the report of a run again, or compare two runs: report.py --compare runs/demo runs/other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from afmrl_ray import storage
from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue
from afmrl_ray.cli import job_main
from afmrl_ray.config import Config, validate
from afmrl_ray.errors import CatalogueError, ConfigError, StorageError
from afmrl_ray.report import compare, write_comparison, write_report
from afmrl_ray.report.collect import collect
from afmrl_ray.report.compare_tables import print_comparison
from afmrl_ray.report.table import print_summary
from afmrl_ray.runs import RunDirectory


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="folder or URI of the run (default: run.name in run.storage_path)")
    parser.add_argument("--compare", nargs=2, metavar="RUN", help="folders or URIs of two runs")
    parser.add_argument("--out", help="page of the comparison (default: compare-NAME.html in the second run's report)")


def body(config: Config, options: argparse.Namespace) -> None:
    if options.compare is not None and options.run is not None:
        raise ConfigError("--run: --compare names both runs; leave one of the two out")
    if options.compare is None:
        if options.out is not None:
            raise ConfigError("--out: the report of one run is always written below the run; use --out with --compare")
        run = directory(options.run or storage.join(config.run.storage_path, config.run.name))
        summary = collect(run)
        index = write_report(run, items=items(run))
        print_summary(summary)
        print(f"-> {index}")
        return
    left, right = (directory(path) for path in options.compare)
    comparison = compare(left, right)
    page = options.out or storage.join(right.path, "report", f"compare-{storage.split(left.path)[1]}.html")
    write_comparison(comparison, page)
    print_comparison(comparison)
    print(f"-> {page}")


def directory(path: str) -> RunDirectory:
    return RunDirectory(*storage.split(storage.absolute(path)))


def items(run: RunDirectory) -> StagedCatalogue | None:
    """The run's catalogue, for images; None, with a warning, if it or one of its settings no longer exists."""
    stage = run.committed("catalogue")
    if stage is None:
        return None
    try:
        config = validate(run.read_run()["config"])
        path = config.catalogue.path or stage.output("catalogue")
        return CatalogueRef(storage.absolute(path), config.catalogue, stage.metrics["fingerprint"]).open()
    except (CatalogueError, ConfigError, StorageError) as error:
        sys.stderr.write(f"no images in the report: {error}\n")
        return None


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)
