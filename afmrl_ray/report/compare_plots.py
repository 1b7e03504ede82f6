"""Charts of two runs side by side."""

from __future__ import annotations

from matplotlib.axes import Axes

from afmrl_ray.report.compare import Comparison
from afmrl_ray.report.labels import metric_label
from afmrl_ray.report.plots import Draw, Panel, Theme, lines_over_steps


def comparison_panels(comparison: Comparison) -> list[Panel]:
    """Differences by metric at the last common rung, and what RAR logged in both runs."""
    last = comparison.differences[-1].rung
    rows = sum(each.rung == last for each in comparison.differences)
    title = f"{last}: {comparison.names[1]} less {comparison.names[0]}, points"
    panels = [Panel(title, _differences(comparison, last), 1.4 + 0.2 * rows)]
    logs = [
        (f"{name}, round {each.number}", each.rar_log)
        for name, run in zip(comparison.names, (comparison.left, comparison.right), strict=True)
        for each in run.rounds
    ]
    for key, title in (("reward/mean", "reward"), ("rollout/attribute_pairs", "pairs of valid attributes")):
        there = [(label, log, key) for label, log in logs if any(record.get(key) is not None for record in log)]
        if there:
            panels.append(Panel(title, lines_over_steps(there)))
    return panels


def _differences(comparison: Comparison, rung: str) -> Draw:
    shown = [each for each in comparison.differences if each.rung == rung and each.change.mean is not None]

    def draw(axes: Axes, theme: Theme) -> None:
        for place, each in enumerate(shown):
            middle = 100 * (each.change.mean or 0.0)
            axes.plot([middle], [place], marker="o", color=theme.series[0])
            if each.change.low is not None and each.change.high is not None:
                axes.plot([100 * each.change.low, 100 * each.change.high], [place, place], color=theme.series[0])
        axes.axvline(0.0, color=theme.text, linewidth=1)
        axes.set_yticks(range(len(shown)), [f"{each.protocol}: {metric_label(each.metric)}" for each in shown])
        axes.invert_yaxis()

    return draw
