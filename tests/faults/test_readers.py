"""Readers return a result or raise one of our errors for any input; AFMRL_FUZZ=100000 (`make chaos`) tries 100,000."""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from afmrl_ray.attributes.text import InvalidAttributes, format_attributes, normalise_attributes, parse_attributes
from afmrl_ray.catalogue import check_table
from afmrl_ray.catalogue.checks import image_fault
from afmrl_ray.config import load_config
from afmrl_ray.errors import CatalogueError, ConfigError, StorageError
from afmrl_ray.runs import STAGE_RECORD, RunDirectory, StageOutcome
from afmrl_ray.serving.uploads import upload_fault

READERS = 5
EACH = max(1, int(os.environ.get("AFMRL_FUZZ", "500")) // READERS)
fuzzed = settings(
    max_examples=EACH,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3000 if EACH > 1000 else 300)]

texts = st.text(max_size=60)
letters = [*"abc:;<|>,  \n\u200b\ud7ff\U0001f600", "color", ": ", "; ", "<|im_end|>"]
pieces = st.lists(st.sampled_from(letters), max_size=30)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))


@fuzzed
@given(text=texts | pieces.map("".join), most=st.integers(1, 8))
def test_attribute_text(text: str, most: int) -> None:
    found = parse_attributes(text, max_attributes=most)
    if not isinstance(found, InvalidAttributes):
        assert 1 <= len(found) <= most
        assert parse_attributes(format_attributes(found), max_attributes=most) == found
    pairs = normalise_attributes([(text, text), ("color", text)])
    if pairs:
        assert parse_attributes(format_attributes(pairs), max_attributes=2) == pairs


@functools.cache
def images() -> list[bytes]:
    found = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        target = io.BytesIO()
        Image.effect_noise((24, 16), 64).convert("RGB").save(target, kind)
        found.append(target.getvalue())
    return found


@st.composite
def damaged(draw: Any) -> bytes:
    data = bytearray(draw(st.sampled_from(images())))
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=8)):
        data[place] = value
    return bytes(data[: draw(st.integers(0, len(data)))])


@fuzzed
@given(data=st.binary(max_size=200) | damaged())
@example(data=b"")
def test_images(data: bytes) -> None:
    for fault in (image_fault(data, 10_000), upload_fault(data, 10_000)):
        assert fault is None or isinstance(fault, str)
    if image_fault(data, 10_000) is None:
        with Image.open(io.BytesIO(data)) as image:
            assert image.width * image.height <= 10_000
            image.load()


@fuzzed
@given(data=st.data())
def test_catalogue_rows(data: st.DataObject) -> None:
    cells = {
        "item_id": st.none() | texts,
        "split": st.sampled_from(["train", "test", "val", "gallery", "", "x"]) | st.none(),
        "image": st.none() | st.binary(max_size=40) | st.sampled_from(images()),
        "image_uri": st.none() | texts,
        "title": st.none() | texts,
        "product_id": st.none() | texts,
        "attributes": st.none() | texts | st.just('{"a": 1}') | trees.map(lambda tree: json.dumps(tree, default=str)),
        "role": st.none() | texts,
        "boxes": st.none() | texts,
    }
    columns = data.draw(st.lists(st.sampled_from(sorted(cells)), unique=True, min_size=1))
    rows = data.draw(st.lists(st.fixed_dictionaries({name: cells[name] for name in columns}), min_size=1, max_size=5))
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, UnicodeEncodeError):
        # Arrow cannot represent such rows.
        assume(False)
    message = error_message(CatalogueError, lambda: check_table(table, "/nowhere/c.parquet"))
    assert message is None or message.startswith("/nowhere/c.parquet")


def error_message(kind: type[Exception], work: Callable[[], object]) -> str | None:
    """The message of the error of type `kind` that `work` raises, or none."""
    try:
        work()
    except kind as error:
        return str(error)
    return None


SETTINGS = [
    "rar.group_size",
    "agcl.steps",
    "run.name",
    "catalogue.path",
    "cit.gate",
    "rar",
    "encoder.image",
    "x.y",
    "run",
]
VALUES = ("1", "-1", "null", "[]", "{}", "{a: 1}", "nan", "1e999", "yes", "[1, 2", "${x}", "&a [*a]")
keys = st.sampled_from(["", *SETTINGS])
values = texts | st.sampled_from(VALUES)
files = texts | trees.map(lambda tree: json.dumps(tree, default=str)) | st.sampled_from(["a: [", "- x", "%"])


@fuzzed
@given(
    overrides=st.lists(st.tuples(keys | texts, values).map("=".join) | texts, max_size=4),
    text=st.none() | files,
)
def test_configs(overrides: list[str], text: str | None, tmp_path: Path) -> None:
    path = None
    if text is not None:
        assume(not any("\ud800" <= character <= "\udfff" for character in text))
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
    message = error_message(ConfigError, lambda: load_config(str(path) if path else None, overrides))
    assert message is None or message.strip()


RECORD_KEYS = ("name", "fingerprint", "inputs", "attempt", "outputs", "digests", "metrics", "seconds", "committed_at")


@fuzzed
@given(data=st.data())
def test_stage_files(data: st.DataObject, tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path), "run")
    run.create()
    path = tmp_path / "run" / "stages" / "a" / STAGE_RECORD

    def write_output(directory: str) -> StageOutcome:
        Path(directory, "out").write_text("x")
        return StageOutcome({"out": "out"}, {})

    run.run_stage("a", {}, write_output)
    good = path.read_bytes()
    how = data.draw(st.sampled_from(["cut", "bytes", "field", "drop"]))
    if how == "cut":
        path.write_bytes(good[: len(good) * data.draw(st.integers(0, 1000)) // 1000])
    elif how == "bytes":
        path.write_bytes(data.draw(st.binary(max_size=60)))
    else:
        record = json.loads(good)
        key = data.draw(st.sampled_from(RECORD_KEYS))
        if how == "drop":
            del record[key]
        else:
            record[key] = data.draw(trees)
        path.write_text(json.dumps(record, default=str))
    fresh = RunDirectory(str(tmp_path), "run")
    for read in (fresh.stages, lambda: fresh.committed("a")):
        message = error_message(StorageError, read)
        assert message is None or str(path) in message
    path.unlink()
