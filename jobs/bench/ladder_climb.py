"""The rungs of one run of a ladder, in a process of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ladder_runs import climb

from afmrl_ray.cit.ladder import RUNGS
from afmrl_ray.cli import job_main
from afmrl_ray.config import Config


def arguments(parser: argparse.ArgumentParser) -> None:
    keys = [rung.key for rung in RUNGS]
    parser.add_argument("--rungs", nargs="+", choices=keys, default=keys, help="what is measured")
    parser.add_argument("--share", type=float, default=0.3, help="of the products, in the branch with fewer")
    parser.add_argument("--clip", help="checkpoint of the dual encoders")
    parser.add_argument("--command", help="that makes all runs of the ladder, for the report; this one if left out")


def body(config: Config, options: argparse.Namespace) -> None:
    climb(config, options.rungs, clip=options.clip, share=options.share, command=options.command)


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
