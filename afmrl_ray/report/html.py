"""The report as one self-contained HTML page: images and charts are data URLs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from afmrl_ray.report.compare import Comparison
from afmrl_ray.report.compare_plots import comparison_panels
from afmrl_ray.report.compare_tables import comparison_notes, comparison_tables
from afmrl_ray.report.drawing import Chart, make_charts
from afmrl_ray.report.gallery import Items, make_gallery
from afmrl_ray.report.key_figures import key_figures
from afmrl_ray.report.plots import plot_panels
from afmrl_ray.report.summary import RunSummary
from afmrl_ray.report.table import column_names, sections

_PLOT_TITLES = {
    "metrics": ("Metrics by round", "Error bars are 95 % intervals over queries or prompts."),
    "rar": ("RAR", "Faint: every step. Strong: moving average."),
    "agcl": ("Distillation and AGCL", ""),
    "stages": ("Stages", ""),
}


@dataclass(frozen=True)
class Plot:
    """A section of charts; `name` is the id of the section."""

    name: str
    title: str
    note: str
    charts: list[Chart]


def render(summary: RunSummary, *, items: Items | None) -> str:
    """The page of a run.

    Args:
        summary: the run.
        items: source of the example images; None = examples are shown as text only.
    """
    return _fill(
        "template.html",
        run=summary,
        columns=column_names(summary),
        sections=sections(summary),
        figures=key_figures(summary),
        plots=[
            Plot(name, *_PLOT_TITLES[name], make_charts(panels))
            for name, panels in plot_panels(summary).items()
            if panels
        ],
        gallery=make_gallery(summary, items),
        config=json.dumps(summary.config, indent=2, sort_keys=True),
    )


def render_comparison(comparison: Comparison) -> str:
    """The page of the comparison of two runs."""
    commands = [
        (f"{name}: {run.path}", run.command)
        for name, run in zip(comparison.names, (comparison.left, comparison.right), strict=True)
    ]
    return _fill(
        "compare.html",
        names=comparison.names,
        notes=comparison_notes(comparison),
        tables=comparison_tables(comparison),
        charts=make_charts(comparison_panels(comparison)),
        commands=commands,
    )


def _fill(name: str, **values: Any) -> str:
    here = resources.files(__package__)
    # Titles and attributes come from sellers and models: everything is escaped except the package's own style sheet.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = Markup(here.joinpath("style.css").read_text("utf-8"))
    return environment.from_string(here.joinpath(name).read_text("utf-8")).render(style=style, **values)
