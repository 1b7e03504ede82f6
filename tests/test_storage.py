"""Files on local filesystems and URIs."""

from __future__ import annotations

import hashlib
import multiprocessing
import os

import pytest

from afmrl_ray import storage
from afmrl_ray.errors import StorageError


def test_a_local_path_and_its_uri_name_the_same_file(tmp_path):
    path = str(tmp_path / "a" / "b.json")
    storage.write_json(path, {"x": [1, 2]})
    assert storage.read_json(f"file://{path}") == {"x": [1, 2]}
    assert storage.exists(f"file://{path}")
    assert list(storage.list_files(str(tmp_path))) == ["a/b.json"]
    storage.remove(str(tmp_path / "a"))
    assert not storage.exists(path)
    storage.remove(path)


def write_many(path: str, letter: str) -> None:
    for _ in range(40):
        storage.write_bytes(path, letter.encode() * 200_000)


def test_a_reader_never_sees_a_partial_file(tmp_path):
    path = str(tmp_path / "shared")
    storage.write_bytes(path, b"a" * 200_000)
    writers = [multiprocessing.get_context("spawn").Process(target=write_many, args=(path, x)) for x in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        data = storage.read_bytes(path)
        assert len(data) == 200_000
        assert len(set(data)) == 1
    assert os.listdir(tmp_path) == ["shared"]


def test_bytes_are_those_of_the_file_whatever_its_name(tmp_path):
    path = str(tmp_path / "a.gz")
    storage.write_bytes(path, b"no gzip")
    assert (tmp_path / "a.gz").read_bytes() == storage.read_bytes(path) == b"no gzip"
    assert storage.digest_file(path) == hashlib.sha256(b"no gzip").hexdigest()


def test_errors_name_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for call in (lambda p: storage.write_bytes(p, b""), storage.make_dir):
        with pytest.raises(StorageError, match=r"file/below.*cannot be written"):
            call(str(tmp_path / "file" / "below" / "x"))
    with pytest.raises(StorageError, match="not a path or URI"):
        storage.resolve("nosuch://bucket/x")


def test_copies_and_digests_depend_on_the_content(tmp_path):
    storage.write_bytes(str(tmp_path / "from" / "deep" / "a"), b"x" * 9_000_000)
    storage.copy_dir(str(tmp_path / "from"), str(tmp_path / "to"))
    copied = str(tmp_path / "to" / "deep" / "a")
    assert storage.digest_file(copied) == hashlib.sha256(b"x" * 9_000_000).hexdigest()
    assert storage.digest({"b": 1, "a": 2}) == storage.digest({"a": 2, "b": 1}) != storage.digest({"a": 2, "b": 2})
    assert storage.localise(str(tmp_path / "to"), "unused") == str(tmp_path / "to")
    local = storage.localise(f"file://{tmp_path}/to", str(tmp_path / "cache"))
    assert storage.is_local(local)
