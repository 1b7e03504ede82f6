"""The ladder as tables: pure functions of the record that `jobs/bench/ladder.py` writes (`ladder.json`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.labels import metric_label, metric_order
from afmrl_ray.report.text_table import TextTable, points, share, spread

LADDER = "ladder.json"
"""The record's name below a run."""

Metrics = dict[str, dict[str, Estimate]]
"""By protocol and metric; shares between 0 and 1."""


@dataclass(frozen=True)
class LadderRung:
    """One rung; intervals of `metrics` are over seeds, those of `gain` over seeds and queries, paired.

    Attributes:
        name: in the table.
        below: name of the rung that `gain` is over, or none.
        proper: whether it is a rung of the ladder, rather than a branch or a ceiling beside it.
        seeds: how many measured it.
        cost: seconds of everything that it stands on, but for what all rungs share.
        encoder_steps: optimizer steps of its encoder.
        note: what it is.
    """

    name: str
    below: str | None
    proper: bool
    seeds: int
    cost: Estimate
    encoder_steps: int
    note: str
    metrics: Metrics
    gain: Metrics
    attributes: dict[str, Estimate]
    names: dict[str, Estimate]


@dataclass(frozen=True)
class LadderSummary:
    """A ladder.

    Attributes:
        floors: metrics of `chance` and `pixels`.
    """

    title: str
    primary_protocol: str
    seeds: int
    protocols: list[str]
    rungs: list[LadderRung]
    floors: dict[str, Metrics]


def read_ladder(record: Mapping[str, Any]) -> LadderSummary:
    """The typed form of `ladder.json`."""
    titles = {rung["key"]: rung["name"] for rung in record["rungs"]}
    return LadderSummary(
        title=record["title"],
        primary_protocol=record["primary_protocol"],
        seeds=record["seeds"],
        protocols=sorted(record["protocols"], key=lambda name: name != record["primary_protocol"]),
        rungs=[
            LadderRung(
                name=rung["name"],
                below=titles.get(rung["below"]),
                proper=rung["ladder"],
                seeds=rung["seeds"],
                cost=Estimate.of(rung["cost_seconds"]),
                encoder_steps=rung["encoder_steps"],
                note=rung["note"],
                metrics=_metrics(rung["metrics"]),
                gain=_metrics(rung["gain"]),
                attributes={k: Estimate.of(v) for k, v in rung["attributes"].items() if k != "names"},
                names={k: Estimate.of(v) for k, v in rung["attributes"].get("names", {}).items()},
            )
            for rung in record["rungs"]
        ],
        floors={name: _metrics(protocols) for name, protocols in record["floor"].items()},
    )


def _metrics(record: Mapping[str, Mapping[str, Any]]) -> Metrics:
    return {
        protocol: {name: Estimate.of(value) for name, value in metrics.items()} for protocol, metrics in record.items()
    }


def ladder_tables(ladder: LadderSummary) -> list[TextTable]:
    """The primary protocol with gains and costs first, then every protocol in full, then the attributes."""
    found = [_headline_table(ladder)]
    found += [_protocol_table(ladder, protocol) for protocol in ladder.protocols]
    found += [_attribute_table(ladder), _name_table(ladder)]
    return [table for table in found if table.rows]


def ladder_heading(ladder: LadderSummary, run: str) -> str:
    """What stands over the ladder on the page of a run: its title, unless that is the name of the run or of its ladder.

    Args:
        run: the run's name; that of a seed ends with `-s` and the seed.
    """
    return "Ladder" if ladder.title in (run, re.sub(r"-s\d+$", "", run)) else f"Ladder: {ladder.title}"


def ladder_table(ladder: LadderSummary) -> str:
    """The same tables as Markdown."""
    parts = [f"# {ladder.title}", _words(ladder)]
    parts += [table.markdown() for table in ladder_tables(ladder)]
    return "\n\n".join(parts) + "\n"


def _words(ladder: LadderSummary) -> str:
    return (
        f"{ladder.seeds} seeds; shares in %, means ± 95 % over seeds. Gains are over the rung named, in points, with "
        "the 95 % interval of a paired bootstrap over seeds and queries, or of Student's t over seeds where that "
        "reaches further; an interval that includes zero is no gain."
    )


def _headline_table(ladder: LadderSummary) -> TextTable:
    rows = []
    for name, protocols in ladder.floors.items():
        if "hit@1" in protocols.get(ladder.primary_protocol, {}):
            # Intervals of floors are over queries, those of this column over seeds.
            mean = Estimate(protocols[ladder.primary_protocol]["hit@1"].mean)
            rows.append([name, share(mean), "", "", "", "", ""])
    for rung in ladder.rungs:
        gain = rung.gain.get(ladder.primary_protocol, {}).get("hit@1")
        rows.append(
            [
                rung.name if rung.proper else f"({rung.name})",
                share(rung.metrics[ladder.primary_protocol]["hit@1"]),
                points(gain) if gain is not None else "",
                rung.below or "",
                f"{rung.encoder_steps}",
                spread(rung.cost, 1.0, 0),
                f"{rung.seeds}",
            ]
        )
    columns = [ladder.primary_protocol, "hit@1 %", "gain", "over", "steps", "seconds", "seeds"]
    return TextTable("The ladder", columns, rows)


def _protocol_table(ladder: LadderSummary, protocol: str) -> TextTable:
    rungs = [rung for rung in ladder.rungs if protocol in rung.metrics]
    metrics = sorted({metric for rung in rungs for metric in rung.metrics[protocol]}, key=metric_order)
    first = metrics[0] if metrics else ""
    rows = [
        [rung.name, *[share(rung.metrics[protocol].get(metric)) for metric in metrics], _gain(rung, protocol, first)]
        for rung in rungs
    ]
    columns = [protocol, *[f"{metric_label(metric)} %" for metric in metrics], f"gain in {metric_label(first)}"]
    return TextTable(protocol, columns, rows)


def _gain(rung: LadderRung, protocol: str, metric: str) -> str:
    gain = rung.gain.get(protocol, {}).get(metric)
    return points(gain) if gain is not None else ""


def _attribute_table(ladder: LadderSummary) -> TextTable:
    shown = (
        ("mean_pairs", "pairs", 1.0),
        ("mean_words", "words", 1.0),
        ("invalid_fraction", "invalid %", 100.0),
        ("precision", "precision %", 100.0),
        ("recall", "recall %", 100.0),
        ("f1", "F1 %", 100.0),
    )
    rows = [
        [rung.name, *[spread(rung.attributes.get(name), scale, 1) for name, _, scale in shown]]
        for rung in ladder.rungs
        if rung.attributes
    ]
    return TextTable("Attributes that the items are searched with", ["", *[label for _, label, _ in shown]], rows)


def _name_table(ladder: LadderSummary) -> TextTable:
    rungs = [rung for rung in ladder.rungs if rung.names]
    names = list(dict.fromkeys(name for rung in rungs for name in rung.names))
    rows = [[rung.name, *[spread(rung.names.get(name), 100.0, 0) for name in names]] for rung in rungs]
    return TextTable("Items that have the attribute, %", ["", *names], rows)
