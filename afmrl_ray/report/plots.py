"""The plots of a run: panels of axes, drawn together as a file or one by one for the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from afmrl_ray.attributes.quality import NAME_SHARE
from afmrl_ray.report.collect import Log, RunSummary, StageCost
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.labels import metric_label, metric_order

_MARKERS = "osD^vP*X"
_LINES = ("-", "--", "-.", ":")
_DPI = 110
_WIDTH_IN = 4.6


@dataclass(frozen=True)
class Theme:
    """Colours of a plot; series differ in marker or dash too, so that none is told by colour alone."""

    background: str
    text: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#22262b", "#e3e5e8", ("#20639b", "#c8553d", "#2f8f6b", "#8a5aa8", "#a67c1b", "#5b6470"))
DARK = Theme("#1b1e22", "#dfe2e6", "#33383e", ("#6fb1ea", "#ee8d75", "#66c9a2", "#c39be0", "#dcb45c", "#9aa4b0"))

Draw = Callable[[Axes, Theme], None]
Series = list[tuple[str, Log]]
"""Logs by label, one line each."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: title, what draws it, and its height in inches."""

    title: str
    draw: Draw
    height_in: float = 2.9


def plot_panels(summary: RunSummary) -> dict[str, list[Panel]]:
    """Panels by plot: `metrics`, `rar`, `agcl`, `stages`; none where there is nothing to draw."""
    return {
        "metrics": metric_panels(summary),
        "rar": rar_panels(summary),
        "agcl": agcl_panels(summary),
        "stages": [Panel("seconds and peak memory", _stage_bars(summary), 0.9 + 0.22 * len(summary.stages))]
        if summary.stages
        else [],
    }


def metric_panels(summary: RunSummary) -> list[Panel]:
    """Retrieval, labels, attribute sizes and held-out reward by rung."""
    panels: list[Panel] = []
    for name in summary.protocols:
        results = [rung.protocols[name] for rung in summary.rungs if name in rung.protocols and rung.trained]
        if results:
            metrics = sorted({metric for result in results for metric in result.metrics}, key=metric_order)
            for title, shown in _panels_of(metrics):
                panels.append(Panel(f"{name}: {title}, %", _by_rung(summary, name, shown)))
    sizes = [each for rung in summary.rungs if (each := rung.attributes) is not None]
    if sizes:
        panels.append(Panel("words and pairs of an item's attributes", _attribute_sizes(summary)))
    if any(each.reward("heldout_after") for each in summary.rounds):
        panels.append(Panel("held-out reward before and after RAR", _heldout(summary)))
    return panels


