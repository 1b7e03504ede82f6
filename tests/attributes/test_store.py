"""The attribute table."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afmrl_ray.attributes.store import AttributeRow, read_attributes, write_attributes
from afmrl_ray.attributes.text import InvalidAttributes
from afmrl_ray.errors import CatalogueError

ROWS = [
    AttributeRow.of("a", (("color", "dark red"), ("neck", "v"))),
    AttributeRow.of("b", InvalidAttributes("too_many")),
    AttributeRow("c", "size: xl", ""),
    AttributeRow("d", "", "prompt_too_long"),
]


def test_rows_read_back_as_written(tmp_path: Path) -> None:
    path = str(tmp_path / "sub" / "attributes.parquet")
    write_attributes(path, ROWS, fingerprint="g1")
    store = read_attributes(path, expect_fingerprint="g1")
    assert len(store) == 4
    assert store.get("a") == (("color", "dark red"), ("neck", "v"))
    assert store.text("a") == "color: dark red; neck: v"
    assert store.get("b") == ()
    assert store.text("b") == store.text("absent") == ""
    assert store.get("absent") == ()
    assert store.invalid_fraction == 0.5
    assert store.reasons == {"too_many": 1, "prompt_too_long": 1}
    assert store.mean_length == (1.5, 3.5)
    assert store.fingerprint == "g1"
    assert pq.read_table(path)["valid"].to_pylist() == [True, False, True, False]


def test_attributes_of_another_generator_are_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "attributes.parquet")
    write_attributes(path, ROWS, fingerprint="g1")
    with pytest.raises(CatalogueError, match="g1, not by g2"):
        read_attributes(path, expect_fingerprint="g2")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no item"),
        ([ROWS[0], ROWS[0]], "more than once"),
        ([AttributeRow("a", "Color:red")], "canonical"),
        ([AttributeRow("a", "color: red", "empty")], "either"),
        ([AttributeRow("a", "")], "either"),
    ],
)
def test_invalid_rows_are_an_error_and_nothing_is_written(
    tmp_path: Path, rows: list[AttributeRow], message: str
) -> None:
    with pytest.raises(CatalogueError, match=message):
        write_attributes(str(tmp_path / "t.parquet"), rows, fingerprint="g")
    assert list(tmp_path.iterdir()) == []


def test_the_error_names_a_file_that_is_not_an_attribute_table(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"absent\.parquet"):
        read_attributes(str(tmp_path / "absent.parquet"))
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(CatalogueError, match="no attribute table"):
        read_attributes(str(tmp_path / "text.parquet"))
    pq.write_table(pa.table({"item_id": ["a"], "attributes": ["color: red"]}), tmp_path / "other.parquet")
    with pytest.raises(CatalogueError, match="lacks valid, reason, generator"):
        read_attributes(str(tmp_path / "other.parquet"))
