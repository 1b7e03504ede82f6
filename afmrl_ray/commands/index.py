"""Build the index of a round: embed its gallery for `afmrl_ray.serving` to search."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from afmrl_ray.cli import job_main
from afmrl_ray.config import Config


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--round", type=int, default=None, help="round of the run; by default the last promoted one")


def body(config: Config, options: argparse.Namespace) -> None:
    from afmrl_ray.cit.driver import open_run
    from afmrl_ray.runs import StageName
    from afmrl_ray.serving.bundle import best_round

    with open_run(config) as pipeline:
        number = best_round(pipeline.run) if options.round is None else options.round
        stage = pipeline.stage(StageName("index", number))
        (recall,) = (value for name, value in stage.metrics.items() if name.startswith("recall_at_"))
        print(
            f"{stage.name}: {stage.metrics['items']} items, {stage.metrics['kind']}, recall@10 against exact search "
            f"{recall:.4f}\n{stage.directory}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)
