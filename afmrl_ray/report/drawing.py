"""Drawing of charts: themes, panels, lines and error bars, and panels as a PNG file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from afmrl_ray.report.estimate import Estimate

_MARKERS = "osD^vP*X"
_LINES = ("-", "--", "-.", ":")
_DPI = 110
_WIDTH_IN = 4.6


@dataclass(frozen=True)
class Theme:
    """Colours of a chart. Series also differ in marker or dash, so that they can be distinguished without colour."""

    background: str
    text: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#22262b", "#e3e5e8", ("#20639b", "#c8553d", "#2f8f6b", "#8a5aa8", "#a67c1b", "#5b6470"))
DARK = Theme("#1b1e22", "#dfe2e6", "#33383e", ("#6fb1ea", "#ee8d75", "#66c9a2", "#c39be0", "#dcb45c", "#9aa4b0"))

Draw = Callable[[Axes, Theme], None]
"""Draws on axes in the colours of a theme."""


@dataclass(frozen=True)
class Panel:
    """One chart: its title, the function that draws it, and its height in inches."""

    title: str
    draw: Draw
    height_in: float = 2.9


@dataclass(frozen=True)
class Chart:
    """A drawn panel as base64-encoded PNG, for light and for dark pages."""

    title: str
    light: str
    dark: str


def make_charts(panels: Sequence[Panel]) -> list[Chart]:
    """Draw every panel in both themes."""
    return [
        Chart(panel.title, *(base64.b64encode(draw_png([panel], theme)).decode() for theme in (LIGHT, DARK)))
        for panel in panels
    ]


def lines_over_steps(lines: Sequence[tuple[str, Sequence[Mapping[str, Any]], str]]) -> Draw:
    """One line per (label, log, key): the moving average, and the values behind it in a faint colour."""

    def draw(axes: Axes, theme: Theme) -> None:
        for index, (label, log, key) in enumerate(lines):
            points = [(record["step"], record[key]) for record in log if record.get(key) is not None]
            steps, values = np.array(points, dtype=float).T
            colour, dash = theme.series[index % len(theme.series)], _LINES[index % len(_LINES)]
            window = max(1, len(values) // 20)
            if window > 1:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            marker = "o" if len(values) == 1 else ""
            axes.plot(steps, _smooth(values, window), color=colour, linestyle=dash, marker=marker, label=label)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(lines) > 3:
            legend_below(axes, 0.22)
        elif len(lines) > 1 or lines[0][0].startswith("round"):
            axes.legend()

    return draw


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """[n] mean of the last `window` values, or of all values where there are fewer."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def errorbar(
    axes: Axes,
    theme: Theme,
    index: int,
    values: list[Estimate],
    label: str,
    *,
    offset: float = 0.0,
    scale: float = 1.0,
    line: bool = True,
) -> None:
    """Draw means with their intervals at x = 0, 1, ...; values that were not measured are left out.

    Args:
        index: of the series; selects colour and marker.
        offset: added to x, so that series do not cover one another.
        scale: factor of the values.
        line: whether the means are connected.
    """
    measured = [(place, value) for place, value in enumerate(values) if value.mean is not None]
    middle = scale * np.array([value.mean for _, value in measured])
    ends = [
        scale * np.array([value.mean if getattr(value, end) is None else getattr(value, end) for _, value in measured])
        for end in ("low", "high")
    ]
    axes.errorbar(
        [place + offset for place, _ in measured],
        middle,
        yerr=np.abs(np.stack([middle - ends[0], ends[1] - middle])),
        color=theme.series[index % len(theme.series)],
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle="-" if line else "none",
        label=label,
    )


def name_ticks(axes: Axes, names: list[str]) -> None:
    """Label x = 0, 1, ... with names."""
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)


def legend_below(axes: Axes, distance: float = 0.1) -> None:
    """Put the legend below the axes, `distance` times their height away."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -distance), ncols=3)


def draw_png(panels: list[Panel], theme: Theme = LIGHT) -> bytes:
    """The panels as one PNG file, two per row."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "errorbar.capsize": 3,
        "lines.markersize": 4.5,
        "lines.linewidth": 1.5,
        "text.parse_math": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.text),
    }
    with rc_context(style):
        height = lines * max(panel.height_in for panel in panels)
        layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
        figure = Figure(figsize=(columns * _WIDTH_IN, height), dpi=_DPI, layout=layout)
        canvas = FigureCanvasAgg(figure)
        titles = []
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(lines, columns, index + 1)
            titles.append((axes, axes.set_title(panel.title)))
            panel.draw(axes, theme)
        figure.draw_without_rendering()
        for axes, title in titles:
            if title.get_window_extent().x1 > axes.bbox.x1:
                # A title wider than its axes is aligned with their right end, above the tick labels.
                title.set(x=1, horizontalalignment="right")
        target = io.BytesIO()
        canvas.print_png(target)
    return target.getvalue()
