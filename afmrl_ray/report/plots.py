"""The charts of a run: metrics by variant, logged values over steps, cost by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from afmrl_ray.attributes.quality import NAME_FRACTION
from afmrl_ray.report.drawing import LIGHT, Draw, Panel, Theme, errorbar, legend_below, lines_over_steps, name_ticks
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.labels import metric_label, metric_order
from afmrl_ray.report.summary import Log, RunSummary, StageCost

Series = list[tuple[str, Log]]
"""Labels and logs, one line of a chart each."""


def plot_panels(summary: RunSummary) -> dict[str, list[Panel]]:
    """Panels by plot: `metrics`, `rar`, `agcl`, `stages`; an empty list where there is nothing to draw."""
    return {
        "metrics": metric_panels(summary),
        "rar": rar_panels(summary),
        "agcl": agcl_panels(summary),
        "stages": [Panel("seconds and peak memory", _stage_bars(summary), 0.9 + 0.22 * len(summary.stages))]
        if summary.stages
        else [],
    }


def metric_panels(summary: RunSummary) -> list[Panel]:
    """Retrieval, labels, attribute sizes and held-out reward by variant."""
    panels: list[Panel] = []
    for name in summary.protocols:
        results = [
            variant.protocols[name] for variant in summary.variants if name in variant.protocols and variant.trained
        ]
        if results:
            metrics = sorted({metric for result in results for metric in result.metrics}, key=metric_order)
            for title, shown in _panels_of(metrics):
                panels.append(Panel(f"{name}: {title}, %", _by_variant(summary, name, shown)))
    sizes = [each for variant in summary.variants if (each := variant.attributes) is not None]
    if sizes:
        panels.append(Panel("words and pairs of attributes per item", _attribute_sizes(summary)))
    if any(each.reward("eval/reward_after") for each in summary.rounds):
        panels.append(Panel("held-out reward before and after RAR", _heldout(summary)))
    return panels


def _panels_of(metrics: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Metrics by chart: hit@k apart from recall@k and mAP, whose values are close to it."""
    hits = [metric for metric in metrics if metric.startswith("hit@")]
    recalls = [metric for metric in metrics if metric.startswith(("recall@", "map@"))]
    labels = [metric for metric in metrics if "@" not in metric and metric != "mrr"]
    for title, shown in (("hit@k", hits), ("recall@k and mAP", recalls), ("classes and clusters", labels)):
        if shown:
            yield title, shown


def rar_panels(summary: RunSummary) -> list[Panel]:
    """Logged values over RAR steps, a line per round: rewards, KL, output lengths, log-probability difference."""
    logs = [(f"round {each.number}", each.rar_log) for each in summary.rounds]
    keys = (
        ("reward/mean", "reward"),
        ("rollout/invalid_fraction", "fraction of invalid outputs"),
        ("reward/zero_variance_fraction", "fraction of groups with zero variance"),
        ("actor/kl", "KL to the policy at the round's start, nats per token"),
        ("rollout/attribute_words", "words per valid output"),
        ("rollout/attribute_pairs", "attribute pairs per valid output"),
        ("rollout/completion_tokens", "tokens per completion"),
        ("actor/rollout_logprob_diff", "log-probability difference of sampler and learner, nats per token"),
    )
    named = [
        Panel(f"fraction of completions with the attribute, {label}", _over_steps_by_key(log, _name_keys(log)))
        for label, log in logs
        if _name_keys(log)
    ]
    return _step_panels(logs, keys) + named


def _name_keys(log: Log) -> dict[str, str]:
    """Log keys and labels of the most frequent attribute names of the first steps, at most one per colour."""
    keys = [key for key in log[0] if key.startswith(NAME_FRACTION)] if log else []
    most = sorted(keys, key=lambda key: -sum(record.get(key) or 0.0 for record in log[:5]))[: len(LIGHT.series)]
    return {key: key.removeprefix(NAME_FRACTION) for key in most}


