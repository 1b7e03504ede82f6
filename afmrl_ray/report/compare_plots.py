"""Charts of the comparison of two runs."""

from __future__ import annotations

from matplotlib.axes import Axes

from afmrl_ray.report.compare import Comparison
from afmrl_ray.report.drawing import Draw, Panel, Theme, lines_over_steps
from afmrl_ray.report.labels import metric_label


def comparison_panels(comparison: Comparison) -> list[Panel]:
    """Differences by metric for the last common variant, and logged values over RAR steps of both runs."""
    last = comparison.differences[-1].variant
    rows = sum(each.variant == last for each in comparison.differences)
    title = f"{last}: {comparison.names[1]} minus {comparison.names[0]}, points"
    panels = [Panel(title, _differences(comparison, last), 1.4 + 0.2 * rows)]
    logs = [
        (f"{name}, round {each.number}", each.rar_log)
        for name, run in zip(comparison.names, (comparison.left, comparison.right), strict=True)
        for each in run.rounds
    ]
    for key, title in (("reward/mean", "reward"), ("rollout/attribute_pairs", "attribute pairs per valid output")):
        lines = [(label, log, key) for label, log in logs if any(record.get(key) is not None for record in log)]
        if lines:
            panels.append(Panel(title, lines_over_steps(lines)))
    return panels


def _differences(comparison: Comparison, variant: str) -> Draw:
    shown = [each for each in comparison.differences if each.variant == variant and each.change.mean is not None]

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
