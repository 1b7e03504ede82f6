"""Runs the variants of one seed of the ablation study; started by `jobs.experiments.ladder` for each seed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from afmrl_ray.cli import job_main
from afmrl_ray.config import Config
from jobs.experiments.stages import run_variants
from jobs.experiments.variants import KEYS


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variants", nargs="+", choices=KEYS, default=list(KEYS), help="variants to run")
    parser.add_argument(
        "--train-fraction", type=float, default=0.3, help="fraction of the products in the variant with fewer products"
    )
    parser.add_argument("--dual-encoder", help="checkpoint of the dual encoders")
    parser.add_argument("--command", help="command that the report names (default: this one)")


def body(config: Config, options: argparse.Namespace) -> None:
    run_variants(
        config,
        options.variants,
        dual_encoder=options.dual_encoder,
        train_fraction=options.train_fraction,
        command=options.command,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
