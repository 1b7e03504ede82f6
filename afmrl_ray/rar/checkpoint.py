"""Checkpoints of a RAR: the engine's shards, and a manifest that is written last."""

from __future__ import annotations

from typing import Any

from afmrl_ray import storage

_KEPT = 2
"""Latest checkpoints that are kept."""


class Checkpoints:
    """`<directory>/step_<n>/` with `engine/` and, once complete, `manifest.json`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def engine_path(self, step: int) -> str:
        """Where the engine's shards of a checkpoint are."""
        return storage.join(self._path(step), "engine")

    def commit(self, step: int, manifest: dict[str, Any], *, keep: int | None = None) -> None:
        """Complete the checkpoint whose shards are at `engine_path(step)`.

        All checkpoints are removed but the latest ones and that of step `keep`.
        """
        storage.write_json(storage.join(self._path(step), "manifest.json"), {"step": step, **manifest})
        for old in self.steps()[:-_KEPT]:
            if old != keep:
                storage.remove(self._path(old))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = [path.split("/") for path in storage.list_files(self._directory)]
        return sorted(int(name[0].removeprefix("step_")) for name in names if name[1:] == ["manifest.json"])

    def latest(self) -> dict[str, Any] | None:
        """The manifest of the latest complete checkpoint."""
        steps = self.steps()
        return storage.read_json(storage.join(self._path(steps[-1]), "manifest.json")) if steps else None

    def _path(self, step: int) -> str:
        return storage.join(self._directory, f"step_{step:07d}")
