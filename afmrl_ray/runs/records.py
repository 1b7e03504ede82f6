"""Reading a run directory: `run.json`, and the record of every committed stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from afmrl_ray import storage
from afmrl_ray.errors import ConfigError, StorageError
from afmrl_ray.runs.names import StageName

RUN_RECORD = "run.json"
STAGE_RECORD = "stage.json"
RECORD_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "fingerprint": str,
    "inputs": dict,
    "attempt": str,
    "outputs": dict,
    "digests": dict,
    "metrics": dict,
    "committed_at": str,
    "seconds": (int, float),
    "peak_memory_mb": (int, float, type(None)),
}
"""Fields of a `stage.json` with their types."""


@dataclass(frozen=True)
class Stage:
    """A committed stage.

    Attributes:
        fingerprint: digest of the name and the inputs.
        directory: of the attempt that was committed.
        inputs: what decided the outputs: settings, upstream fingerprints, and so on, as JSON values.
        outputs: name to path relative to `directory`.
        digests: name of an output to the SHA-256 of its content.
        metrics: JSON values for the report.
        committed_at: time of the commit, ISO 8601, UTC.
        seconds: duration of the attempt that was committed; earlier attempts that were killed do not count.
        peak_memory_mb: of the driver and all processes that it started, MiB; None where it joined a running Ray.
    """

    name: str
    fingerprint: str
    directory: str
    inputs: dict[str, Any]
    outputs: dict[str, str]
    digests: dict[str, str]
    metrics: dict[str, Any]
    committed_at: str
    seconds: float
    peak_memory_mb: float | None

    def output(self, name: str) -> str:
        """Full path of an output."""
        return storage.join(self.directory, self.outputs[name])

    def settings(self, section: str) -> dict[str, Any] | None:
        """Values of a config section as the stage read them; None if its inputs do not record the section."""
        return self.inputs.get("config", {}).get(section)


class RunReader:
    """What a run has committed. `RunDirectory` also runs stages.

    Args:
        storage_path: folder or URI that holds the run.
        name: of the run.
    """

    def __init__(self, storage_path: str, name: str) -> None:
        self.path = storage.join(storage.absolute(storage_path), name)

    @classmethod
    def open(cls, path: str) -> Self:
        """The run at a folder or URI.

        Raises:
            ConfigError: there is none.
        """
        path = storage.absolute(path)
        run = cls(*storage.split(path))
        if not storage.exists(storage.join(run.path, RUN_RECORD)):
            raise ConfigError(f"run: {path} is not a run (it has no {RUN_RECORD}); name a run's folder, e.g. runs/demo")
        return run

    def read_run(self) -> dict[str, Any]:
        """The content of `run.json`: the config and command of the last job, versions, the catalogue's counts.

        Raises:
            StorageError: it is damaged.
        """
        return storage.read_json(storage.join(self.path, RUN_RECORD))

    def committed(self, name: StageName | str) -> Stage | None:
        """The stage of that name as it was last committed, whatever its inputs were.

        Raises:
            StorageError: its record is damaged.
        """
        path = storage.join(self.path, "stages", str(name), STAGE_RECORD)
        if not storage.exists(path):
            return None
        record = storage.read_json(path)
        if fault := _record_fault(record):
            raise StorageError(
                f"{path}: is not a stage record ({fault}); restore it from a copy, or remove it and run the same "
                "command to run the stage again"
            )
        return Stage(
            directory=storage.join(self.path, "stages", str(name), record["attempt"]),
            **{field: record[field] for field in RECORD_FIELDS if field != "attempt"},
        )

    def stages(self) -> list[Stage]:
        """All committed stages in the order of their commits."""
        root = storage.join(self.path, "stages")
        paths = (path.split("/") for path in storage.list_files(root))
        names = [parts[0] for parts in paths if len(parts) == 2 and parts[1] == STAGE_RECORD]
        found = [stage for name in names if (stage := self.committed(name)) is not None]
        return sorted(found, key=lambda stage: (stage.committed_at, stage.name))

    def rounds(self, kind: str) -> list[int]:
        """Rounds whose stage of a kind is committed, ascending."""
        names = [StageName.parse(stage.name) for stage in self.stages()]
        return sorted(name.round for name in names if name.kind == kind and name.round is not None)


def rerun_advice(path: str) -> str | None:
    """How to run the stage again that wrote a file or folder; None if the path does not lie in a stage's attempt."""
    run, found, rest = storage.absolute(path).rstrip("/").rpartition("/stages/")
    stage, *inside = rest.split("/")
    if not found or len(inside) < 2:
        return None
    return f"run stage {stage} again: remove {run}/stages/{stage} and run jobs/run_cit.py with the run's config"


def _record_fault(record: Any) -> str | None:
    """What is wrong with the content of a `stage.json`; None = nothing."""
    if not isinstance(record, dict):
        return "not an object"
    for name, kind in RECORD_FIELDS.items():
        if not isinstance(record.get(name), kind):
            return f"{name} is missing or has another type"
    for name in ("outputs", "digests"):
        if not all(isinstance(value, str) for value in record[name].values()):
            return f"{name} has a value that is not text"
    return None
