"""Delimited files and JSON as shops and spreadsheets export them."""

from __future__ import annotations

import gzip
import json

import pytest

from afmrl_ray.catalogue.text_tables import read_text_table
from afmrl_ray.errors import CatalogueError

ROWS = [{"id": "1", "title": "mug, blue"}, {"id": "2", "title": 'a "b"'}]
COMMAS = 'id,title\n1,"mug, blue"\n2,"a ""b"""\n'


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("a.csv", COMMAS, "utf-8"),
        ("A.CSV", COMMAS, "utf-8-sig"),
        ("a.csv", COMMAS.replace("\n", "\r\n"), "utf-16"),
        ("a.csv", COMMAS, "utf-16-le"),
        ("a.csv", COMMAS.replace("\n", "\r"), "utf-8"),
        ("a.csv", 'id;title\n1;"mug, blue"\n2;"a ""b"""\n', "utf-8"),
        ("a.csv", 'sep=;\nid;title\n1;mug, blue\n2;"a ""b"""\n', "utf-8"),
        ("a.csv", 'id | title \n1 | mug, blue \n2 | "a ""b"""\n', "utf-8"),
        ("a.tsv", 'id\ttitle\n1\tmug, blue\n2\t"a ""b"""\n', "utf-8"),
        ("a.txt", 'id\ttitle\n1\tmug, blue\n2\t"a ""b"""\n\n', "utf-8"),
        ("a.csv", 'id,title,,\n1,"mug, blue",,\n2,"a ""b""",,\n', "utf-8"),
        ("a.json", json.dumps(ROWS), "utf-8"),
        ("a.json", json.dumps({"version": 1, "items": ROWS}), "utf-8"),
        ("a.json", "\n".join(map(json.dumps, ROWS)), "utf-8-sig"),
        ("a.jsonl", "\n\n".join(map(json.dumps, ROWS)), "utf-8"),
        ("a.NDJSON", "\r\n".join(map(json.dumps, ROWS)), "utf-8"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_all_dialects_give_the_same_rows(tmp_path, name, text, encoding, zipped):
    data, path = text.encode(encoding), tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(data) if zipped else data)
    found = read_text_table(str(path))
    assert [{"id": row["id"], "title": row["title"]} for row in found.rows] == ROWS
    assert not found.faults


def test_what_cannot_be_found_out_can_be_told(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("id#title\n1#Käse\n".encode("cp1252"))
    found = read_text_table(str(path), delimiter="#", encoding="cp1252")
    assert found.rows == [{"id": "1", "title": "Käse"}]
    with pytest.raises(CatalogueError, match=r"not UTF-8 \(byte 12\); say what it is, as --encoding cp1252"):
        read_text_table(str(path))


def test_columns_are_those_of_all_rows_and_long_fields_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "1"}\n{"id": "2", "image": "0.png"}\n')
    assert read_text_table(str(path)).columns == ["id", "image"]
    path = tmp_path / "a.csv"
    path.write_text(f"id,text\n1,{'x' * 200_000}\n")
    assert len(read_text_table(str(path)).rows[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "text", "reason", "detail"),
    [
        ("a.csv", "id,title\n1,mug\n2,mug, blue\n", "too_many_fields", "line 3 has 3 fields, the header 2"),
        ("a.jsonl", '{"id": 1}\n{oops\n', "unreadable_row", "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"id": 1}\n[1]\n', "unreadable_row", "a.jsonl:2: a JSON object is needed"),
        ("a.json", '[{"id": 1}, 2]', "unreadable_row", "element 1"),
    ],
)
def test_one_bad_row_is_put_aside(tmp_path, name, text, reason, detail):
    (tmp_path / name).write_text(text)
    found = read_text_table(str(tmp_path / name))
    assert len(found.rows) == 2
    assert found.faults[1][0] == reason
    assert detail in found.faults[1][1]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"id,title,title\n1,a,b\n", "the header names column 'title' twice"),
        ("a.xlsx", b"PK\x03\x04", "not one of .csv"),
        ("a.csv", b"PK\x03\x04", "a zip archive or a spreadsheet"),
        ("a.csv.gz", b"\x1f\x8b\x08rest", "damaged gzip"),
        ("a.json", b"[oops", "not JSON"),
        ("a.json", b'{"a": [1], "b": [2]}', "an array of objects is needed"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CatalogueError, match=message):
        read_text_table(str(tmp_path / name))
