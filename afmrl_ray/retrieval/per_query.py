"""Metrics of every query of an evaluation on disk, so that evaluations can be compared query by query."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from afmrl_ray import storage
from afmrl_ray.retrieval.evaluate import ProtocolResult
from afmrl_ray.runs import Stage

FILE = "per_query.safetensors"


def write_per_query(path: str, measured: Mapping[str, ProtocolResult]) -> None:
    """Write the metrics of every query, by protocol."""
    from safetensors.numpy import save

    columns = {
        f"{name}/{column}": np.ascontiguousarray(values)
        for name, found in measured.items()
        for column, values in {"rows": found.rows.astype(np.int64), **found.per_query}.items()
    }
    storage.write_bytes(path, save(columns))


def read_per_query(stage: Stage, protocol: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Catalogue rows [Q] and metric values [Q] of a stage with the output `per_query`."""
    from safetensors.numpy import load

    columns = load(storage.read_bytes(stage.output("per_query")))
    return columns[f"{protocol}/rows"], columns[f"{protocol}/{metric}"]
