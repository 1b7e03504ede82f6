"""The few numbers at the top of the page."""

from __future__ import annotations

from dataclasses import dataclass

from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.format import format_duration
from afmrl_ray.report.summary import RunSummary


@dataclass(frozen=True)
class KeyFigure:
    """A labelled value; `note` is shown below it."""

    label: str
    value: str
    note: str = ""


def key_figures(summary: RunSummary) -> list[KeyFigure]:
    """hit@1, reward gain, attribute length and cost, as far as available; refused rounds do not count as results."""
    found = [_hit_figure(summary), _reward_figure(summary), _words_figure(summary), _cost_figure(summary)]
    return [figure for figure in found if figure is not None]


def _hit_figure(summary: RunSummary) -> KeyFigure | None:
    hits = [
        (variant, result.metrics["hit@1"])
        for variant in summary.variants
        if (result := variant.protocols.get(summary.primary_protocol)) is not None and "hit@1" in result.metrics
    ]
    trained = [(variant, hit) for variant, hit in hits if variant.trained and variant.number not in summary.refused]
    if not trained:
        return None
    last, value = trained[-1]
    others = [
        f"{variant.name}{' (refused)' if variant.number in summary.refused else ''} {_percent(hit)}"
        for variant, hit in hits
        if variant is not last
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
    return KeyFigure(f"held-out reward gain of RAR, round {number}", value, note)


def _words_figure(summary: RunSummary) -> KeyFigure | None:
    kept = [variant for variant in summary.variants if variant.number not in summary.refused]
    sizes = [(variant.name, variant.attributes) for variant in kept if variant.attributes is not None]
    if not sizes:
        return None
    name, last = sizes[-1]
    value = f"{last.mean_words:.1f}" if last.mean_words is not None else "-"
    return KeyFigure(
        f"words of attributes per item, {name}", value, f"invalid {_percent(Estimate(last.invalid_fraction))}"
    )


def _cost_figure(summary: RunSummary) -> KeyFigure | None:
    if not summary.stages:
        return None
    peak = summary.peak_memory_mb
    note = f"peak memory {peak / 1024:.1f} GiB" if peak is not None else ""
    return KeyFigure("all stages", format_duration(summary.seconds), note)


def _percent(value: Estimate) -> str:
    return f"{100 * value.mean:.1f} %" if value.mean is not None else "-"
