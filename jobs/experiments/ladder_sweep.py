"""The variants on catalogues and batches with other settings, one setting changed at a time: what determines each gain.

Every setting is a run of its own, with one seed, and all runs start from the same checkpoints. The first run has the
study's own settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afmrl_ray.cli import job_main
from afmrl_ray.config import Config, with_values
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.format import format_points
from afmrl_ray.report.text_table import TextTable
from afmrl_ray.runs import RunDirectory
from jobs.experiments.stages import shared_start
from jobs.experiments.study_processes import LOGS, run_in_processes
from jobs.experiments.study_record import study_record
from jobs.experiments.variants import KEYS, check_comparable

OUT = Path("runs/bench/ladder_sweep.json")
_KEYS = ("info-nce", "agcl", "distilled", "rl", "oracle-input")


@dataclass(frozen=True)
class Sweep:
    """A property that is varied.

    Attributes:
        name: name in the table.
        values: dotted settings by label in the table.
    """

    name: str
    values: Mapping[str, Mapping[str, Any]]


SWEEPS = (
    Sweep("settings of the study", {"": {}}),
    Sweep(
        "products repeated under another product ID",
        {
            "none": {"synthetic.duplicate_fraction": 0.0},
            "40 %": {"synthetic.duplicate_fraction": 0.4},
        },
    ),
    Sweep(
        "items of one family in a batch",
        {
            "half": {"agcl.batch_grouping.fraction": 0.5, "agcl.batch_grouping.column": "family_id"},
            "all": {"agcl.batch_grouping.fraction": 1.0, "agcl.batch_grouping.column": "family_id"},
        },
    ),
    Sweep(
        "teacher's errors",
        {"none": {"synthetic.teacher_error_rate": 0.0}, "30 %": {"synthetic.teacher_error_rate": 0.3}},
    ),
    Sweep(
        "teacher's irrelevant pairs",
        {"none": {"synthetic.teacher_irrelevant_rate": 0.0}, "always": {"synthetic.teacher_irrelevant_rate": 1.0}},
    ),
    Sweep(
        "attributes missing from titles",
        {
            "few": {"synthetic.title_mention_rate": 0.9, "synthetic.title_hidden_mention_rate": 1.0},
            "all": {"synthetic.title_mention_rate": 0.0, "synthetic.title_hidden_mention_rate": 0.0},
        },
    ),
)


def cells(config: Config) -> list[tuple[str, str, Config]]:
    """Property, label and config of every run of the sweep; only the primary protocol is measured."""
    primary = [
        protocol for protocol in config.evaluation.protocols if protocol.name == config.evaluation.primary_protocol
    ]
    measured = {"evaluation.protocols": primary, "cit.gate.protocols": [], "cit.selection_protocol": ""}
    found: list[tuple[str, str, Config]] = []
    for sweep in SWEEPS:
        for label, values in sweep.values.items():
            name = f"{config.run.name}-{len(found):02d}"
            found.append((sweep.name, label, with_values(config, {**measured, **values, "run.name": name})))
    return found


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variants", nargs="+", choices=KEYS, default=list(_KEYS), help="variants to run")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write (default: %(default)s)")
    parser.add_argument(
        "--logs", type=Path, default=LOGS, help="folder of the runs' configs and logs (default: %(default)s)"
    )


def body(config: Config, options: argparse.Namespace) -> None:
    check_comparable(config)
    swept = cells(config)
    with shared_start(config, options.variants) as start:
        run_in_processes(
            [of_cell for _, _, of_cell in swept],
            options.variants,
            start,
            train_fraction=1.0,
            processes=options.processes,
            logs=options.logs,
        )
    rows = []
    for name, label, of_cell in swept:
        run = RunDirectory(of_cell.run.storage_path, of_cell.run.name)
        rows.append({"property": name, "setting": label, **primary_results(study_record(of_cell, [run], title=name))})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows).markdown())
    print(f"-> {options.out}")


def primary_results(record: Mapping[str, Any]) -> dict[str, Any]:
    """hit@1 of the primary protocol and its gains, and F1 of the attributes, by variant."""
    primary, variants = record["primary_protocol"], record["variants"]
    return {
        "hit@1": {variant["name"]: variant["metrics"][primary]["hit@1"]["mean"] for variant in variants},
        "gain": {
            variant["name"]: variant["gain"][primary]["hit@1"] for variant in variants if primary in variant["gain"]
        },
        "f1": {
            variant["name"]: variant["attributes"]["f1"]["mean"]
            for variant in variants
            if "f1" in variant["attributes"]
        },
    }


def table(rows: Sequence[Mapping[str, Any]]) -> TextTable:
    """A row per setting: hit@1 of the first variant in %, then the gains of the others in points."""
    names = list(rows[0]["hit@1"])
    lines = []
    for row in rows:
        label = f"{row['property']}: {row['setting']}" if row["setting"] else row["property"]
        gains = [row["gain"].get(name) for name in names[1:]]
        lines.append(
            [
                label,
                f"{100 * row['hit@1'][names[0]]:.1f} %",
                *(format_points(Estimate.of(gain) if gain is not None else None) for gain in gains),
            ]
        )
    return TextTable("hit@1 and gains by setting", ["setting", *names], lines)


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
