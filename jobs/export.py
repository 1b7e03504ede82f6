"""Write a trained encoder or generator as one ordinary checkpoint, adapters merged into their base."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from afmrl_ray.cli import job_main
from afmrl_ray.config import Config
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.export import export_merged
from afmrl_ray.models.sentence_transformers_export import export_sentence_transformers


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder, URI or hub name, e.g. runs/demo/stages/agcl-r1/*/model")
    parser.add_argument("--role", required=True, choices=("encoder", "generator"), help="which of the two models it is")
    parser.add_argument("--out", required=True, help="folder or URI to write, empty or not there yet")
    parser.add_argument(
        "--sentence-transformers",
        action="store_true",
        help="write an encoder for stock sentence-transformers, with the encoder section of the config as in training",
    )


def body(config: Config, options: argparse.Namespace) -> None:
    if options.sentence_transformers:
        if options.role != "encoder":
            raise ConfigError(f"--sentence-transformers: a {options.role} gives no embeddings; use --role encoder")
        export_sentence_transformers(options.model, options.out, config.encoder)
    else:
        export_merged(options.model, options.role, options.out, dtype=getattr(config, options.role).dtype)
    print(options.out)


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
