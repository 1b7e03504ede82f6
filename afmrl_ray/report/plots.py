"""Pictures of a run: metrics by round, RAR and training curves, seconds by stage."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np

from afmrl_ray.report.collect import Summary

matplotlib.use("Agg")

from matplotlib import pyplot as plt

_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "axes.titlesize": 11,
    "figure.dpi": 110,
}
_SMOOTHING = 5


def plots(summary: Summary) -> dict[str, bytes]:
    """PNG by name; what has no data is left out."""
    with plt.rc_context(_STYLE):
        made = {
            "rounds": _rounds(summary),
            "rar": _curves(
                summary,
                "rar-",
                {
                    "reward_mean": "mean reward",
                    "kl": "KL to the round's start, nats per token",
                    "attribute_pairs": "attribute pairs",
                    "invalid_share": "invalid share",
                    "zero_variance_share": "groups without variance",
                    "logprob_gap": "sampler/learner gap, nats per token",
                },
                "RAR step",
            ),
            "agcl": _curves(
                summary,
                ("agcl-", "baseline"),
                {
                    "loss": "loss, nats",
                    "accuracy": "in-batch accuracy",
                    "masked_share": "masked share",
                    "weight_p50": "median relative weight of negatives",
                },
                "AGCL step",
            ),
            "distill": _curves(summary, "distill", {"loss": "loss, nats per token"}, "distillation step"),
            "stages": _stages(summary),
        }
    return {name: data for name, data in made.items() if data is not None}


def _rounds(summary: Summary) -> bytes | None:
    columns = [column for column in summary.columns if summary.headline in column.protocols]
    if not columns:
        return None
    figure, axes = plt.subplots(figsize=(7, 3.6))
    names = [n for n in columns[0].protocols[summary.headline]["metrics"] if n.startswith(("hit@", "map@"))]
    places = np.arange(len(columns))
    for offset, name in enumerate(names):
        values = [column.protocols[summary.headline]["metrics"][name] for column in columns]
        means = 100 * np.array([value["mean"] for value in values])
        low = means - 100 * np.array([value["low"] for value in values])
        high = 100 * np.array([value["high"] for value in values]) - means
        shift = (offset - (len(names) - 1) / 2) * 0.06
        axes.errorbar(places + shift, means, yerr=[low, high], marker="o", capsize=3, label=name)
    axes.set_xticks(places, [column.title for column in columns])
    axes.set_ylabel("percent, 95 % interval")
    axes.set_title(f"protocol {summary.headline}")
    axes.legend(frameon=False, ncols=len(names), fontsize=9)
    return _png(figure)


def _curves(summary: Summary, prefix: str | tuple[str, ...], shown: dict[str, str], step: str) -> bytes | None:
    stages = [name for name in summary.curves if name.startswith(prefix)]
    shown = {
        key: label
        for key, label in shown.items()
        if any(record.get(key) is not None for name in stages for record in summary.curves[name])
    }
    if not shown:
        return None
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4.6 * columns, 2.5 * lines), squeeze=False)
    for axes, (key, label) in zip(grid.flat, shown.items(), strict=False):
        for name in stages:
            points = [(r["step"], r[key]) for r in summary.curves[name] if r.get(key) is not None]
            if points:
                _line(axes, points, name)
        axes.set_title(label)
        axes.set_xlabel(step)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_visible(False)
    if len(stages) > 1:
        grid.flat[0].legend(frameon=False, fontsize=9)
    return _png(figure)


def _line(axes: Any, points: list[tuple[int, float]], label: str) -> None:
    """The numbers, faint, and their moving mean."""
    steps, values = np.array(points, dtype=float).T
    window = min(_SMOOTHING, len(values))
    drawn = axes.plot(steps, values, alpha=0.3, linewidth=1)[0]
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], smooth, color=drawn.get_color(), linewidth=1.8, label=label)


def _stages(summary: Summary) -> bytes | None:
    if not summary.stages:
        return None
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.24 * len(summary.stages)))
    names = [stage.name for stage in summary.stages]
    axes.barh(names, [stage.seconds for stage in summary.stages], color="#4878a8")
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title("stages")
    return _png(figure)


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.tight_layout()
    figure.savefig(data, format="png")
    plt.close(figure)
    return data.getvalue()
