"""The run directory: stages with inputs, outputs and a commit.

A stage's fingerprint is a digest of its inputs: the settings that it reads and the fingerprints of its upstream stages.
A committed stage with the same fingerprint is skipped, so running the same command again resumes, and a changed setting
re-runs exactly what depends on it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from afmrl_ray import storage
from afmrl_ray.errors import StorageError
from afmrl_ray.runs.memory import PeakMemory
from afmrl_ray.runs.records import RUN_RECORD, STAGE_RECORD, RunReader, Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageOutcome:
    """The result of a stage function.

    Attributes:
        outputs: name to path relative to the attempt directory.
        metrics: JSON values for the report.
    """

    outputs: dict[str, str]
    metrics: dict[str, Any]


StageFunction = Callable[[str], StageOutcome]


class RunDirectory(RunReader):
    """`<storage_path>/<run>/` with `run.json` and one folder per stage, which it runs and commits."""

    def __init__(self, storage_path: str, name: str) -> None:
        super().__init__(storage_path, name)
        self.guard: Callable[[], None] = lambda: None
        """Called before a stage begins and before it is committed; raises if this process may not."""
        self._verified: set[str] = set()

    def create(self) -> None:
        """Make the directory and see that it can be written.

        Raises:
            StorageError: it cannot.
        """
        probe = storage.join(self.path, ".writable")
        try:
            storage.make_dir(self.path)
            storage.write_bytes(probe, b"")
        except StorageError as error:
            raise StorageError(f"{error}; set run.storage_path to a writable place") from error
        storage.remove(probe)

    def write_run(self, record: dict[str, Any]) -> None:
        storage.write_json(storage.join(self.path, RUN_RECORD), record)

    def run_stage(
        self, name: str, inputs: dict[str, Any], function: StageFunction, *, resumable: bool = False
    ) -> Stage:
        """Return the committed stage with these inputs, running `function` first if there is none.

        Args:
            inputs: JSON values that determine the outputs.
            function: called with the attempt's directory; writes its outputs below it and returns them.
            resumable: whether `function` continues from what an interrupted attempt with the same inputs left behind;
                otherwise the directory is empty when it is called.
        """
        fingerprint = stage_fingerprint(name, inputs)
        found = self.committed(name)
        self.guard()
        if found is not None and found.fingerprint == fingerprint and self._outputs_exist(found):
            self._verify(found)
            log.info("stage %s: committed, skipped", name)
            return found
        if found is not None and found.fingerprint == fingerprint:
            # Its outputs are about to be overwritten in place, so the record is invalid until the next commit.
            storage.remove(storage.join(self.path, "stages", name, STAGE_RECORD))
        attempt = fingerprint[:12]
        directory = storage.join(self.path, "stages", name, attempt)
        if not resumable:
            storage.remove(directory)
        storage.make_dir(directory)
        log.info("stage %s: running", name)
        began = time.monotonic()
        with PeakMemory() as memory:
            try:
                outcome = function(directory)
            except Exception as error:
                error.add_note(f"in stage {name}")
                raise
        record = {
            "name": name,
            "fingerprint": fingerprint,
            "inputs": inputs,
            "attempt": attempt,
            "outputs": outcome.outputs,
            "digests": {key: digest_path(storage.join(directory, path)) for key, path in outcome.outputs.items()},
            "metrics": outcome.metrics,
            "seconds": round(time.monotonic() - began, 2),
            "peak_memory_mb": memory.peak_mb,
            "committed_at": datetime.now(UTC).isoformat(),
        }
        self.guard()
        storage.write_json(storage.join(self.path, "stages", name, STAGE_RECORD), record)
        self._verified.add(fingerprint)
        log.info("stage %s: committed after %.1f s", name, record["seconds"])
        committed = self.committed(name)
        assert committed is not None
        return committed

    def _verify(self, stage: Stage) -> None:
        """Check once that outputs are what was committed.

        Raises:
            StorageError: a digest differs.
        """
        if stage.fingerprint in self._verified:
            return
        for name in stage.outputs:
            path = stage.output(name)
            if digest_path(path) != stage.digests.get(name):
                record = storage.join(self.path, "stages", stage.name, STAGE_RECORD)
                raise StorageError(
                    f"stage {stage.name}: {path} is not what was committed (SHA-256 differs); restore it from a copy, "
                    f"or remove {record} and run the same command to run the stage again"
                )
        self._verified.add(stage.fingerprint)

    @staticmethod
    def _outputs_exist(stage: Stage) -> bool:
        return all(storage.exists(stage.output(name)) for name in stage.outputs)


def stage_fingerprint(name: str, inputs: Mapping[str, Any]) -> str:
    """SHA-256 of a stage's name and inputs, as JSON."""
    return storage.digest({"stage": name, "inputs": inputs})


def digest_path(path: str) -> str:
    """SHA-256 over the names and bytes of a file or of all files below a directory."""
    total = hashlib.sha256()
    if storage.is_dir(path):
        for name in storage.list_files(path):
            total.update(name.encode() + b"\0" + bytes.fromhex(storage.digest_file(storage.join(path, name))))
        return total.hexdigest()
    return storage.digest_file(path)
