"""Metrics of a training: `metrics.jsonl`, TensorBoard events and Ray gauges, on any filesystem.

Names have a name space: `train/` (loss, gradient, optimizer), `data/` (what a step was trained on), `time/` (seconds,
rates, memory). RAR has its own beside them.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from afmrl_ray import storage
from afmrl_ray.errors import StorageError

GAUGE = "afmrl_training"
"""Gauge of Ray's metrics with the latest value of each metric of each training; Ray adds the prefix `ray_`."""


class MetricsLog:
    """Appends one JSON object per step and mirrors it to TensorBoard and to Ray's metrics.

    Args:
        directory: of `metrics.jsonl` and the events, path or URI; remote ones are uploaded by `flush`.
        resume_step: records of this step and later ones are dropped, since these steps are trained again.
        training: label in Ray's metrics, which every node exports to Prometheus; none = no Ray metrics.
    """

    def __init__(self, directory: str, *, resume_step: int = 0, training: str | None = None) -> None:
        from ray.util.metrics import Gauge
        from torch.utils.tensorboard import SummaryWriter

        self._target = None if storage.is_local(directory) else directory
        self._directory = Path(storage.resolve(directory)[1] if self._target is None else tempfile.mkdtemp())
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = self._directory / "metrics.jsonl"
        self._drop_from(resume_step, directory)
        self._gauge = None
        if training is not None:
            self._gauge = Gauge(GAUGE, "Latest value of a training's metric.", ("training", "metric"))
            self._gauge.set_default_tags({"training": training})
        self._writer = SummaryWriter(str(self._directory / "tensorboard"), purge_step=resume_step or None)

    def _drop_from(self, step: int, directory: str) -> None:
        if self._target is not None and storage.exists(storage.join(directory, "metrics.jsonl")):
            self._file.write_bytes(storage.read_bytes(storage.join(directory, "metrics.jsonl")))
        if not self._file.exists():
            return
        kept = [record for record in _records(self._file.read_text()) if record["step"] < step]
        self._file.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of one step; values that are not finite are written as null.

        Raises:
            StorageError: they cannot be written.
        """
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        with self._storage_errors():
            for name, value in values.items():
                record[name] = float(value) if math.isfinite(value) else None
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step)
                    if self._gauge is not None:
                        self._gauge.set(value, {"metric": name})
            with self._file.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Make everything logged so far durable: flush the events, upload to a remote directory.

        Raises:
            StorageError: it cannot be written.
        """
        with self._storage_errors():
            self._writer.flush()
            if self._target is not None:
                storage.copy_dir(str(self._directory), self._target)

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Raise a failure to write as the user's error."""
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self._target or self._directory}: cannot be written ({error})") from error

    def close(self) -> None:
        """Flush, and release the files.

        Raises:
            StorageError: it cannot be written.
        """
        with self._storage_errors():
            self._writer.close()
        self.flush()
        if self._target is not None:
            shutil.rmtree(self._directory)


def results_of(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that do not depend on the machine: without `time/` and the hits of the vision cache."""
    measured = ("time/", "data/vision_cache_")
    return {name: value for name, value in values.items() if isinstance(value, float) and not name.startswith(measured)}


def read_metrics(directory: str) -> list[dict[str, Any]]:
    """The records of a `MetricsLog`, in order; empty if there is none."""
    path = storage.join(directory, "metrics.jsonl")
    if not storage.exists(path):
        return []
    return _records(storage.read_bytes(path).decode())


def _records(text: str) -> list[dict[str, Any]]:
    """The record of each line; a last line without its end, cut off by a full disk or a kill, is dropped."""
    lines = text.split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
