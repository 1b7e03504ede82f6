"""Small pretrained checkpoints that are part of the package, named `package:<name>` where a path is expected."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from afmrl_ray.errors import CheckpointError

PREFIX = "package:"


def packaged_checkpoints() -> dict[str, Path]:
    """Folders of the packaged checkpoints by name; `afmrl_ray/assets/README.md` is their model card."""
    root = Path(str(resources.files("afmrl_ray"))) / "assets"
    return {folder.name: folder for folder in sorted(root.iterdir()) if (folder / "config.json").is_file()}


def resolve_checkpoint(path: str) -> str:
    """The folder of a packaged checkpoint for `package:<name>`; any other path is returned unchanged.

    Raises:
        CheckpointError: the package has no checkpoint of that name.
    """
    if not path.startswith(PREFIX):
        return path
    found = packaged_checkpoints()
    if (name := path.removeprefix(PREFIX)) not in found:
        names = ", ".join(f"{PREFIX}{each}" for each in found)
        raise CheckpointError(f"{path} is not a checkpoint of this package; it has {names}")
    return str(found[name])
