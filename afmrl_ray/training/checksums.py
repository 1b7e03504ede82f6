"""SHA-256 checksums beside a checkpoint's shards, so that damage is found before anything is loaded."""

from __future__ import annotations

import re

from afmrl_ray import storage
from afmrl_ray.errors import CheckpointError

_PARTITION = re.compile(r"zero_pp_rank_(\d+)_")
"""In DeepSpeed's names of files that hold one rank's partition; rank 0 writes all others."""

_PREFIX = "checksums-"


def _file_name(rank: int) -> str:
    return f"{_PREFIX}{rank}.json"


def _writer(name: str) -> int:
    """The rank that wrote a file."""
    found = _PARTITION.search(name)
    return int(found.group(1)) if found else 0


def write_checksums(directory: str, rank: int) -> None:
    """Write the SHA-256 of every file below `directory` that `rank` wrote to `checksums-<rank>.json`."""
    digests = {
        name: storage.digest_file(storage.join(directory, name))
        for name in storage.list_files(directory)
        if _writer(name) == rank and not name.startswith(_PREFIX)
    }
    storage.write_json(storage.join(directory, _file_name(rank)), digests)


def verify_checksums(directory: str, *, location: str, writers: int, rank: int, world: int, remedy: str) -> None:
    """Compare the files of a checkpoint with their checksums; each rank checks the files of some writers.

    Args:
        directory: of the files.
        location: where a user finds them, for messages.
        writers: number of ranks that wrote the checkpoint.
        rank: of this worker.
        world: number of workers that check.
        remedy: what a user can do, other than restoring a copy, for messages.

    Raises:
        CheckpointError: a file is missing or damaged; the message names it.
    """
    for writer in range(rank, writers, world):
        path = storage.join(directory, _file_name(writer))
        if not storage.exists(path):
            raise CheckpointError(
                f"{location}: {_file_name(writer)} is missing, so the checkpoint is incomplete; {remedy}"
            )
        for name, digest in storage.read_json(path).items():
            file = storage.join(directory, name)
            if not storage.exists(file) or storage.digest_file(file) != digest:
                raise CheckpointError(
                    f"{location}: {name} is damaged or missing (SHA-256 differs); restore it from a copy, or {remedy}"
                )
