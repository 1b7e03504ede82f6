"""Digests beside a checkpoint's shards, so that a damaged one is told before anything is read from it."""

from __future__ import annotations

import re

from afmrl_ray import storage
from afmrl_ray.errors import CheckpointError

_PARTITION = re.compile(r"zero_pp_rank_(\d+)_")
"""In DeepSpeed's names of files that hold one rank's share; all others are written by rank 0."""

_SEAL = "sealed-"


def _seal_name(rank: int) -> str:
    return f"{_SEAL}{rank}.json"


def _owner(name: str) -> int:
    found = _PARTITION.search(name)
    return int(found.group(1)) if found else 0


def write_checksums(directory: str, rank: int) -> None:
    """Note the SHA-256 of every file below `directory` that `rank` wrote."""
    digests = {
        name: storage.digest_file(storage.join(directory, name))
        for name in storage.list_files(directory)
        if _owner(name) == rank and not name.startswith(_SEAL)
    }
    storage.write_json(storage.join(directory, _seal_name(rank)), digests)


def verify_checksums(directory: str, *, location: str, wrote: int, rank: int, world: int, remedy: str) -> None:
    """See that what the ranks wrote is still there; each rank looks at its share of the seals.

    Args:
        directory: where the files are now.
        location: where a person finds them.
        wrote: number of ranks that wrote the checkpoint.
        remedy: what a person can do, beside putting a copy back.

    Raises:
        CheckpointError: a file is missing or its bytes are others; named.
    """
    for owner in range(rank, wrote, world):
        path = storage.join(directory, _seal_name(owner))
        if not storage.exists(path):
            raise CheckpointError(f"{location}: {_seal_name(owner)} is missing, the checkpoint is not whole; {remedy}")
        for name, digest in storage.read_json(path).items():
            file = storage.join(directory, name)
            if not storage.exists(file) or storage.digest_file(file) != digest:
                raise CheckpointError(
                    f"{location}: {name} is not what was saved (SHA-256 differs); put it back from a copy, or {remedy}"
                )
