"""The ablation study as charts."""

from __future__ import annotations

from matplotlib.axes import Axes

from afmrl_ray.report.drawing import Draw, Panel, Theme
from afmrl_ray.report.labels import metric_label, metric_order
from jobs.experiments.study_tables import StudyResult


def study_panels(study: StudyResult) -> list[Panel]:
    """hit@1 of the primary protocol, its gains over the reference variants, and the first metric of other protocols."""
    height = 0.9 + 0.34 * len(study.variants)
    panels = [
        Panel(f"{study.primary_protocol}: hit@1, %, 95 % over {study.seeds} seeds", _bars(study), height),
        Panel("gain over the reference variant, points", _gains(study), height),
    ]
    others = [name for name in study.protocols if name != study.primary_protocol]
    for protocol in others:
        metric = next(iter(sorted(_metrics_of(study, protocol), key=metric_order)), None)
        if metric is not None:
            panels.append(
                Panel(f"{protocol}: {metric_label(metric)}, %", _bars(study, protocol=protocol, metric=metric), height)
            )
    return panels


def _metrics_of(study: StudyResult, protocol: str) -> set[str]:
    return {metric for variant in study.variants for metric in variant.metrics.get(protocol, {})}


def _bars(study: StudyResult, *, protocol: str | None = None, metric: str = "hit@1") -> Draw:
    name = protocol or study.primary_protocol
    variants = [variant for variant in study.variants if metric in variant.metrics.get(name, {})]

    def draw(axes: Axes, theme: Theme) -> None:
        values = [variant.metrics[name][metric] for variant in variants]
        means = [100 * (value.mean or 0.0) for value in values]
        halves = [50 * (value.high - value.low) if value.has_interval else 0.0 for value in values]  # type: ignore[operator]
        colours = [theme.series[0] if variant.in_table else theme.series[-1] for variant in variants]
        axes.barh(
            [variant.name for variant in variants], means, xerr=halves, color=colours, ecolor=theme.text, height=0.62
        )
        top = max([mean + half for mean, half in zip(means, halves, strict=True)], default=1.0)
        for place, (mean, half) in enumerate(zip(means, halves, strict=True)):
            axes.text(mean + half + 0.015 * top, place, f"{mean:.1f}", va="center", fontsize=8)
        for baseline, dash in zip(study.baselines, (":", "--"), strict=False):
            value = study.baselines[baseline].get(name, {}).get(metric)
            if value is not None and value.mean is not None:
                axes.axvline(100 * value.mean, color=theme.text, linestyle=dash, linewidth=1, label=baseline)
        if study.baselines and axes.get_legend_handles_labels()[0]:
            # Below the axes, since the bars of upper bounds reach across them.
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * top)
        axes.grid(visible=False, axis="y")

    return draw


def _gains(study: StudyResult) -> Draw:
    """Gains of the rows of the paper's table; those of upper bounds are larger by far and are in the tables only."""
    rows = [variant for variant in study.variants if variant.in_table]
    variants = [variant for variant in rows if "hit@1" in variant.gain.get(study.primary_protocol, {})]

    def draw(axes: Axes, theme: Theme) -> None:
        for place, variant in enumerate(variants):
            gain = variant.gain[study.primary_protocol]["hit@1"]
            if gain.mean is None or gain.low is None or gain.high is None:
                continue
            significant = gain.low > 0 or gain.high < 0
            error = [[100 * (gain.mean - gain.low)], [100 * (gain.high - gain.mean)]]
            axes.errorbar(
                [100 * gain.mean],
                [place],
                xerr=error,
                fmt="o",
                color=theme.series[0],
                markerfacecolor=theme.series[0] if significant else "none",
            )
        axes.axvline(0, color=theme.text, linewidth=1)
        axes.set_yticks(range(len(variants)), [variant.name for variant in variants])
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_xlabel("95 % interval, paired; hollow: it includes zero")
        axes.grid(visible=False, axis="y")

    return draw
