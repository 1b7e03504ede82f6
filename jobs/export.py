"""Write a trained encoder or generator as one ordinary checkpoint, adapters merged into their base."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from afmrl_ray.cli import job_main
from afmrl_ray.config import Config
from afmrl_ray.models.export import export_merged


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder, URI or hub name, e.g. runs/demo/stages/agcl-r1/*/model")
    parser.add_argument("--role", required=True, choices=("encoder", "generator"), help="which of the two models it is")
    parser.add_argument("--out", required=True, help="folder or URI to write, empty or not there yet")


def body(config: Config, options: argparse.Namespace) -> None:
    export_merged(options.model, options.role, options.out, dtype=getattr(config, options.role).dtype)
    print(options.out)


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
