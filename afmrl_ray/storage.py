"""Files on any filesystem that pyarrow supports: local, `s3://`, `gs://`, `hdfs://`.

Paths are strings: a local path or a URI. Writes of single files are atomic on local filesystems (by renaming) and on
object stores (which publish whole objects), so a reader never sees a partial file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from afmrl_ray.errors import StorageError
from afmrl_ray.user_name import user_name

_CHUNK_BYTES = 2**22


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of `path`, and the path inside it; a local path is made absolute.

    Raises:
        StorageError: pyarrow does not support the URI's scheme.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    try:
        return pafs.FileSystem.from_uri(path)
    except (ValueError, OSError) as error:
        raise StorageError(f"{path}: not a path or URI that pyarrow can open ({error})") from error


def is_local(path: str) -> bool:
    """Whether `path` is on the local filesystem."""
    return isinstance(resolve(path)[0], pafs.LocalFileSystem)


def join(path: str, *parts: str) -> str:
    """Join with forward slashes, for local paths and URIs."""
    return "/".join([path.rstrip("/"), *parts])


def absolute(path: str) -> str:
    """The absolute path of a local path; URIs are returned unchanged."""
    return path if "://" in path else resolve(path)[1]


def parent(path: str) -> str:
    """The folder of `path`. (Object stores do not resolve `..`.)"""
    return path.rstrip("/").rsplit("/", 1)[0]


def split(path: str) -> tuple[str, str]:
    """The folder of `path` and the last component of `path`; trailing slashes are ignored."""
    folder, slash, name = path.rstrip("/").rpartition("/")
    return folder or slash, name


def exists(path: str) -> bool:
    """Whether a file or directory exists at `path`."""
    filesystem, inner = resolve(path)
    return filesystem.get_file_info(inner).type != pafs.FileType.NotFound


def is_dir(path: str) -> bool:
    """Whether `path` is a directory."""
    filesystem, inner = resolve(path)
    return filesystem.get_file_info(inner).type == pafs.FileType.Directory


def make_dir(path: str) -> None:
    """Create a directory and its parents; an existing directory is left unchanged.

    Raises:
        StorageError: the directory cannot be created.
    """
    filesystem, inner = resolve(path)
    try:
        filesystem.create_dir(inner, recursive=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error})") from error


def remove(path: str) -> None:
    """Remove a file or a directory tree; a missing path is ignored."""
    filesystem, inner = resolve(path)
    kind = filesystem.get_file_info(inner).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(inner)
    elif kind == pafs.FileType.File:
        filesystem.delete_file(inner)


def read_bytes(path: str) -> bytes:
    """The content of a file."""
    filesystem, inner = resolve(path)
    with filesystem.open_input_stream(inner, compression=None) as stream:
        return stream.read()


def write_bytes(path: str, data: bytes) -> None:
    """Write a file atomically; parent directories are created.

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
            with filesystem.open_output_stream(inner, compression=None) as stream:
                stream.write(data)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error})") from error


def read_json(path: str) -> Any:
    """The value in a JSON file.

    Raises:
        StorageError: the file is not valid JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: is damaged, it is not valid JSON ({error})") from error


def write_json(path: str, value: Any) -> None:
    """Write a value as JSON with sorted keys; see `write_bytes`."""
    write_bytes(path, json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")


def list_files(path: str) -> Iterator[str]:
    """The files below a directory, as sorted paths relative to it."""
    filesystem, inner = resolve(path)
    selector = pafs.FileSelector(inner, recursive=True, allow_not_found=True)
    for name in sorted(info.path for info in filesystem.get_file_info(selector) if info.type == pafs.FileType.File):
        yield os.path.relpath(name, inner)


def copy_dir(source: str, target: str) -> None:
    """Copy a directory tree, also between filesystems."""
    from_fs, from_path = resolve(source)
    to_fs, to_path = resolve(target)
    to_fs.create_dir(to_path, recursive=True)
    pafs.copy_files(from_path, to_path, source_filesystem=from_fs, destination_filesystem=to_fs)


def user_cache(*parts: str) -> str:
    """A path below this user's folder in the system's temporary one."""
    return os.path.join(tempfile.gettempdir(), f"afmrl_ray-{user_name()}", *parts)


def localise(path: str, cache_dir: str) -> str:
    """A local directory with the content of `path`: `path` itself if it is local, else a copy below `cache_dir`."""
    if is_local(path):
        return resolve(path)[1]
    target = Path(cache_dir) / hashlib.sha256(path.encode()).hexdigest()[:16]
    if not target.exists():
        partial = f"{target}.{uuid.uuid4().hex}.partial"
        copy_dir(path, partial)
        try:
            os.replace(partial, target)
        except OSError:
            # Another process finished the same copy first; both are complete, so its copy is kept.
            remove(partial)
    return str(target)


def digest_file(path: str) -> str:
    """SHA-256 of a file's content, read in chunks."""
    filesystem, inner = resolve(path)
    total = hashlib.sha256()
    with filesystem.open_input_stream(inner, compression=None) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            total.update(chunk)
    return total.hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
