"""The report as one HTML page that needs nothing from elsewhere: images and plots are data URLs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from afmrl_ray.report.collect import RunSummary
from afmrl_ray.report.compare import Comparison, comparison_notes, comparison_tables
from afmrl_ray.report.compare_plots import comparison_panels
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.gallery import Items, data_url, make_gallery
from afmrl_ray.report.ladder import ladder_heading, ladder_tables
from afmrl_ray.report.ladder_plots import ladder_panels
from afmrl_ray.report.plots import DARK, LIGHT, Panel, draw_png, plot_panels
from afmrl_ray.report.table import column_names, sections

_PLOT_TITLES = {
    "ladder": ("Ladder", ""),
    "metrics": ("Metrics by round", "Error bars are 95 % intervals over queries or prompts."),
    "rar": ("RAR", "Faint: every step. Strong: running mean."),
    "agcl": ("Distillation and AGCL", ""),
    "stages": ("Stages", ""),
}


@dataclass(frozen=True)
class KeyFigure:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Image:
    """A panel as data URLs for light and for dark pages."""

    title: str
    light: str
    dark: str


@dataclass(frozen=True)
class Plot:
    title: str
    note: str
    panels: list[Image]


def render(summary: RunSummary, *, items: Items | None) -> str:
    """The page.

    Args:
        summary: the run.
        items: images of the examples; without, they are text only.
    """
    return _fill(
        "template.html",
        run=summary,
        columns=column_names(summary),
        sections=sections(summary),
        figures=key_figures(summary),
        plots=_plots(summary),
        gallery=make_gallery(summary, items),
        ladder=ladder_tables(summary.ladder) if summary.ladder is not None else [],
        ladder_heading=ladder_heading(summary.ladder, summary.name) if summary.ladder is not None else "",
        duration=duration,
        config=json.dumps(summary.config, indent=2, sort_keys=True),
    )


def render_comparison(comparison: Comparison) -> str:
    """The page of two runs side by side."""
    commands = [
        (f"{name}: {run.path}", run.command)
        for name, run in zip(comparison.names, (comparison.left, comparison.right), strict=True)
    ]
    return _fill(
        "compare.html",
        names=comparison.names,
        notes=comparison_notes(comparison),
        tables=comparison_tables(comparison),
        panels=_images(comparison_panels(comparison)),
        commands=commands,
    )


def _fill(name: str, **values: Any) -> str:
    here = resources.files(__package__)
    # Titles and attributes are sellers' and models' text: everything is escaped but the project's own style sheet.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = Markup(here.joinpath("style.css").read_text("utf-8"))
    return environment.from_string(here.joinpath(name).read_text("utf-8")).render(style=style, **values)


def duration(seconds: float) -> str:
    """Seconds as people say them: `48 s`, `12 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def key_figures(summary: RunSummary) -> list[KeyFigure]:
    """The few numbers that stand first, as far as they are there; those of a refused round are no result."""
    found = [_hit_figure(summary), _reward_figure(summary), _words_figure(summary), _cost_figure(summary)]
    return [figure for figure in found if figure is not None]


def _hit_figure(summary: RunSummary) -> KeyFigure | None:
    hits = [
        (rung, result.metrics["hit@1"])
        for rung in summary.rungs
        if (result := rung.protocols.get(summary.primary_protocol)) is not None and "hit@1" in result.metrics
    ]
    trained = [(rung, hit) for rung, hit in hits if rung.trained and rung.number not in summary.refused]
    if not trained:
        return None
    last, value = trained[-1]
    others = [
        f"{rung.name}{' (refused)' if rung.number in summary.refused else ''} {_percent(hit)}"
        for rung, hit in hits
        if rung is not last
    ]
    return KeyFigure(f"hit@1, {summary.primary_protocol}, {last.name}", _percent(value), ", ".join(others))


def _reward_figure(summary: RunSummary) -> KeyFigure | None:
    kept = [each for each in summary.rounds if each.number not in summary.refused]
    gains = [(each.number, gain) for each in kept if (gain := each.reward("eval/reward_gain")) is not None]
    if not gains:
        return None
    number, gain = gains[-1]
    value = f"{gain.mean:+.3f}" if gain.mean is not None else "-"
    note = f"95 % interval {gain.low:+.3f} to {gain.high:+.3f}" if gain.has_interval else ""
    return KeyFigure(f"held-out reward gained by RAR, round {number}", value, note)


def _words_figure(summary: RunSummary) -> KeyFigure | None:
    kept = [rung for rung in summary.rungs if rung.number not in summary.refused]
    sizes = [(rung.name, rung.attributes) for rung in kept if rung.attributes is not None]
    if not sizes:
        return None
    name, last = sizes[-1]
    value = f"{last.mean_words:.1f}" if last.mean_words is not None else "-"
    return KeyFigure(f"words of attributes, {name}", value, f"invalid {_percent(Estimate(last.invalid_fraction))}")


def _cost_figure(summary: RunSummary) -> KeyFigure | None:
    if not summary.stages:
        return None
    peak = summary.peak_memory_mb
    note = f"peak memory {peak / 1024:.1f} GiB" if peak is not None else ""
    return KeyFigure("in all stages", duration(summary.seconds), note)


def _percent(value: Estimate) -> str:
    return f"{100 * value.mean:.1f} %" if value.mean is not None else "-"


def _plots(summary: RunSummary) -> dict[str, Plot]:
    shown = {}
    ladder = ladder_panels(summary.ladder) if summary.ladder is not None else []
    for name, panels in {"ladder": ladder, **plot_panels(summary)}.items():
        if panels:
            shown[name] = Plot(*_PLOT_TITLES[name], _images(panels))
    return shown


def _images(panels: list[Panel]) -> list[Image]:
    return [
        Image(panel.title, *(data_url(draw_png([panel], theme), "png") for theme in (LIGHT, DARK))) for panel in panels
    ]
