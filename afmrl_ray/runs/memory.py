"""Peak memory of the driver and everything it started, sampled while a stage runs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

import psutil

_PERIOD_S = 2.0


def process_tree() -> list[psutil.Process]:
    """This process and its descendants."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def memory_mb(processes: Sequence[psutil.Process]) -> float:
    """Memory of processes, MiB: proportional set sizes, so that shared pages count once."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, AttributeError):
            # The process ended while it was looked at, or the platform has no proportional sizes.
            continue
    return total / 2**20


def ray_is_elsewhere(processes: Sequence[psutil.Process]) -> bool:
    """Whether somebody else started the Ray that does the work, so that its actors are not among this process's own."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return not any(_name(process) == "raylet" for process in processes)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


class PeakMemory:
    """Context manager that samples `memory_mb` of the process tree in a thread.

    Attributes:
        peak_mb: the largest sample, MiB; none where the work is done by a Ray that this process did not start.
    """

    def __init__(self) -> None:
        self.peak_mb: float | None = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def _sample(self) -> None:
        while not ray_is_elsewhere(processes := process_tree()):
            self.peak_mb = max(self.peak_mb or 0.0, round(memory_mb(processes), 1))
            if self._stop.wait(_PERIOD_S):
                return
        self.peak_mb = None

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
