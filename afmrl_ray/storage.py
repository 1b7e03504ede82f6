"""Files on any filesystem that pyarrow knows: a folder, `s3://`, `gs://`, `hdfs://`.

Paths are strings: a local path or a URI. A single-file write is atomic where the filesystem can rename (local) or
publishes whole objects (object stores), so a reader never sees half a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from afmrl_ray.errors import StorageError

_PIECE_BYTES = 2**22


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of `path` and the path inside it; a local path is made absolute.

    Raises:
        StorageError: the URI's scheme is unknown to pyarrow.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    try:
        return pafs.FileSystem.from_uri(path)
    except (ValueError, OSError) as error:
        raise StorageError(f"{path}: not a path or URI that pyarrow can open ({error})") from error


def is_local(path: str) -> bool:
    """Whether `path` lies on this machine's own filesystem."""
    return isinstance(resolve(path)[0], pafs.LocalFileSystem)


def join(path: str, *parts: str) -> str:
    """Join with forward slashes, which serve local paths and URIs alike."""
    return "/".join([path.rstrip("/"), *parts])


def absolute(path: str) -> str:
    """A path that means the same from every folder; a URI does already."""
    return path if "://" in path else resolve(path)[1]


def parent(path: str) -> str:
    """The folder that holds `path`. (`..` is a name like any other on an object store.)"""
    return path.rstrip("/").rsplit("/", 1)[0]


def split(path: str) -> tuple[str, str]:
    """The folder that holds `path`, and the name of `path` in it; slashes at the end do not count."""
    folder, slash, name = path.rstrip("/").rpartition("/")
    return folder or slash, name


def exists(path: str) -> bool:
    filesystem, inner = resolve(path)
    return filesystem.get_file_info(inner).type != pafs.FileType.NotFound


def is_dir(path: str) -> bool:
    filesystem, inner = resolve(path)
    return filesystem.get_file_info(inner).type == pafs.FileType.Directory


def make_dir(path: str) -> None:
    """Create a directory and its parents.

    Raises:
        StorageError: it cannot be created.
    """
    filesystem, inner = resolve(path)
    try:
        filesystem.create_dir(inner, recursive=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error})") from error


def remove(path: str) -> None:
    """Remove a file or a whole directory; nothing happens if it is not there."""
    filesystem, inner = resolve(path)
    kind = filesystem.get_file_info(inner).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(inner)
    elif kind == pafs.FileType.File:
        filesystem.delete_file(inner)


def read_bytes(path: str) -> bytes:
    filesystem, inner = resolve(path)
    with filesystem.open_input_stream(inner) as stream:
        return stream.read()


def write_bytes(path: str, data: bytes) -> None:
    """Write a file so that readers see all of it or none of it; parents are created.

    Raises:
        StorageError: the path cannot be written.
    """
    filesystem, inner = resolve(path)
    try:
        filesystem.create_dir(os.path.dirname(inner), recursive=True)
        if isinstance(filesystem, pafs.LocalFileSystem):
            partial = f"{inner}.{uuid.uuid4().hex}.partial"
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, inner)
        else:
            with filesystem.open_output_stream(inner) as stream:
                stream.write(data)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error})") from error


def read_json(path: str) -> Any:
    """The value in a JSON file.

    Raises:
        StorageError: it is cut off or damaged.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: is damaged, it holds no JSON ({error})") from error


def write_json(path: str, value: Any) -> None:
    write_bytes(path, json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")


def list_files(path: str) -> Iterator[str]:
    """Yield the files below a directory as sorted paths relative to it."""
    filesystem, inner = resolve(path)
    selector = pafs.FileSelector(inner, recursive=True, allow_not_found=True)
    for name in sorted(info.path for info in filesystem.get_file_info(selector) if info.type == pafs.FileType.File):
        yield os.path.relpath(name, inner)


def copy_dir(source: str, target: str) -> None:
    """Copy a directory tree between any two filesystems."""
    from_fs, from_path = resolve(source)
    to_fs, to_path = resolve(target)
    to_fs.create_dir(to_path, recursive=True)
    pafs.copy_files(from_path, to_path, source_filesystem=from_fs, destination_filesystem=to_fs)


def localise(path: str, cache_dir: str) -> str:
    """Return a local directory with the content of `path`: itself when local, else a copy below `cache_dir`."""
    if is_local(path):
        return resolve(path)[1]
    target = Path(cache_dir) / hashlib.sha256(path.encode()).hexdigest()[:16]
    if not target.exists():
        partial = f"{target}.{uuid.uuid4().hex}.partial"
        copy_dir(path, partial)
        try:
            os.replace(partial, target)
        except OSError:
            # Another process finished the same copy first: both are complete, keep theirs.
            remove(partial)
    return str(target)


def digest_file(path: str) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    filesystem, inner = resolve(path)
    total = hashlib.sha256()
    with filesystem.open_input_stream(inner) as stream:
        while piece := stream.read(_PIECE_BYTES):
            total.update(piece)
    return total.hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, as 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
