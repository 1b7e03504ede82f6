"""Numbers of a training: `metrics.jsonl` for programs and TensorBoard events for people, on any filesystem."""

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
"""Name of the gauge with the latest numbers of each training in Ray's own metrics; Ray puts `ray_` before it."""


class MetricsLog:
    """Appends one JSON object per step and mirrors it to TensorBoard, and to Ray's metrics where it has a name.

    Args:
        directory: where `metrics.jsonl` and the events stand, path or URI; remote ones are uploaded by `flush`.
        resume_step: steps from this one on are done again, so what was logged of them is dropped.
        training: label in Ray's metrics, which every node exports to Prometheus; none = not there.
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
            self._gauge = Gauge(GAUGE, "Latest number of a training, by name.", ("training", "metric"))
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
        """Write the numbers of one step; those that are not finite are written as null.

        Raises:
            StorageError: they cannot be written.
        """
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        with self._told():
            for name, value in values.items():
                record[name] = float(value) if math.isfinite(value) else None
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step)
                    if self._gauge is not None:
                        self._gauge.set(value, {"metric": name})
            with self._file.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Hand on what was logged.

        Raises:
            StorageError: it cannot be written.
        """
        with self._told():
            self._writer.flush()
            if self._target is not None:
                storage.copy_dir(str(self._directory), self._target)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self._target or self._directory}: cannot be written ({error})") from error

    def close(self) -> None:
        with self._told():
            self._writer.close()
        self.flush()
        if self._target is not None:
            shutil.rmtree(self._directory)


def results_of(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that the same training gives on any machine: without seconds, rates, memory and hits of caches."""
    measured = ("seconds_", "peak_memory_", "samples_per_", "tflops_per_", "mfu", "vision_cache_")
    return {name: value for name, value in values.items() if isinstance(value, float) and not name.startswith(measured)}


def read_metrics(directory: str) -> list[dict[str, Any]]:
    """The records of a `MetricsLog`, in order; empty if there is none."""
    path = storage.join(directory, "metrics.jsonl")
    if not storage.exists(path):
        return []
    return _records(storage.read_bytes(path).decode())


def _records(text: str) -> list[dict[str, Any]]:
    """One for each line, but for a last one that a full disk or a kill cut off."""
    lines = text.split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
