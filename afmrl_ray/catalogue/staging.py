"""Staging: a local, memory-mapped copy of the usable rows of a catalogue, for random access by workers."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa

from afmrl_ray import storage
from afmrl_ray.catalogue.reading import Catalogue, open_catalogue
from afmrl_ray.catalogue.table import CatalogueTable
from afmrl_ray.config.catalogue import CatalogueConfig
from afmrl_ray.errors import CatalogueError, StorageError

_ROWS_PER_BATCH = 256


class StagedCatalogue(CatalogueTable):
    """A staged catalogue; it pickles as its path, and the file is mapped where it is unpickled.

    Args:
        path: Arrow IPC file that `stage` wrote.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(path))
        metadata = reader.schema.metadata or {}
        super().__init__(reader.read_all(), metadata[b"name"].decode(), metadata[b"fingerprint"].decode())

    def __reduce__(self) -> tuple[type[StagedCatalogue], tuple[str]]:
        return StagedCatalogue, (self.path,)


@dataclass(frozen=True)
class CatalogueRef:
    """A reference to a catalogue that any process on any node can open.

    Attributes:
        path: of the catalogue, local or URI.
        config: limits and cache folder.
        fingerprint: that the content must have.
    """

    path: str
    config: CatalogueConfig
    fingerprint: str

    def open(self) -> StagedCatalogue:
        """Open this node's staged copy; the first use writes it.

        Raises:
            CatalogueError: the catalogue's content differs from `fingerprint`.
        """
        return _open_staged(staged_path(self.config, self.fingerprint), self)


@lru_cache(maxsize=4)
def _open_staged(path: str, ref: CatalogueRef) -> StagedCatalogue:
    if not os.path.exists(path):
        catalogue = open_catalogue(ref.path, config=ref.config)
        if catalogue.fingerprint != ref.fingerprint:
            raise CatalogueError(f"{ref.path}: the catalogue changed while it was in use; start the job again")
        stage(catalogue, ref.config)
    return StagedCatalogue(path)


def staged_path(config: CatalogueConfig, fingerprint: str) -> str:
    """Path of the staged copy of a catalogue, the same on every node."""
    folder = config.cache_dir or storage.user_cache()
    return os.path.join(folder, f"{fingerprint[:32]}.arrow")


def stage(catalogue: Catalogue, config: CatalogueConfig) -> str:
    """Write the staged copy unless it exists, and return its path; safe for concurrent processes (atomic rename).

    Raises:
        StorageError: the folder cannot be created.
    """
    path = staged_path(config, catalogue.fingerprint)
    if os.path.exists(path):
        return path
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"catalogue.cache_dir: {os.path.dirname(path)} cannot be created ({error.strerror})"
        ) from error
    table = catalogue.table.replace_schema_metadata({"name": catalogue.name, "fingerprint": catalogue.fingerprint})
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    with pa.OSFile(partial, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=_ROWS_PER_BATCH)
    os.replace(partial, path)
    return path
