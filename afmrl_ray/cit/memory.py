"""Peak memory of the driver and everything it started, sampled while a stage runs."""

from __future__ import annotations

import threading

import psutil

_PERIOD_S = 2.0


def tree_memory_mb() -> float:
    """Memory of this process and its descendants, MiB: proportional set sizes, so that shared pages count once."""
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, AttributeError):
            # The process ended while it was looked at, or the platform has no proportional sizes.
            continue
    return total / 2**20


class PeakMemory:
    """Context manager that samples `tree_memory_mb` in a thread; `peak_mb` holds the largest sample."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def _sample(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, round(tree_memory_mb(), 1))
            if self._stop.wait(_PERIOD_S):
                return

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
