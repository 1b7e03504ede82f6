"""The ablation study as tables: pure functions of its record (`ladder.json`, see `study_record`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.format import format_mean, format_percent, format_points
from afmrl_ray.report.labels import metric_label, metric_order
from afmrl_ray.report.text_table import TextTable

RECORD = "ladder.json"
"""File name of the record below a run."""

Metrics = dict[str, dict[str, Estimate]]
"""Estimates by protocol and metric; fractions between 0 and 1."""


@dataclass(frozen=True)
class VariantResult:
    """Results of one variant; intervals of `metrics` are over seeds, those of `gain` over seeds and queries, paired.

    Attributes:
        name: name in tables.
        reference: name of the variant that `gain` is relative to, or None.
        in_table: whether it is a row of the paper's table, not a branch or an upper bound beside it.
        seeds: number of seeds that measured it.
        cost: seconds of its stages, without those shared by all variants.
        encoder_steps: optimizer steps of its encoder.
        note: what distinguishes it.
        attributes: sizes and quality of the attributes that items are searched with, by name.
        names: fraction of items that have an attribute, by attribute name.
    """

    name: str
    reference: str | None
    in_table: bool
    seeds: int
    cost: Estimate
    encoder_steps: int
    note: str
    metrics: Metrics
    gain: Metrics
    attributes: dict[str, Estimate]
    names: dict[str, Estimate]


@dataclass(frozen=True)
class StudyResult:
    """Results of the study.

    Attributes:
        protocols: names, the primary protocol first.
        baselines: metrics of `chance` and `pixels`.
    """

    title: str
    primary_protocol: str
    seeds: int
    protocols: list[str]
    variants: list[VariantResult]
    baselines: dict[str, Metrics]


def read_study(record: Mapping[str, Any]) -> StudyResult:
    """The typed form of the record."""
    titles = {variant["key"]: variant["name"] for variant in record["variants"]}
    return StudyResult(
        title=record["title"],
        primary_protocol=record["primary_protocol"],
        seeds=record["seeds"],
        protocols=sorted(record["protocols"], key=lambda name: name != record["primary_protocol"]),
        variants=[
            VariantResult(
                name=variant["name"],
                reference=titles.get(variant["reference"]),
                in_table=variant["in_table"],
                seeds=variant["seeds"],
                cost=Estimate.of(variant["cost_seconds"]),
                encoder_steps=variant["encoder_steps"],
                note=variant["note"],
                metrics=_metrics(variant["metrics"]),
                gain=_metrics(variant["gain"]),
                attributes={k: Estimate.of(v) for k, v in variant["attributes"].items() if k != "names"},
                names={k: Estimate.of(v) for k, v in variant["attributes"].get("names", {}).items()},
            )
            for variant in record["variants"]
        ],
        baselines={name: _metrics(protocols) for name, protocols in record["baselines"].items()},
    )


def _metrics(record: Mapping[str, Mapping[str, Any]]) -> Metrics:
    return {
        protocol: {name: Estimate.of(value) for name, value in metrics.items()} for protocol, metrics in record.items()
    }


def study_tables(study: StudyResult) -> list[TextTable]:
    """The primary protocol with gains and costs, then every protocol in full, then the attributes."""
    found = [_primary_table(study)]
    found += [_protocol_table(study, protocol) for protocol in study.protocols]
    found += [_attribute_table(study), _name_table(study)]
    return [table for table in found if table.rows]


def study_heading(study: StudyResult, run: str) -> str:
    """Heading of the study on the page of a run: without the study's title if that is the run's name without its seed.

    Args:
        run: name of the run; that of a seed ends with `-s<seed>`.
    """
    repeated = study.title in (run, re.sub(r"-s\d+$", "", run))
    return "Ablation study" if repeated else f"Ablation study: {study.title}"


def study_note(study: StudyResult) -> str:
    """How to read the tables."""
    return (
        f"{study.seeds} seeds; fractions in %, means ± 95 % over seeds. Gains are over the variant named, in points, "
        "with the 95 % interval of a paired bootstrap over seeds and queries, or of Student's t over seeds where that "
        "is wider; an interval that includes zero shows no gain."
    )


def study_markdown(study: StudyResult) -> str:
    """Title, note and tables as Markdown."""
    parts = [f"# {study.title}", study_note(study)]
    parts += [table.markdown() for table in study_tables(study)]
    return "\n\n".join(parts) + "\n"


def _primary_table(study: StudyResult) -> TextTable:
    rows = []
    for name, protocols in study.baselines.items():
        if "hit@1" in protocols.get(study.primary_protocol, {}):
            # Intervals of baselines are over queries, those of this column over seeds.
            mean = Estimate(protocols[study.primary_protocol]["hit@1"].mean)
            rows.append([name, format_percent(mean), "", "", "", "", ""])
    for variant in study.variants:
        rows.append(
            [
                variant.name if variant.in_table else f"({variant.name})",
                format_percent(variant.metrics[study.primary_protocol]["hit@1"]),
                _gain(variant, study.primary_protocol, "hit@1"),
                variant.reference or "",
                f"{variant.encoder_steps}",
                format_mean(variant.cost, 1.0, 0),
                f"{variant.seeds}",
            ]
        )
    columns = [study.primary_protocol, "hit@1 %", "gain", "over", "steps", "seconds", "seeds"]
    return TextTable("Variants", columns, rows)


def _protocol_table(study: StudyResult, protocol: str) -> TextTable:
    variants = [variant for variant in study.variants if protocol in variant.metrics]
    metrics = sorted({metric for variant in variants for metric in variant.metrics[protocol]}, key=metric_order)
    first = metrics[0] if metrics else ""
    rows = [
        [
            variant.name,
            *[format_percent(variant.metrics[protocol].get(metric)) for metric in metrics],
            _gain(variant, protocol, first),
        ]
        for variant in variants
    ]
    columns = [protocol, *[f"{metric_label(metric)} %" for metric in metrics], f"gain in {metric_label(first)}"]
    return TextTable(protocol, columns, rows)


def _gain(variant: VariantResult, protocol: str, metric: str) -> str:
    return format_points(variant.gain.get(protocol, {}).get(metric))


def _attribute_table(study: StudyResult) -> TextTable:
    shown = (
        ("mean_pairs", "pairs", 1.0),
        ("mean_words", "words", 1.0),
        ("invalid_fraction", "invalid %", 100.0),
        ("precision", "precision %", 100.0),
        ("recall", "recall %", 100.0),
        ("f1", "F1 %", 100.0),
    )
    rows = [
        [variant.name, *[format_mean(variant.attributes.get(name), scale, 1) for name, _, scale in shown]]
        for variant in study.variants
        if variant.attributes
    ]
    return TextTable("Attributes that the items are searched with", ["", *[label for _, label, _ in shown]], rows)


def _name_table(study: StudyResult) -> TextTable:
    variants = [variant for variant in study.variants if variant.names]
    names = list(dict.fromkeys(name for variant in variants for name in variant.names))
    rows = [[variant.name, *[format_mean(variant.names.get(name), 100.0, 0) for name in names]] for variant in variants]
    return TextTable("Items that have the attribute, %", ["", *names], rows)
