"""Cyclic iterative training: distillation, then rounds of AGCL and RAR, evaluation and report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from afmrl_ray.cli import job_main
from afmrl_ray.commands.stages import dry_run
from afmrl_ray.config import Config


def body(config: Config, options: argparse.Namespace) -> None:
    from afmrl_ray.cit.driver import open_run, run_cit
    from afmrl_ray.report import write_report
    from afmrl_ray.report.collect import collect
    from afmrl_ray.report.table import print_summary

    with open_run(config) as pipeline:
        run_cit(pipeline)
        index = write_report(pipeline.run, items=pipeline.catalogue)
        if pipeline.tracker is not None:
            pipeline.tracker.report(index)
        print_summary(collect(pipeline.run))
        print(f"report: {index}")


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, dry_run=dry_run)
