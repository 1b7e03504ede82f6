"""The tables of a run: a column for each variant, the same for the terminal and the page."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from afmrl_ray.report.collect import collect
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.labels import metric_label, metric_order
from afmrl_ray.report.summary import AttributeSizes, Round, RunSummary, Variant
from afmrl_ray.report.text_table import TextTable, print_tables
from afmrl_ray.runs import RunDirectory


@dataclass(frozen=True)
class Cell:
    """A formatted value and its 95 % interval, empty where there is none."""

    text: str = ""
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """A row with a cell per variant; `intervals` = text tables show the intervals too, in a row of their own."""

    label: str
    cells: list[Cell]
    intervals: bool = False


@dataclass(frozen=True)
class Section:
    """Rows that belong together: a protocol, attributes, rewards or promotions."""

    title: str
    note: str
    rows: list[Row]


def run_table(run: RunDirectory) -> str:
    """The results by round and the cost by stage, as plain ASCII text.

    Raises:
        StorageError: the path holds no run.
    """
    return format_tables(collect(run))


def format_tables(summary: RunSummary) -> str:
    """The tables of `text_tables` as plain ASCII text."""
    if not summary.stages:
        return f"{summary.name}: no stage is committed yet"
    return "\n\n".join([*(table.plain() for table in text_tables(summary)), *text_notes(summary)])


def text_tables(summary: RunSummary) -> list[TextTable]:
    """One table per section with a column per variant, then seconds and peak memory by stage."""
    return [*(_section_table(section, summary) for section in sections(summary)), stage_table(summary)]


def text_notes(summary: RunSummary) -> list[str]:
    """The explanation of the asterisk, if a column or stage has one."""
    return ["* made with other settings than the run's; the same command runs it again"] if summary.stale else []


def print_summary(summary: RunSummary) -> None:
    """Print the tables to standard output, with bold headers on a terminal."""
    if summary.stages:
        print_tables(text_tables(summary), notes=text_notes(summary))
    else:
        sys.stdout.write(f"{format_tables(summary)}\n")


def _section_table(section: Section, summary: RunSummary) -> TextTable:
    rows = []
    for row in section.rows:
        rows.append([row.label, *[cell.text or "-" for cell in row.cells]])
        if row.intervals and any(cell.interval for cell in row.cells):
            rows.append(["  95 % interval", *[cell.interval for cell in row.cells]])
    title = f"{section.title} ({section.note})" if section.note else section.title
    return TextTable(title, ["", *column_names(summary)], rows)


def stage_table(summary: RunSummary) -> TextTable:
    """Seconds and peak memory of every stage and of all together."""
    rows = [
        [stage.name + ("*" if stage.stale else ""), f"{stage.seconds:.1f}", _memory(stage.peak_memory_mb)]
        for stage in summary.stages
    ]
    total = ["all", f"{summary.seconds:.1f}", _memory(summary.peak_memory_mb)]
    return TextTable("stages", ["", "seconds", "peak MiB"], [*rows, total])


def _memory(mb: float | None) -> str:
    return f"{mb:.0f}" if mb is not None else "-"


def column_names(summary: RunSummary) -> list[str]:
    """Names of the variants; an asterisk marks those that the next run measures again."""
    return [variant.name + ("*" if variant.stage in summary.stale else "") for variant in summary.variants]


def sections(summary: RunSummary) -> list[Section]:
    """Protocols (primary one first), attributes, rewards and promotions: a row per metric, a cell per variant."""
    found = [_protocol_section(summary, name) for name in summary.protocols]
    found += [_attribute_section(summary), _names_section(summary), _reward_section(summary)]
    found.append(_promotion_section(summary))
    measured = [
        replace(section, rows=[row for row in section.rows if any(cell.text for cell in row.cells)])
        for section in found
    ]
    return [section for section in measured if section.rows]


def _protocol_section(summary: RunSummary, name: str) -> Section:
    results = [variant.protocols.get(name) for variant in summary.variants]
    counts = [result for result in results if result is not None and result.queries is not None]
    note = f"{counts[-1].kind}, {counts[-1].queries} queries, {counts[-1].gallery} in the gallery" if counts else ""
    if counts and counts[-1].kind == "labels":
        note = f"{counts[-1].queries} items, probe fitted on {counts[-1].gallery}"
    metrics = {metric for result in results if result is not None for metric in result.metrics}
    rows = [
        Row(
            f"{metric_label(metric)} %",
            [_percent(result.metrics.get(metric)) if result is not None else Cell() for result in results],
            intervals=name == summary.primary_protocol and metric == "hit@1",
        )
        for metric in sorted(metrics, key=metric_order)
    ]
    return Section(name, note, rows)


def _attribute_section(summary: RunSummary) -> Section:
    rounds = {each.number: each for each in summary.rounds}

    def cell(variant: Variant, name: str, scale: float) -> Cell:
        before = rounds[variant.number].attributes if variant.number in rounds else None
        return Cell(_change(_size(before, name, scale), _size(variant.attributes, name, scale)))

    rows = [("words", "mean_words", 1.0), ("pairs", "mean_pairs", 1.0), ("invalid %", "invalid_fraction", 100.0)]
    rows += [(f"{name} %", name, 100.0) for name in ("precision", "recall", "f1")]
    return Section(
        "attributes",
        "of an item, before -> after the round's RAR; precision, recall and F1 of pairs against the catalogue's",
        [
            Row(label.replace("f1", "F1"), [cell(variant, n, scale) for variant in summary.variants])
            for label, n, scale in rows
        ],
    )


def _names_section(summary: RunSummary) -> Section:
    """How often each attribute name is generated, most frequent of the first generator first."""
    rounds = {each.number: each for each in summary.rounds}
    first = next((each.attributes.names for each in summary.rounds if each.attributes is not None), {})

    def cell(variant: Variant, name: str) -> Cell:
        before = rounds[variant.number].attributes if variant.number in rounds else None
        sizes = (before, variant.attributes)
        found = [f"{100 * each.names[name]:.0f}" if each is not None and name in each.names else "" for each in sizes]
        return Cell(_change(*found))

    return Section(
        "attribute names",
        "% of items that have it, before -> after the round's RAR",
        [
            Row(name, [cell(variant, name) for variant in summary.variants])
            for name in sorted(first, key=lambda n: -first[n])
        ],
    )


def _promotion_section(summary: RunSummary) -> Section:
    rounds = {each.number: each.promotion for each in summary.rounds}
    found = [rounds.get(variant.number) if variant.number is not None else None for variant in summary.variants]
    why = [line for each in found if each is not None for line in each.why]
    gains = [each.gain if each is not None else None for each in found]
    return Section(
        "promotion",
        "; ".join(why),
        [
            Row("promoted", [Cell(("yes" if each.promoted else "no") if each is not None else "") for each in found]),
            Row(
                f"gain in hit@1 of {summary.selection_protocol}, points",
                [_percent(gain, "+") for gain in gains],
                intervals=True,
            ),
        ],
    )


def _size(sizes: AttributeSizes | None, name: str, scale: float) -> str:
    value = getattr(sizes, name) if sizes is not None else None
    return f"{scale * value:.1f}" if value is not None else ""


def _reward_section(summary: RunSummary) -> Section:
    rounds = {each.number: each for each in summary.rounds}
    of_variants = [rounds.get(variant.number) if variant.number is not None else None for variant in summary.variants]

    def row(label: str, name: str, *, sign: str = "", intervals: bool = False) -> Row:
        return Row(label, [_reward(each, name, sign) for each in of_variants], intervals)

    heldout = [
        Row(f"held-out, {when} RAR", [_reward(each, f"eval/reward_{when}", "") for each in of_variants], True)
        for when in ("before", "after")
    ]
    gain = row("held-out gain", "eval/reward_gain", sign="+", intervals=True)
    return Section("reward", "", [*heldout, gain, row("training, last steps", "reward/mean")])


def _reward(each: Round | None, name: str, sign: str) -> Cell:
    found = each.reward(name) if each is not None else None
    if found is None or found.mean is None:
        return Cell()
    interval = f"{found.low:{sign}.3f} to {found.high:{sign}.3f}" if found.has_interval else ""
    return Cell(f"{found.mean:{sign}.3f}", interval)


def _percent(value: Estimate | None, sign: str = "") -> Cell:
    if value is None or value.mean is None:
        return Cell()
    text = f"{100 * value.mean:{sign}.1f}"
    if value.low is None or value.high is None:
        return Cell(text)
    return Cell(text, f"{100 * value.low:{sign}.1f} to {100 * value.high:{sign}.1f}")


def _change(before: str, after: str) -> str:
    return f"{before} -> {after}" if before and after else after
