"""Import CSV, JSONL or M5Product as a catalogue, check it, and quarantine its unusable rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from afmrl_ray.cli import job_main
from afmrl_ray.config import Config
from afmrl_ray.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        required=True,
        help="text file of rows (.csv, .tsv, .json, .jsonl, also .gz), or M5Product's JSON of items by id",
    )
    parser.add_argument("--images", required=True, help="folder of the images")
    parser.add_argument("--out", required=True, help="Parquet file to write, path or URI")
    parser.add_argument(
        "--column", action="append", default=[], metavar="CANONICAL=OWN", help="column with another name"
    )
    parser.add_argument(
        "--ids", action="append", default=[], metavar="SPLIT:ROLE=FILE", help="M5Product id list, e.g. test:query=q.txt"
    )
    parser.add_argument("--delimiter", help="of a delimited file (default: found in its header)")
    parser.add_argument("--encoding", help="of the text, as cp1252 (default: UTF-8, or what its first bytes show)")
    parser.add_argument("--labels", help="M5Product's JSON of instance labels by id")


def run(config: Config, options: argparse.Namespace) -> None:
    from afmrl_ray.catalogue import check_table, write_catalogue
    from afmrl_ray.catalogue.importers import import_m5product, import_rows, is_m5product

    if options.ids or options.labels or is_m5product(options.source):
        lists = {}
        for given in options.ids:
            place, separator, path = given.partition("=")
            split, colon, role = place.partition(":")
            if not (separator and colon):
                raise ConfigError(f"--ids {given!r}: write SPLIT:ROLE=FILE")
            if (split, role) in lists:
                raise ConfigError(f"--ids {place}: given twice; join the two files")
            lists[split, role] = path
        imported = import_m5product(options.source, options.images, lists=lists, labels=options.labels)
    else:
        columns = dict(pair.split("=", 1) for pair in options.column if "=" in pair)
        if len(columns) < len(options.column):
            raise ConfigError("--column: write CANONICAL=OWN")
        imported = import_rows(
            options.source, options.images, columns=columns, delimiter=options.delimiter, encoding=options.encoding
        )
    catalogue = check_table(imported.table, options.source, config=config.catalogue, known=imported.faults)
    write_catalogue(catalogue.table, options.out)
    catalogue.write_quarantine(f"{options.out}.quarantine.parquet")
    print(f"{options.out}: {imported.counts}, checked: {catalogue.counts}")


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", run, argv, arguments=arguments)
