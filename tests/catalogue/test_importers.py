"""Importers."""

from __future__ import annotations

import csv
import json

import pytest

from afmrl_ray.catalogue import open_catalogue, write_catalogue
from afmrl_ray.catalogue.importers import import_m5product, import_rows, parse_pv
from afmrl_ray.config.catalogue import CatalogueConfig, ItemSelector
from afmrl_ray.errors import CatalogueError
from tests.catalogue.test_reading import png


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(png((number, 0, 0)))
    return folder


def test_csv_round_trip_with_mapped_columns(tmp_path, images):
    source = tmp_path / "items.csv"
    with source.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sku", "parent", "title", "file", "price"])
        writer.writeheader()
        for number in range(4):
            writer.writerow(
                {"sku": number, "parent": number // 2, "title": "a, mug", "file": f"{number}.jpg", "price": 9}
            )
    columns = {"item_id": "sku", "product_id": "parent", "image": "file"}
    imported = import_rows(str(source), str(images), columns=columns)
    assert imported.counts == {"rows": 4, "images_missing": 0}
    write_catalogue(imported.table, str(tmp_path / "c.parquet"))
    catalogue = open_catalogue(str(tmp_path / "c.parquet"))
    item = catalogue.item(2)
    assert (item.item_id, item.product_id, item.title, item.split) == ("2", "1", "a, mug", "train")
    assert item.extra == {"price": "9"}
    assert catalogue.image(2).getpixel((0, 0)) == (2, 0, 0)


def test_jsonl_keeps_the_order_of_attributes_and_counts_missing_images(tmp_path, images):
    source = tmp_path / "items.jsonl"
    common = {"attributes": {"z": "1", "a": "2"}, "split": "test"}
    rows = [{"item_id": str(n), "image": f"{n}.jpg", **common} for n in range(5)]
    source.write_text("\n".join(json.dumps(row) for row in rows))
    imported = import_rows(str(source), str(images))
    assert imported.counts["images_missing"] == 1
    write_catalogue(imported.table, str(tmp_path / "c.parquet"))
    catalogue = open_catalogue(str(tmp_path / "c.parquet"), config=CatalogueConfig(max_bad_fraction=0.5))
    assert list(catalogue.item(0).attributes) == ["z", "a"]
    assert catalogue.counts["quarantined"] == {"missing_image": 1}


def test_m5product_in_its_published_layout(tmp_path, images):
    pv = "颜色#:#红#;#颜色#:#蓝#;#broken#;#材质#:#棉"
    items = {str(number): {"title": f"标题{number}", "pv": pv, "label": "c1", "url": "x"} for number in range(4)}
    (tmp_path / "items.json").write_text(json.dumps(items))
    (tmp_path / "query.txt").write_text("0\n")
    (tmp_path / "gallery.txt").write_text("1\n2\n99\n")
    (tmp_path / "labels.json").write_text(json.dumps({"0": "s1", "1": "s1", "2": "s2"}))
    lists = {("test", "query"): str(tmp_path / "query.txt"), ("test", "gallery"): str(tmp_path / "gallery.txt")}
    imported = import_m5product(
        str(tmp_path / "items.json"), str(images), lists=lists, labels=str(tmp_path / "labels.json")
    )
    assert imported.counts == {
        "items": 4, "listed_but_absent": 1, "images_missing": 0, "test query": 1, "test gallery": 2, "train": 1,
    }  # fmt: skip
    write_catalogue(imported.table, str(tmp_path / "c.parquet"))
    catalogue = open_catalogue(str(tmp_path / "c.parquet"))
    assert catalogue.item(0).attributes == {"颜色": "红", "材质": "棉"}
    assert catalogue.item(3).product_id is None
    assert catalogue.rows(ItemSelector(role="gallery")).tolist() == [1, 2]


def test_the_first_value_of_a_repeated_property_counts():
    assert parse_pv("a#:#1#;#b#:##;#a#:#2") == {"a": "1", "b": ""}
    assert parse_pv("") == {}


def test_errors_name_unreadable_files_and_lines(tmp_path, images):
    with pytest.raises(CatalogueError, match=r"gone\.csv does not exist"):
        import_rows(str(tmp_path / "gone.csv"), str(images))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"item_id": "1", "image": "0.jpg"}\n{oops')
    reason, detail = import_rows(str(bad), str(images)).faults[1]
    assert reason == "unreadable_row"
    assert "bad.jsonl:2: not JSON" in detail
    bad.write_text('{"title": "1"}')
    with pytest.raises(CatalogueError, match="no column item_id, image"):
        import_rows(str(bad), str(images))


def test_unicode_line_separators_inside_fields_are_kept(tmp_path, images):
    title = "red\u2028shirt\x85\nlarge"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"item_id": "1", "image": "0.jpg", "title": title}, ensure_ascii=False)
    )
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["item_id", "image", "title"], ["1", "0.jpg", title]])
    for name in ("a.jsonl", "a.csv"):
        assert import_rows(str(tmp_path / name), str(images)).table["title"].to_pylist() == [title]


def test_a_later_row_without_an_image_is_counted(tmp_path, images):
    (tmp_path / "a.jsonl").write_text('{"item_id": "1", "image": "0.jpg"}\n{"item_id": "2"}\n')
    assert import_rows(str(tmp_path / "a.jsonl"), str(images)).counts["images_missing"] == 1


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.csv", b"item_id,image\n1,\xff.jpg\n", None, "not UTF-8 .byte 16.; say what it is, as --encoding cp1252"),
        ("a.csv", b"item_id,image,image\n1,0.jpg,1.jpg\n", None, "the header names column 'image' twice"),
        ("a.csv", b"item_id,image\n1,0.jpg\n", {"titel": "x"}, "--column titel: a catalogue's columns are item_id"),
    ],
)
def test_errors_name_the_line_and_the_fault(tmp_path, images, name, content, columns, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CatalogueError, match=message):
        import_rows(str(tmp_path / name), str(images), columns=columns)


def test_images_are_found_without_suffix_and_what_is_missing_is_named(tmp_path, images):
    lines = ["item_id,image", "1,0", "2,1.jpg", "3,no", "4,https://x.example/4.jpg", "5,.", "6,"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    found = import_rows(str(tmp_path / "a.csv"), str(images))
    assert [value is not None for value in found.table["image"].to_pylist()] == [True, True, *[False] * 4]
    assert {row: reason for row, (reason, _) in found.faults.items()} == {
        2: "missing_image",
        3: "image_not_fetched",
        4: "missing_image",
        5: "missing_image",
    }
    assert "no file no in" in found.faults[2][1]
    assert found.counts["images_missing"] == 4


def test_numbers_and_missing_values_of_json_are_those_of_a_table(tmp_path, images):
    lines = [{"item_id": 1, "image": "0.jpg", "product_id": 7}, {"item_id": 2, "image": "0.jpg", "product_id": 7.0},
             {"item_id": 3, "image": "0.jpg", "product_id": float("nan"), "title": float("nan")}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = import_rows(str(tmp_path / "a.jsonl"), str(images)).table
    assert table["product_id"].to_pylist() == ["7", "7", None]
    assert table["title"].to_pylist() == [None] * 3
