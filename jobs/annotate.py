"""Write attributes for the catalogue with the generator that a round starts from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from afmrl_ray.cit.driver import open_run
from afmrl_ray.cit.schedule import dry_run
from afmrl_ray.cli import job_main, round_argument
from afmrl_ray.config import Config
from afmrl_ray.runs import StageName


def run(config: Config, options: argparse.Namespace) -> None:
    with open_run(config) as pipeline:
        stage = pipeline.stage(StageName("attributes", options.round))
        print(f"{stage.name}: {stage.directory}")


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", run, argv, arguments=round_argument, dry_run=dry_run)


if __name__ == "__main__":
    sys.exit(main())
