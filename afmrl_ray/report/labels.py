"""Display names and display order of metrics."""

from __future__ import annotations

import re

_ORDER = ("hit", "recall", "map", "map_m5", "mrr", "probe_accuracy", "knn_accuracy", "nmi", "ari", "purity")
_LABELS = {
    "map": "mAP",
    "map_m5": "mAP (M5)",
    "mrr": "MRR",
    "probe_accuracy": "probe accuracy",
    "knn_accuracy": "kNN accuracy",
    "nmi": "NMI",
    "ari": "ARI",
}


def metric_order(metric: str) -> tuple[int, int, str]:
    """Sort key: hit@k, recall@k, mAP, then label metrics; by k within each."""
    base, depth = _split(metric)
    return (_ORDER.index(base) if base in _ORDER else len(_ORDER), depth or 0, metric)


def metric_label(metric: str) -> str:
    """Display name of a metric, e.g. `mAP@10 (M5)` of `map_m5@10`."""
    base, depth = _split(metric)
    name, _, protocol = _LABELS.get(base, base).partition(" (")
    return name + (f"@{depth}" if depth is not None else "") + (f" ({protocol}" if protocol else "")


def _split(metric: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+)@(\d+)", metric)
    return (match[1], int(match[2])) if match else (metric, None)