def _panels_of(metrics: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Hits apart from recalls and mAP, which would lie on top of them."""
    hits = [metric for metric in metrics if metric.startswith("hit@")]
    recalls = [metric for metric in metrics if metric.startswith(("recall@", "map@"))]
    labels = [metric for metric in metrics if "@" not in metric and metric != "mrr"]
    for title, shown in (("hit@k", hits), ("recall@k and mAP", recalls), ("classes and clusters", labels)):
        if shown:
            yield title, shown


def rar_panels(summary: RunSummary) -> list[Panel]:
    """Reward, invalid and zero-variance share, KL, length and log-probability gap over RAR steps."""
    logs = [(f"round {each.number}", each.rar_log) for each in summary.rounds]
    keys = (
        ("reward_mean", "reward"),
        ("invalid_fraction", "invalid share"),
        ("zero_variance_fraction", "groups without variance, share"),
        ("kl", "KL to the round's start, nats a token"),
        ("attribute_words", "words of valid attributes"),
        ("attribute_pairs", "pairs of valid attributes"),
        ("completion_tokens", "tokens of a completion"),
        ("rollout_logprob_diff", "sampler against learner, nats a token"),
    )
    named = [
        Panel(f"share of completions that name it, {label}", _over_steps_by_key(log, _name_keys(log)))
        for label, log in logs
        if _name_keys(log)
    ]
    return _step_panels(logs, keys) + named


def _name_keys(log: Log) -> dict[str, str]:
    """Labels of the most frequent attribute names at the first steps, as many as there are colours."""
    keys = [key for key in log[0] if key.startswith(NAME_SHARE)] if log else []
    most = sorted(keys, key=lambda key: -sum(record.get(key) or 0.0 for record in log[:5]))[: len(LIGHT.series)]
    return {key: key.removeprefix(NAME_SHARE) for key in most}


def agcl_panels(summary: RunSummary) -> list[Panel]:
    """Loss, accuracy, masked share, similarity and weights over AGCL steps, and the loss of the distillation."""
    logs = [("baseline", summary.baseline_log), *[(f"round {each.number}", each.agcl_log) for each in summary.rounds]]
    keys = (
        ("train/loss", "AGCL loss"),
        ("train/accuracy", "in-batch accuracy"),
        ("train/masked_fraction", "masked negatives, share"),
        ("train/positive_similarity", "similarity of positives"),
        ("train/weight_p50", "weight of a negative, median"),
    )
    return _step_panels([("distillation", summary.distill_log)], (("train/loss", "distillation loss"),)) + _step_panels(
        logs, keys
    )


def _step_panels(logs: Series, keys: Sequence[tuple[str, str]]) -> list[Panel]:
    panels: list[Panel] = []
    for key, title in keys:
        there = [(label, log) for label, log in logs if any(record.get(key) is not None for record in log)]
        if there:
            panels.append(Panel(title, _over_steps(there, key)))
    return panels


def _over_steps(logs: Series, key: str) -> Draw:
    return lines_over_steps([(label, log, key) for label, log in logs])


def _over_steps_by_key(log: Log, labels: dict[str, str]) -> Draw:
    return lines_over_steps([(label, log, key) for key, label in labels.items()])


def lines_over_steps(lines: Sequence[tuple[str, Log, str]]) -> Draw:
    """A line for each (label, log, key): the mean of its last values, and the values behind it."""

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
            _legend_below(axes, 0.22)
        elif len(lines) > 1 or lines[0][0].startswith("round"):
            axes.legend()

    return draw


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """[n] mean of the last `window` values, of fewer at the start."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def _by_rung(summary: RunSummary, protocol: str, metrics: list[str]) -> Draw:
    rungs = [rung for rung in summary.rungs if rung.trained and protocol in rung.protocols]
    floors = [rung for rung in summary.rungs if not rung.trained and protocol in rung.protocols]

    def draw(axes: Axes, theme: Theme) -> None:
        for index, metric in enumerate(metrics):
            offset = 0.035 * (index - (len(metrics) - 1) / 2)
            values = [rung.protocols[protocol].metrics.get(metric, Estimate(None)) for rung in rungs]
            _errorbar(axes, theme, index, values, metric_label(metric), offset=offset, scale=100.0)
        for floor, dash in zip(floors, (":", "--"), strict=False):
            value = floor.protocols[protocol].metrics.get(metrics[0])
            if value is not None and value.mean is not None:
                label = f"{floor.name}, {metric_label(metrics[0])}"
                axes.axhline(100 * value.mean, color=theme.series[-1], linestyle=dash, linewidth=1, label=label)
        _name_rungs(axes, [rung.name for rung in rungs])
        _legend_below(axes)

    return draw


def _attribute_sizes(summary: RunSummary) -> Draw:
    def draw(axes: Axes, theme: Theme) -> None:
        first = next((each.attributes for each in summary.rounds if each.attributes is not None), None)
        stops = [("distilled", first)] if first is not None else []
        stops += [(f"round {r.number}", r.attributes) for r in summary.rungs if r.attributes is not None]
        for index, (name, label) in enumerate((("mean_words", "words"), ("mean_pairs", "pairs"))):
            values = [Estimate(getattr(sizes, name)) for _, sizes in stops]
            _errorbar(axes, theme, index, values, label)
        _name_rungs(axes, [name for name, _ in stops])
        axes.set_ylim(bottom=0)
        _legend_below(axes)

    return draw


def _heldout(summary: RunSummary) -> Draw:
    rounds = [each for each in summary.rounds if each.reward("heldout_after")]

    def draw(axes: Axes, theme: Theme) -> None:
        for index, when in enumerate(("before", "after")):
            values = [each.reward(f"heldout_{when}") or Estimate(None) for each in rounds]
            _errorbar(axes, theme, index, values, when, offset=0.12 * (index - 0.5), line=False)
        _name_rungs(axes, [f"round {each.number}" for each in rounds])
        _legend_below(axes)

    return draw


def _errorbar(
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
    there = [(place, value) for place, value in enumerate(values) if value.mean is not None]
    middle = scale * np.array([value.mean for _, value in there])
    ends = [
        scale * np.array([value.mean if getattr(value, end) is None else getattr(value, end) for _, value in there])
        for end in ("low", "high")
    ]
    axes.errorbar(
        [place + offset for place, _ in there],
        middle,
        yerr=np.abs(np.stack([middle - ends[0], ends[1] - middle])),
        color=theme.series[index % len(theme.series)],
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle="-" if line else "none",
        label=label,
    )


def _name_rungs(axes: Axes, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)


def _legend_below(axes: Axes, distance: float = 0.1) -> None:
    """`distance` is in heights of the axes; a label of the axis needs room."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -distance), ncols=3)


def _stage_bars(summary: RunSummary) -> Draw:
    def draw(axes: Axes, theme: Theme) -> None:
        stages = summary.stages
        bars = axes.barh([stage.name for stage in stages], [stage.seconds for stage in stages], color=theme.series[0])
        axes.bar_label(bars, [_cost(stage) for stage in stages], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.7 * max(max(stage.seconds for stage in stages), 0.1))
        axes.set_xlabel("seconds")
        axes.grid(visible=False, axis="y")

    return draw


def _cost(stage: StageCost) -> str:
    memory = f", {stage.peak_memory_mb:,.0f} MiB" if stage.peak_memory_mb is not None else ""
    return f"{stage.seconds:,.1f} s{memory}"


def draw_png(panels: list[Panel], theme: Theme = LIGHT) -> bytes:
    """The panels as one PNG, two in a row."""
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
                # Wider than its axes: it ends where they end and begins above the ticks' labels.
                title.set(x=1, horizontalalignment="right")
        target = io.BytesIO()
        canvas.print_png(target)
    return target.getvalue()
