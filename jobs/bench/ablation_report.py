"""Table, JSON and image of the ablation: each reading against plain InfoNCE with the same seed and batches."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = ("hit@1", "hit@10", "map@10")
PLAIN = "plain InfoNCE"

Cells = Mapping[tuple[str, str], Mapping[int, Any]]
"""What a cell wrote, by (batches, reading) and seed."""


def summary(cells: Cells, protocols: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each kind of batches and reading: means over seeds with standard errors, in per cent."""
    rows = []
    for (batches, reading), by_seed in cells.items():
        row: dict[str, Any] = {"batches": batches, "reading": reading, "seeds": len(by_seed)}
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
    """Mean and its standard error; not a number where there are too few values."""
    if not values:
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def table(world: str, rows: Sequence[Mapping[str, Any]], protocols: Sequence[str]) -> str:
    """The rows as Markdown."""
    head = [f"{p} hit@1 %" for p in protocols] + [f"{p} gain" for p in protocols]
    lines = [
        f"| {world}: batches | reading | " + " | ".join(head) + " | masked % | weight p10 / p50 / p90 |",
        "| --- | --- |" + " --- |" * (len(head) + 2),
    ]
    for row in rows:
        shown = [_plus_minus(row[f"{p} hit@1"]) for p in protocols]
        gains = [_plus_minus(row[f"{p} hit@1 gain"], signed=True) for p in protocols]
        weights = " / ".join(f"{row[name]:.2f}" for name in ("weight_p10", "weight_p50", "weight_p90"))
        cells = [row["batches"], row["reading"], *shown, *gains, f"{100 * row['masked_fraction']:.1f}", weights]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plus_minus(pair: tuple[float, float], *, signed: bool = False) -> str:
    mean, error = pair
    if math.isnan(mean):
        return "-"
    return f"{mean:{'+' if signed else ''}.1f} ± {error:.1f}"


def image(worlds: Mapping[str, Sequence[Mapping[str, Any]]], primary_protocols: Mapping[str, str], path: Path) -> None:
    """Gain in hit@1 over plain InfoNCE with its standard error, a panel for each world and kind of batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (world, batches) for world, rows in worlds.items() for batches in dict.fromkeys(r["batches"] for r in rows)
    ]
    readings = list(
        dict.fromkeys(row["reading"] for rows in worlds.values() for row in rows if row["reading"] != PLAIN)
    )
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.2 * len(panels) + 2.4, 0.36 * len(readings) + 1.6), sharey=True, squeeze=False
    )
    for axis, (world, batches) in zip(axes[0], panels, strict=True):
        found = {
            row["reading"]: row[f"{primary_protocols[world]} hit@1 gain"]
            for row in worlds[world]
            if row["batches"] == batches
        }
        places = [place for place, reading in enumerate(readings) if reading in found]
        means, errors = zip(*(found[readings[place]] for place in places), strict=True)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.errorbar(means, places, xerr=errors, fmt="o", color="#1f5fa8", ecolor="#1f5fa8", capsize=3, markersize=5)
        axis.set_title(f"{world}, {batches}", fontsize=10)
        axis.set_xlabel("gain in hit@1, points", fontsize=9)
        axis.grid(axis="x", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(readings)), readings, fontsize=9)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(worlds: Mapping[str, Sequence[Mapping[str, Any]]], protocols: Mapping[str, Sequence[str]], out: Path) -> None:
    """Print the tables; write `<out>.json` and `<out>.png`. The first protocol of a world is its primary protocol."""
    for world, rows in worlds.items():
        print(f"\n{table(world, rows, protocols[world])}")
    out.with_suffix(".json").write_text(json.dumps(worlds, indent=2) + "\n")
    image(worlds, {world: names[0] for world, names in protocols.items()}, out.with_suffix(".png"))
    print(f"\n-> {out.with_suffix('.json')}, {out.with_suffix('.png')}")
