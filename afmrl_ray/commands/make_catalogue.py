"""Write the synthetic catalogue of section `synthetic` as one Parquet file, and optionally a contact sheet."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence

from afmrl_ray.cli import job_main
from afmrl_ray.config import Config


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="catalogue.parquet", help="Parquet file to write, path or URI")
    parser.add_argument("--sheet", help="PNG contact sheet to write, of the first 30 queries")


def run(config: Config, options: argparse.Namespace) -> None:
    from afmrl_ray import storage
    from afmrl_ray.catalogue import make_catalogue, open_catalogue, write_catalogue
    from afmrl_ray.catalogue.contact_sheet import contact_sheet

    write_catalogue(make_catalogue(config.synthetic), options.out)
    catalogue = open_catalogue(options.out, config=config.catalogue)
    if options.sheet:
        roles = catalogue.column("role")
        image = io.BytesIO()
        contact_sheet(catalogue, [row for row, role in enumerate(roles) if role == "query"][:30]).save(image, "PNG")
        storage.write_bytes(options.sheet, image.getvalue())
    print(f"{options.out}: {len(catalogue)} items, fingerprint {catalogue.fingerprint[:12]}")


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", run, argv, arguments=arguments)
