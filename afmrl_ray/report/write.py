"""Writes the report of a run: `index.html`, the charts as PNG and `report.json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from afmrl_ray import storage
from afmrl_ray.report.collect import collect
from afmrl_ray.report.compare import Comparison
from afmrl_ray.report.drawing import draw_png
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.gallery import Items
from afmrl_ray.report.html import render, render_comparison
from afmrl_ray.report.plots import plot_panels
from afmrl_ray.report.summary import Round, RunSummary, Variant
from afmrl_ray.runs import RunDirectory


def write_report(run: RunDirectory, *, items: Items | None = None) -> str:
    """Write `report/` below the run's directory and return the path of its `index.html`.

    Args:
        run: the run, finished or not.
        items: source of the example images; None = examples are shown as text only.

    Raises:
        StorageError: the path holds no run, or it cannot be written.
    """
    summary = collect(run)
    directory = storage.join(run.path, "report")
    for name, panels in plot_panels(summary).items():
        path = storage.join(directory, f"{name}.png")
        if panels:
            storage.write_bytes(path, draw_png(panels))
        else:
            storage.remove(path)
    storage.write_json(storage.join(directory, "report.json"), report_record(summary))
    index = storage.join(directory, "index.html")
    storage.write_bytes(index, render(summary, items=items).encode())
    return index


def write_comparison(comparison: Comparison, path: str) -> None:
    """Write the comparison of two runs as one HTML page.

    Raises:
        StorageError: it cannot be written.
    """
    storage.write_bytes(path, render_comparison(comparison).encode())


def report_record(summary: RunSummary) -> dict[str, Any]:
    """The content of `report.json`: fractions between 0 and 1, seconds, MiB; null where nothing was measured."""
    return {
        "name": summary.name,
        "command": summary.command,
        "versions": summary.versions,
        "catalogue": summary.catalogue,
        "primary_protocol": summary.primary_protocol,
        "variants": [_variant(variant, summary) for variant in summary.variants],
        "rounds": [_round(each) for each in summary.rounds],
        "attachments": {each.name: {"title": each.title, "record": each.record} for each in summary.attachments},
        "stages": [asdict(stage) for stage in summary.stages],
        "seconds": summary.seconds,
        "peak_memory_mb": summary.peak_memory_mb,
    }


def _variant(variant: Variant, summary: RunSummary) -> dict[str, Any]:
    return {
        "name": variant.name,
        "round": variant.number,
        "stage": variant.stage,
        "stale": variant.stage in summary.stale,
        "protocols": {name: asdict(result) for name, result in variant.protocols.items()},
        "attributes": asdict(variant.attributes) if variant.attributes is not None else None,
    }


def _round(each: Round) -> dict[str, Any]:
    return {
        "round": each.number,
        "attributes_before": asdict(each.attributes) if each.attributes is not None else None,
        "agcl": _estimates(each.agcl),
        "rar": _estimates(each.rar),
        "promotion": asdict(each.promotion) if each.promotion is not None else None,
    }


def _estimates(metrics: dict[str, Any]) -> dict[str, Any]:
    """Objects with a mean stay objects and numbers stay numbers; values that are not finite become null."""
    return {
        name: asdict(Estimate.of(value)) if isinstance(value, dict) else Estimate.of(value).mean
        for name, value in metrics.items()
    }
