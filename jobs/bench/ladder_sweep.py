"""Where each rung's gain comes from: knobs that decide what can be gained on the synthetic catalogue, one at a time.

Every setting is a run of its own, with one seed, from the checkpoints of one start; the first one is the ladder's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladder_runs import begin, run_side_by_side

from afmrl_ray.cit.driver import open_run
from afmrl_ray.cit.ladder import RUNGS, check_ladder
from afmrl_ray.cit.ladder_record import ladder_record
from afmrl_ray.cli import job_main
from afmrl_ray.config import Config, with_values
from afmrl_ray.runs import RunDirectory

OUT = Path("runs/bench/ladder_sweep.json")
_KEYS = ("vlm2vec", "agcl", "distilled", "rl", "oracle-input")


@dataclass(frozen=True)
class Knob:
    """A setting that is swept.

    Attributes:
        name: in the table.
        values: dotted settings by what a line of the table says.
    """

    name: str
    values: Mapping[str, Mapping[str, Any]]


KNOBS = (
    Knob("the ladder's setting", {"": {}}),
    Knob(
        "products listed again under another id",
        {
            "none": {"synthetic.duplicate_fraction": 0.0},
            "40 %": {"synthetic.duplicate_fraction": 0.4},
        },
    ),
    Knob(
        "siblings in a batch",
        {
            "half": {"agcl.batch_grouping.fraction": 0.5, "agcl.batch_grouping.column": "family_id"},
            "all": {"agcl.batch_grouping.fraction": 1.0, "agcl.batch_grouping.column": "family_id"},
        },
    ),
    Knob(
        "teacher's errors",
        {"none": {"synthetic.teacher_error_rate": 0.0}, "30 %": {"synthetic.teacher_error_rate": 0.3}},
    ),
    Knob(
        "teacher's irrelevant pairs",
        {"none": {"synthetic.teacher_irrelevant_rate": 0.0}, "always": {"synthetic.teacher_irrelevant_rate": 1.0}},
    ),
    Knob(
        "attributes that titles leave out",
        {
            "few": {"synthetic.title_mention_rate": 0.9, "synthetic.title_hidden_mention_rate": 1.0},
            "all": {"synthetic.title_mention_rate": 0.0, "synthetic.title_hidden_mention_rate": 0.0},
        },
    ),
)


def cells(config: Config) -> list[tuple[str, str, Config]]:
    """Knob, its setting and the run's config, of every run of the sweep; the primary protocol alone is measured."""
    primary_protocol = [
        protocol for protocol in config.evaluation.protocols if protocol.name == config.evaluation.primary_protocol
    ]
    shown = {"evaluation.protocols": primary_protocol, "cit.gate.protocols": [], "cit.selection_protocol": ""}
    found: list[tuple[str, str, Config]] = []
    for knob in KNOBS:
        for setting, values in knob.values.items():
            name = f"{config.run.name}-{len(found):02d}"
            found.append((knob.name, setting, with_values(config, {**shown, **values, "run.name": name})))
    return found


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rungs", nargs="+", choices=[rung.key for rung in RUNGS], default=list(_KEYS))
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")


def body(config: Config, options: argparse.Namespace) -> None:
    check_ladder(config)
    swept = cells(config)
    with open_run(config) as start:
        beginning = begin(start, options.rungs)
        configs = [of_cell for _, _, of_cell in swept]
        run_side_by_side(configs, options.rungs, beginning, share=1.0, processes=options.processes)
    rows = []
    for knob, setting, of_cell in swept:
        run = RunDirectory(of_cell.run.storage_path, of_cell.run.name)
        rows.append({"knob": knob, "setting": setting, **shown_of(ladder_record(of_cell, [run], title=knob))})
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    print(f"-> {OUT}")


def shown_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the sweep shows of a run: the primary protocol's hit@1 by rung, and each gain over the rung below."""
    primary_protocol = record["primary_protocol"]
    return {
        "hit@1": {rung["name"]: rung["metrics"][primary_protocol]["hit@1"]["mean"] for rung in record["rungs"]},
        "gain": {
            rung["name"]: rung["gain"][primary_protocol]["hit@1"]
            for rung in record["rungs"]
            if primary_protocol in rung["gain"]
        },
        "f1": {
            rung["name"]: rung["attributes"]["f1"]["mean"] for rung in record["rungs"] if "f1" in rung["attributes"]
        },
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each setting as Markdown: hit@1 of the lowest rung, then gains in points with 95 % intervals."""
    names = list(rows[0]["hit@1"])
    lines = ["| catalogue | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for row in rows:
        label = f"{row['knob']}: {row['setting']}" if row["setting"] else row["knob"]
        shown = [f"{100 * row['hit@1'][names[0]]:.1f} %"]
        shown += [_points(row["gain"].get(name)) for name in names[1:]]
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _points(gain: Mapping[str, float] | None) -> str:
    """A gain with its interval; empty where the rung below was not climbed."""
    return f"{100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]" if gain else ""


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
