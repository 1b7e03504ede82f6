"""The ablation study (the paper's ladder): every variant as committed stages, in one run per seed.

A first run makes the catalogue and the checkpoints that all seeds start from, since each model has one published
checkpoint; seeds vary everything that is trained. An interrupted study resumes when the same command is run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afmrl_ray import storage
from afmrl_ray.cli import job_main
from afmrl_ray.config import Config, with_values
from afmrl_ray.errors import ConfigError
from afmrl_ray.report import write_report
from afmrl_ray.report.attachment import Attachment, write_attachment
from afmrl_ray.report.drawing import draw_png, make_charts
from afmrl_ray.runs import RunDirectory
from jobs.experiments.stages import shared_start
from jobs.experiments.study_plots import study_panels
from jobs.experiments.study_processes import LOGS, run_in_processes
from jobs.experiments.study_record import study_record
from jobs.experiments.study_tables import RECORD, read_study, study_heading, study_markdown, study_note, study_tables
from jobs.experiments.variants import KEYS, check_comparable


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the trainings")
    parser.add_argument("--variants", nargs="+", choices=KEYS, default=list(KEYS), help="variants to run")
    parser.add_argument(
        "--train-fraction", type=float, default=0.3, help="fraction of the products in the variant with fewer products"
    )
    parser.add_argument("--processes", type=int, default=2, help="seeds that run at a time")
    parser.add_argument("--title", default="", help="title of the tables (default: the run's name)")
    parser.add_argument("--report", action="store_true", help="write only the record and tables of finished stages")
    parser.add_argument(
        "--logs", type=Path, default=LOGS, help="folder of the seeds' configs and logs (default: %(default)s)"
    )


def body(config: Config, options: argparse.Namespace) -> None:
    check_comparable(config)
    name = config.run.name
    seeds = [with_values(config, {"run.name": f"{name}-s{seed}", "run.seed": seed}) for seed in options.seeds]
    runs = [RunDirectory(of_seed.run.storage_path, of_seed.run.name) for of_seed in seeds]
    if options.report:
        write(config, runs, options.title)
        return
    with shared_start(config, options.variants) as start:
        run_in_processes(
            [with_values(of_seed, {"catalogue.path": start.catalogue_path}) for of_seed in seeds],
            options.variants,
            start,
            train_fraction=options.train_fraction,
            processes=options.processes,
            logs=options.logs,
        )
        write(config, runs, options.title)
        write_report(runs[0], items=start.items)


def write(config: Config, runs: Sequence[RunDirectory], title: str) -> None:
    """Write the record as JSON, chart and Markdown below the study's run, and attach it to the first seed's run.

    Args:
        config: config of the study.
        runs: one run per seed.
        title: title of tables; empty = the name of the study's run.

    Raises:
        ConfigError: no seed has measured a variant.
    """
    record: dict[str, Any] = study_record(config, runs, title=title or config.run.name)
    run = RunDirectory(config.run.storage_path, config.run.name)
    if not record["variants"]:
        raise ConfigError(f"ablation study: no seed of {run.path} has measured a variant; run it without --report")
    study = read_study(record)
    panels, markdown = study_panels(study), study_markdown(study)
    storage.write_json(storage.join(run.path, RECORD), record)
    storage.write_bytes(storage.join(run.path, "ladder.md"), markdown.encode())
    storage.write_bytes(storage.join(run.path, "ladder.png"), draw_png(panels))
    heading = study_heading(study, storage.split(runs[0].path)[1])
    tables = study_tables(study)
    write_attachment(runs[0], Attachment("ladder", heading, study_note(study), tables, make_charts(panels), record))
    print(markdown)
    print(f"-> {storage.join(run.path, RECORD)}, {storage.join(run.path, 'ladder.png')}")


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
