"""Table, JSON and chart of the loss ablation: each variant against plain InfoNCE with the same seed and batches."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afmrl_ray.report.text_table import TextTable

METRICS = ("hit@1", "hit@10", "map@10")
PLAIN = "plain InfoNCE"

Cells = Mapping[tuple[str, str], Mapping[int, Any]]
"""Results of the cells, by (batches, variant) and seed."""


def summary(cells: Cells, protocols: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each kind of batches and variant: means over seeds with standard errors, in per cent."""
    rows = []
    for (batches, variant), by_seed in cells.items():
        row: dict[str, Any] = {"batches": batches, "variant": variant, "seeds": len(by_seed)}
        for name in ("masked_fraction", "weight_p10", "weight_p50", "weight_p90"):
            row[name] = statistics.fmean(found["stats"][name] for found in by_seed.values())
        for protocol in protocols:
            for metric in METRICS:
                values = {seed: value(found, protocol, metric) for seed, found in by_seed.items()}
                row[f"{protocol} {metric}"] = mean_and_error(list(values.values()))
                plain = cells.get((batches, PLAIN), {})
                paired = [values[seed] - value(plain[seed], protocol, metric) for seed in values if seed in plain]
                row[f"{protocol} {metric} gain"] = mean_and_error(paired)
        rows.append(row)
    return rows


def value(found: Mapping[str, Any], protocol: str, metric: str) -> float:
    return 100 * found["protocols"][protocol]["metrics"][metric]["mean"]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN where there are too few values."""
    if not values:
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def table(dataset: str, rows: Sequence[Mapping[str, Any]], protocols: Sequence[str]) -> TextTable:
    """hit@1 of every protocol, gains over plain InfoNCE, and statistics of mask and weights."""
    head = [f"{p} hit@1 %" for p in protocols] + [f"{p} gain" for p in protocols]
    lines = []
    for row in rows:
        shown = [_plus_minus(row[f"{p} hit@1"]) for p in protocols]
        gains = [_plus_minus(row[f"{p} hit@1 gain"], signed=True) for p in protocols]
        weights = " / ".join(f"{row[name]:.2f}" for name in ("weight_p10", "weight_p50", "weight_p90"))
        cells = [row["batches"], row["variant"], *shown, *gains, f"{100 * row['masked_fraction']:.1f}", weights]
        lines.append(cells)
    return TextTable(dataset, ["batches", "variant", *head, "masked %", "weight p10 / p50 / p90"], lines, left=2)


def _plus_minus(pair: tuple[float, float], *, signed: bool = False) -> str:
    mean, error = pair
    if math.isnan(mean):
        return "-"
    return f"{mean:{'+' if signed else ''}.1f} ± {error:.1f}"


def chart(
    datasets: Mapping[str, Sequence[Mapping[str, Any]]], primary_protocols: Mapping[str, str], path: Path
) -> None:
    """Gain in hit@1 over plain InfoNCE with its standard error, a panel for each dataset and kind of batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (dataset, batches)
        for dataset, rows in datasets.items()
        for batches in dict.fromkeys(r["batches"] for r in rows)
    ]
    variants = list(
        dict.fromkeys(row["variant"] for rows in datasets.values() for row in rows if row["variant"] != PLAIN)
    )
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.2 * len(panels) + 2.4, 0.36 * len(variants) + 1.6), sharey=True, squeeze=False
    )
    for axis, (dataset, batches) in zip(axes[0], panels, strict=True):
        found = {
            row["variant"]: row[f"{primary_protocols[dataset]} hit@1 gain"]
            for row in datasets[dataset]
            if row["batches"] == batches
        }
        places = [place for place, variant in enumerate(variants) if variant in found]
        means, errors = zip(*(found[variants[place]] for place in places), strict=True)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.errorbar(means, places, xerr=errors, fmt="o", color="#1f5fa8", ecolor="#1f5fa8", capsize=3, markersize=5)
        axis.set_title(f"{dataset}, {batches}", fontsize=10)
        axis.set_xlabel("gain in hit@1, points", fontsize=9)
        axis.grid(axis="x", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(variants)), variants, fontsize=9)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(
    datasets: Mapping[str, Sequence[Mapping[str, Any]]], protocols: Mapping[str, Sequence[str]], out: Path
) -> None:
    """Print the tables; write `<out>.json` and `<out>.png`. The first protocol of a dataset is its primary protocol."""
    for dataset, rows in datasets.items():
        print(f"\n{table(dataset, rows, protocols[dataset]).markdown()}")
    out.with_suffix(".json").write_text(json.dumps(datasets, indent=2) + "\n")
    chart(datasets, {dataset: names[0] for dataset, names in protocols.items()}, out.with_suffix(".png"))
    print(f"\n-> {out.with_suffix('.json')}, {out.with_suffix('.png')}")
