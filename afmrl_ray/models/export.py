"""Export of a trained model or adapter as one ordinary checkpoint, readable without PEFT and without this project."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from afmrl_ray import storage
from afmrl_ray.errors import CheckpointError
from afmrl_ray.models.adapters import copy_processor, load_trained
from afmrl_ray.models.backbones import fetch
from afmrl_ray.models.model_settings import ModelSettings


def export_merged(path: str, out: str, settings: ModelSettings) -> None:
    """Merge an adapter into its base, or copy a whole model, to `out` with tokenizer, image processor and settings.

    Args:
        path: folder or URI of a model or adapter, or a hub name of a model.
        out: folder or URI, empty or new.
        settings: of the model; they decide the architecture that is loaded and the dtype that is written.

    Raises:
        CheckpointError: see `models.adapters.load_trained`; or `out` is not empty.
    """
    with new_folder(out) as local:
        model = load_trained(path, settings.checkpoint_role, dtype=settings.dtype)
        model.save_pretrained(local, safe_serialization=True)
        copy_processor(fetch(path), local)
        settings.write(local)


@contextmanager
def new_folder(out: str) -> Iterator[str]:
    """A local folder to write into, copied to `out` at the end, and not at all if writing fails.

    Args:
        out: folder or URI.

    Raises:
        CheckpointError: `out` is not empty.
    """
    if next(iter(storage.list_files(out)), None) is not None:
        raise CheckpointError(f"{out} is not empty; name another folder")
    with tempfile.TemporaryDirectory() as local:
        yield local
        storage.copy_dir(local, out)
