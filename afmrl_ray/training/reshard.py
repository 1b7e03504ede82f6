"""A checkpoint for another number of workers than wrote it, by way of DeepSpeed's universal checkpoint."""

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

# What DeepSpeed raises where shards are missing, damaged or of a kind that it cannot join.
_CONVERSION_ERRORS = (OSError, RuntimeError, ValueError, LookupError, AssertionError)


@contextmanager
def universal_checkpoint(directory: str, tag: str, *, wrote: int) -> Iterator[str]:
    """Inside, a folder whose checkpoint `tag` any number of workers can load; call it on every rank.

    One rank per node converts into a temporary folder, which the others of its node read. The original is only read.

    Args:
        directory: local folder of the checkpoint.
        tag: its DeepSpeed tag.
        wrote: number of workers that wrote it.

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
                    f"{directory}: written by {wrote} workers, cannot be converted for {dist.get_world_size()} "
                    f"({' '.join(str(error).split())}); go back to {wrote} workers, or remove it to start afresh"
                ) from error
        yield _of_this_node(own if converts else None)
        # Nobody removes the folder before everybody has read.
        dist.barrier()


def _of_this_node(own: str | None) -> str:
    """The folder that this rank converted into, or another rank of its node did."""
    places: list[tuple[str, str | None]] = [("", None)] * dist.get_world_size()
    node = socket.gethostname()
    dist.all_gather_object(places, (node, own))
    return own or next(folder for host, folder in places if host == node and folder is not None)


def _convert(source: str, target: str) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=source,
        output_folder=target,
        # More would fork this process with its threads and its accelerator.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # ZeRO 1 and 2 write the universal checkpoint's version number only for tensor-parallel models.
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
