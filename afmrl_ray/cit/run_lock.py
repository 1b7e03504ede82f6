"""A lock on a run: one driver at a time, kept by a heartbeat in the run's directory, without comparing clocks."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

import psutil

from afmrl_ray import storage
from afmrl_ray.errors import StorageError

log = logging.getLogger(__name__)

FILE = "driver.json"
BEAT_S = 5.0
_MISSED = 3


class RunLock:
    """Context manager that holds a run.

    The driver increments a counter in `driver.json` every few seconds. A second driver that finds the file watches
    whether the counter changes; on the same machine it looks for the process instead. The file of a killed driver no
    longer changes, and the next driver takes it over.

    Args:
        run_path: directory of the run.
        beat_s: seconds between heartbeats.

    Raises:
        StorageError: on entering, another driver is alive.
    """

    def __init__(self, run_path: str, *, beat_s: float = BEAT_S) -> None:
        self._path = storage.join(run_path, FILE)
        self._run_path, self._beat_s = run_path, beat_s
        self._token = uuid.uuid4().hex
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self.lost: str | None = None
        """The driver that took over the run; none = this one still holds it."""

    def __enter__(self) -> RunLock:
        other = self._read()
        if other is not None and self._lives(other):
            raise StorageError(
                f"{self._run_path}: another driver, process {other['pid']} on {other['host']}, holds this run; wait "
                "for it or end it, or give this one another run.name"
            )
        self._write()
        written = self._read()
        if written is None or written["token"] != self._token:
            raise StorageError(f"{self._run_path}: another driver began at the same moment; start this one again")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        found = self._read()
        if found is not None and found["token"] == self._token:
            storage.remove(self._path)

    def check(self) -> None:
        """Check that the run is still held.

        Raises:
            StorageError: another driver took it over, since this one sent no heartbeat for too long.
        """
        if self.lost is not None:
            raise StorageError(
                f"{self._run_path}: {self.lost} took over the run while this driver sent no heartbeat; the run "
                "continues there"
            )

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                found = self._read()
                if found is not None and found["token"] != self._token:
                    self.lost = f"process {found['pid']} on {found['host']}"
                    return
                self._write()
            except (StorageError, OSError) as error:
                # A short outage of the storage does not end the run; writes that matter fail on their own.
                log.warning("the heartbeat could not be written: %s", error)

    def _write(self) -> None:
        self._count += 1
        process = psutil.Process()
        storage.write_json(
            self._path,
            {
                "token": self._token,
                "host": socket.gethostname(),
                "pid": process.pid,
                "started": process.create_time(),
                "count": self._count,
                "beat_s": self._beat_s,
            },
        )

    def _read(self) -> dict[str, Any] | None:
        if not storage.exists(self._path):
            return None
        try:
            return storage.read_json(self._path)
        except (StorageError, FileNotFoundError):
            # Removed meanwhile, or truncated by a full disk: no driver holds the run.
            return None

    def _lives(self, other: dict[str, Any]) -> bool:
        if other["host"] == socket.gethostname():
            return _is_running(other["pid"], other["started"]) and other["pid"] != os.getpid()
        patience = _MISSED * float(other["beat_s"])
        log.warning("%s was left by a driver on %s; watching it for %g s", self._path, other["host"], patience)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._beat_s))
            now = self._read()
            if now is None:
                return False
            if (now["token"], now["count"]) != (other["token"], other["count"]):
                return True
        return False


def _is_running(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1
    except psutil.NoSuchProcess:
        return False
