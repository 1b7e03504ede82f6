"""The tables of a run: rows by rungs, once for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from afmrl_ray.cit.stages import RunDirectory
from afmrl_ray.report.collect import AttributeSizes, Round, Rung, RunSummary, collect
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.labels import metric_label, metric_order


@dataclass(frozen=True)
class Cell:
    """A formatted value and its 95 % interval, empty where there is none."""

    text: str = ""
    interval: str = ""


@dataclass(frozen=True)
class ModelInput:
    """A labelled line; `intervals` says whether the narrow terminal table shows them too."""

    label: str
    cells: list[Cell]
    intervals: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    rows: list[ModelInput]


def run_table(run: RunDirectory) -> str:
    """The table of the rounds and the table of the stages, as plain ASCII text.

    Raises:
        StorageError: there is no run at that path.
    """
    return format_tables(collect(run))


def format_tables(summary: RunSummary) -> str:
    """The same, of a summary."""
    if not summary.stages:
        return f"{summary.name}: no stage is committed yet"
    parts = [format_rungs(summary)] if sections(summary) else []
    return "\n\n".join([*parts, format_stages(summary)])


def format_rungs(summary: RunSummary) -> str:
    """Metrics by rung. Shares are per cent."""
    lines = [["", *column_names(summary)]]
    for section in sections(summary):
        lines.append([f"{section.title} ({section.note})" if section.note else section.title])
        for row in section.rows:
            lines.append([f"  {row.label}", *[cell.text or "-" for cell in row.cells]])
            if row.intervals and any(cell.interval for cell in row.cells):
                lines.append(["    95 % interval", *[cell.interval for cell in row.cells]])
    notes = ["* made with other settings than the run's; the same command runs it again"] if summary.stale else []
    return "\n".join([*_aligned(lines), *notes])


def format_stages(summary: RunSummary) -> str:
    """Seconds and peak memory by stage, and in all."""
    lines = [["stage", "seconds", "peak MiB"]]
    for stage in summary.stages:
        star = "*" if stage.stale else ""
        lines.append([stage.name + star, f"{stage.seconds:.1f}", _memory(stage.peak_memory_mb)])
    lines.append(["all", f"{summary.seconds:.1f}", _memory(summary.peak_memory_mb)])
    return "\n".join(_aligned(lines))


def _memory(mb: float | None) -> str:
    return f"{mb:.0f}" if mb is not None else "-"


def _aligned(lines: list[list[str]]) -> Iterator[str]:
    """Columns padded to their widest cell; a line of one cell spans all of them."""
    columns = [line for line in lines if len(line) > 1]
    widths = [max(len(line[i]) for line in columns) for i in range(len(columns[0]))]
    for line in lines:
        first = line[0].ljust(widths[0] if len(line) > 1 else 0)
        rest = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=False)]
        yield "  ".join([first, *rest]).rstrip()


def column_names(summary: RunSummary) -> list[str]:
    """Names of the rungs; those to be measured again carry an asterisk."""
    return [rung.name + ("*" if rung.stage in summary.stale else "") for rung in summary.rungs]


def sections(summary: RunSummary) -> list[Section]:
    """Protocols (primary one first), attributes and rewards: a row for each metric measured, a cell for each rung."""
    found = [_protocol_section(summary, name) for name in summary.protocols]
    found += [_attribute_section(summary), _names_section(summary), _reward_section(summary)]
    found.append(_promotion_section(summary))
    measured = [
        replace(section, rows=[row for row in section.rows if any(cell.text for cell in row.cells)])
        for section in found
    ]
    return [section for section in measured if section.rows]


def _protocol_section(summary: RunSummary, name: str) -> Section:
    results = [rung.protocols.get(name) for rung in summary.rungs]
    counts = [result for result in results if result is not None and result.queries is not None]
    note = f"{counts[-1].kind}, {counts[-1].queries} queries, {counts[-1].gallery} in the gallery" if counts else ""
    if counts and counts[-1].kind == "labels":
        note = f"{counts[-1].queries} items, probe fitted on {counts[-1].gallery}"
    metrics = {metric for result in results if result is not None for metric in result.metrics}
    rows = [
        ModelInput(
            f"{metric_label(metric)} %",
            [_share(result.metrics.get(metric)) if result is not None else Cell() for result in results],
            intervals=name == summary.primary_protocol and metric == "hit@1",
        )
        for metric in sorted(metrics, key=metric_order)
    ]
    return Section(name, note, rows)


def _attribute_section(summary: RunSummary) -> Section:
    rounds = {each.number: each for each in summary.rounds}

    def cell(rung: Rung, name: str, scale: float) -> Cell:
        before = rounds[rung.number].attributes if rung.number in rounds else None
        return Cell(_change(_size(before, name, scale), _size(rung.attributes, name, scale)))

    rows = [("words", "mean_words", 1.0), ("pairs", "mean_pairs", 1.0), ("invalid %", "invalid_fraction", 100.0)]
    rows += [(f"{name} %", name, 100.0) for name in ("precision", "recall", "f1")]
    return Section(
        "attributes",
        "of an item, before -> after the round's RAR; precision, recall and F1 of pairs against the catalogue's",
        [
            ModelInput(label.replace("f1", "F1"), [cell(rung, n, scale) for rung in summary.rungs])
            for label, n, scale in rows
        ],
    )


def _names_section(summary: RunSummary) -> Section:
    """Which attribute names survive, as often as the first generator wrote them."""
    rounds = {each.number: each for each in summary.rounds}
    first = next((each.attributes.names for each in summary.rounds if each.attributes is not None), {})

    def cell(rung: Rung, name: str) -> Cell:
        before = rounds[rung.number].attributes if rung.number in rounds else None
        sizes = (before, rung.attributes)
        shares = [f"{100 * each.names[name]:.0f}" if each is not None and name in each.names else "" for each in sizes]
        return Cell(_change(*shares))

    return Section(
        "attribute names",
        "% of items that have it, before -> after the round's RAR",
        [
            ModelInput(name, [cell(rung, name) for rung in summary.rungs])
            for name in sorted(first, key=lambda n: -first[n])
        ],
    )


def _promotion_section(summary: RunSummary) -> Section:
    rounds = {each.number: each.promotion for each in summary.rounds}
    found = [rounds.get(rung.number) if rung.number is not None else None for rung in summary.rungs]
    why = [line for each in found if each is not None for line in each.why]
    gains = [each.gain if each is not None else None for each in found]
    return Section(
        "promotion",
        "; ".join(why),
        [
            ModelInput(
                "promoted", [Cell(("yes" if each.promoted else "no") if each is not None else "") for each in found]
            ),
            ModelInput(
                f"gain in hit@1 of {summary.selection_protocol}, points",
                [_share(gain, "+") for gain in gains],
                intervals=True,
            ),
        ],
    )


def _size(sizes: AttributeSizes | None, name: str, scale: float) -> str:
    value = getattr(sizes, name) if sizes is not None else None
    return f"{scale * value:.1f}" if value is not None else ""


def _reward_section(summary: RunSummary) -> Section:
    rounds = {each.number: each for each in summary.rounds}
    of_rungs = [rounds.get(rung.number) if rung.number is not None else None for rung in summary.rungs]

    def row(label: str, name: str, *, sign: str = "", intervals: bool = False) -> ModelInput:
        return ModelInput(label, [_reward(each, name, sign) for each in of_rungs], intervals)

    heldout = [
        ModelInput(f"held-out, {when} RAR", [_reward(each, f"eval/reward_{when}", "") for each in of_rungs], True)
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


def _share(value: Estimate | None, sign: str = "") -> Cell:
    if value is None or value.mean is None:
        return Cell()
    text = f"{100 * value.mean:{sign}.1f}"
    if value.low is None or value.high is None:
        return Cell(text)
    return Cell(text, f"{100 * value.low:{sign}.1f} to {100 * value.high:{sign}.1f}")


def _change(before: str, after: str) -> str:
    return f"{before} -> {after}" if before and after else after
