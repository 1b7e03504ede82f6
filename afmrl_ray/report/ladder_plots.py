"""Charts of the ladder."""

from __future__ import annotations

from matplotlib.axes import Axes

from afmrl_ray.report.labels import metric_label, metric_order
from afmrl_ray.report.ladder import LadderSummary
from afmrl_ray.report.plots import Draw, Panel, Theme


def ladder_panels(ladder: LadderSummary) -> list[Panel]:
    """hit@1 by rung with intervals, paired gains over the rung below, and every protocol's first metric by rung."""
    height = 0.9 + 0.34 * len(ladder.rungs)
    panels = [
        Panel(f"{ladder.primary_protocol}: hit@1, %, 95 % over {ladder.seeds} seeds", _bars(ladder), height),
        Panel("gain over the rung below, points", _gains(ladder), height),
    ]
    others = [name for name in ladder.protocols if name != ladder.primary_protocol]
    for protocol in others:
        metric = next(iter(sorted(_metrics_of(ladder, protocol), key=metric_order)), None)
        if metric is not None:
            panels.append(
                Panel(f"{protocol}: {metric_label(metric)}, %", _bars(ladder, protocol=protocol, metric=metric), height)
            )
    return panels


def _metrics_of(ladder: LadderSummary, protocol: str) -> set[str]:
    return {metric for rung in ladder.rungs for metric in rung.metrics.get(protocol, {})}


def _bars(ladder: LadderSummary, *, protocol: str | None = None, metric: str = "hit@1") -> Draw:
    name = protocol or ladder.primary_protocol
    rungs = [rung for rung in ladder.rungs if metric in rung.metrics.get(name, {})]

    def draw(axes: Axes, theme: Theme) -> None:
        values = [rung.metrics[name][metric] for rung in rungs]
        means = [100 * (value.mean or 0.0) for value in values]
        halves = [50 * (value.high - value.low) if value.has_interval else 0.0 for value in values]  # type: ignore[operator]
        colours = [theme.series[0] if rung.proper else theme.series[-1] for rung in rungs]
        axes.barh([rung.name for rung in rungs], means, xerr=halves, color=colours, ecolor=theme.text, height=0.62)
        top = max([mean + half for mean, half in zip(means, halves, strict=True)], default=1.0)
        for place, (mean, half) in enumerate(zip(means, halves, strict=True)):
            axes.text(mean + half + 0.015 * top, place, f"{mean:.1f}", va="center", fontsize=8)
        for floor, dash in zip(ladder.floors, (":", "--"), strict=False):
            value = ladder.floors[floor].get(name, {}).get(metric)
            if value is not None and value.mean is not None:
                axes.axvline(100 * value.mean, color=theme.text, linestyle=dash, linewidth=1, label=floor)
        if ladder.floors and axes.get_legend_handles_labels()[0]:
            # Below the axes, as bars of ceilings reach across them.
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * top)
        axes.grid(visible=False, axis="y")

    return draw


def _gains(ladder: LadderSummary) -> Draw:
    """Of rungs proper: what a ceiling gains would press all others against zero, and stands in the table."""
    rungs = [rung for rung in ladder.rungs if rung.proper and "hit@1" in rung.gain.get(ladder.primary_protocol, {})]

    def draw(axes: Axes, theme: Theme) -> None:
        for place, rung in enumerate(rungs):
            gain = rung.gain[ladder.primary_protocol]["hit@1"]
            if gain.mean is None or gain.low is None or gain.high is None:
                continue
            sure = gain.low > 0 or gain.high < 0
            error = [[100 * (gain.mean - gain.low)], [100 * (gain.high - gain.mean)]]
            axes.errorbar(
                [100 * gain.mean],
                [place],
                xerr=error,
                fmt="o",
                color=theme.series[0],
                markerfacecolor=theme.series[0] if sure else "none",
            )
        axes.axvline(0, color=theme.text, linewidth=1)
        axes.set_yticks(range(len(rungs)), [rung.name for rung in rungs])
        axes.set_ylim(len(rungs) - 0.5, -0.5)
        axes.set_xlabel("95 %, paired; hollow: zero is within")
        axes.grid(visible=False, axis="y")

    return draw
