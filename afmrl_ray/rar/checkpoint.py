"""Checkpoints of a RAR: the engine's shards, and a manifest that is written last."""

from __future__ import annotations

from typing import Any

from afmrl_ray import storage

_KEPT = 2


class Checkpoints:
    """`<directory>/step_<n>/` with `engine/` and, once complete, `manifest.json`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def engine_path(self, step: int) -> str:
        return storage.join(self._directory, f"step_{step:07d}", "engine")

    def commit(self, step: int, manifest: dict[str, Any]) -> None:
        """Make the shards written to `engine_path(step)` count, and drop all but the latest checkpoints."""
        path = storage.join(self._directory, f"step_{step:07d}", "manifest.json")
        storage.write_json(path, {"step": step, **manifest})
        for old in self.steps()[:-_KEPT]:
            storage.remove(storage.join(self._directory, f"step_{old:07d}"))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = [path.split("/") for path in storage.list_files(self._directory)]
        return sorted(int(name[0].removeprefix("step_")) for name in names if name[1:] == ["manifest.json"])

    def latest(self) -> dict[str, Any] | None:
        """The manifest of the latest complete checkpoint."""
        steps = self.steps()
        if not steps:
            return None
        return storage.read_json(storage.join(self._directory, f"step_{steps[-1]:07d}", "manifest.json"))