def agcl_panels(summary: RunSummary) -> list[Panel]:
    """Logged values over AGCL steps, a line per round, and the loss of the distillation."""
    logs = [("baseline", summary.baseline_log), *[(f"round {each.number}", each.agcl_log) for each in summary.rounds]]
    keys = (
        ("train/loss", "AGCL loss"),
        ("train/accuracy", "in-batch accuracy"),
        ("train/masked_fraction", "fraction of masked negatives"),
        ("train/positive_similarity", "cosine similarity of positives"),
        ("train/weight_gradient_fraction", "gradient that the lexical weights move, fraction of it"),
        ("train/sibling_gradient_fraction", "gradient of negatives that comes from siblings, fraction of it"),
        ("train/mask_precision", "fraction of masked negatives that are duplicates"),
        ("train/mask_recall", "fraction of duplicates that are masked"),
    )
    return _step_panels([("distillation", summary.distill_log)], (("train/loss", "distillation loss"),)) + _step_panels(
        logs, keys
    )


def _step_panels(logs: Series, keys: Sequence[tuple[str, str]]) -> list[Panel]:
    panels: list[Panel] = []
    for key, title in keys:
        logged = [(label, log) for label, log in logs if any(record.get(key) is not None for record in log)]
        if logged:
            panels.append(Panel(title, _over_steps(logged, key)))
    return panels


def _over_steps(logs: Series, key: str) -> Draw:
    return lines_over_steps([(label, log, key) for label, log in logs])


def _over_steps_by_key(log: Log, labels: dict[str, str]) -> Draw:
    return lines_over_steps([(label, log, key) for key, label in labels.items()])


def _by_variant(summary: RunSummary, protocol: str, metrics: list[str]) -> Draw:
    variants = [variant for variant in summary.variants if variant.trained and protocol in variant.protocols]
    untrained = [variant for variant in summary.variants if not variant.trained and protocol in variant.protocols]

    def draw(axes: Axes, theme: Theme) -> None:
        for index, metric in enumerate(metrics):
            offset = 0.035 * (index - (len(metrics) - 1) / 2)
            values = [variant.protocols[protocol].metrics.get(metric, Estimate(None)) for variant in variants]
            errorbar(axes, theme, index, values, metric_label(metric), offset=offset, scale=100.0)
        for baseline, dash in zip(untrained, (":", "--"), strict=False):
            value = baseline.protocols[protocol].metrics.get(metrics[0])
            if value is not None and value.mean is not None:
                label = f"{baseline.name}, {metric_label(metrics[0])}"
                axes.axhline(100 * value.mean, color=theme.series[-1], linestyle=dash, linewidth=1, label=label)
        name_ticks(axes, [variant.name for variant in variants])
        legend_below(axes)

    return draw


def _attribute_sizes(summary: RunSummary) -> Draw:
    def draw(axes: Axes, theme: Theme) -> None:
        first = next((each.attributes for each in summary.rounds if each.attributes is not None), None)
        generators = [("distilled", first)] if first is not None else []
        generators += [(f"round {v.number}", v.attributes) for v in summary.variants if v.attributes is not None]
        for index, (name, label) in enumerate((("mean_words", "words"), ("mean_pairs", "pairs"))):
            values = [Estimate(getattr(sizes, name)) for _, sizes in generators]
            errorbar(axes, theme, index, values, label)
        name_ticks(axes, [name for name, _ in generators])
        axes.set_ylim(bottom=0)
        legend_below(axes)

    return draw


def _heldout(summary: RunSummary) -> Draw:
    rounds = [each for each in summary.rounds if each.reward("eval/reward_after")]

    def draw(axes: Axes, theme: Theme) -> None:
        for index, when in enumerate(("before", "after")):
            values = [each.reward(f"eval/reward_{when}") or Estimate(None) for each in rounds]
            errorbar(axes, theme, index, values, when, offset=0.12 * (index - 0.5), line=False)
        name_ticks(axes, [f"round {each.number}" for each in rounds])
        legend_below(axes)

    return draw


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
