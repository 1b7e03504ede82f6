"""Conversion of a checkpoint for another number of workers, by DeepSpeed's universal checkpoint."""

from __future__ import annotations

import argparse
import io
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from torch import distributed as dist

from afmrl_ray.errors import CheckpointError

# What DeepSpeed raises if shards are missing, damaged or of a kind that it cannot merge.
_CONVERSION_ERRORS = (OSError, RuntimeError, ValueError, LookupError, AssertionError)


@contextmanager
def universal_checkpoint(directory: str, tag: str, *, writers: int) -> Iterator[str]:
    """Inside the context, a folder with a checkpoint that any number of workers can load; call it on every rank.

    One rank per node converts into a temporary folder, which the others of its node read. The original is unchanged.

    Args:
        directory: local folder of the checkpoint.
        tag: its DeepSpeed tag.
        writers: number of workers that wrote it.

    Raises:
        CheckpointError: a shard is missing or damaged.
    """
    with tempfile.TemporaryDirectory() as own:
        converts = int(os.environ["LOCAL_RANK"]) == 0
        if converts:
            try:
                _convert(os.path.join(directory, tag), os.path.join(own, tag))
            except _CONVERSION_ERRORS as error:
                raise CheckpointError(
                    f"{directory}: written by {writers} workers, cannot be converted for {dist.get_world_size()} "
                    f"({' '.join(str(error).split())}); use {writers} workers again, or remove it to start from the "
                    "first step"
                ) from error
        yield _of_this_node(own if converts else None)
        # The folder must exist until all ranks have read it.
        dist.barrier()


def _of_this_node(own: str | None) -> str:
    """The folder into which a rank of this node converted."""
    places: list[tuple[str, str | None]] = [("", None)] * dist.get_world_size()
    node = socket.gethostname()
    dist.all_gather_object(places, (node, own))
    return own or next(folder for host, folder in places if host == node and folder is not None)


def _convert(source: str, target: str) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=source,
        output_folder=target,
        # More workers would fork this process with its threads and accelerator context.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # ZeRO 1 and 2 write the universal checkpoint's version number only for tensor-parallel models.
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
