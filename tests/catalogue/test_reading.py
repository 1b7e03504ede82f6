"""Reading, quarantine, fingerprints and staging of catalogues."""

from __future__ import annotations

import io
import json
import multiprocessing
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue, check_positives, open_catalogue, stage
from afmrl_ray.catalogue.staging import staged_path
from afmrl_ray.config.catalogue import CatalogueConfig, ItemSelector
from afmrl_ray.errors import CatalogueError


def png(color: tuple[int, int, int] = (200, 10, 10), side: int = 12, height: int | None = None) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, height or side), color).save(data, "PNG")
    return data.getvalue()


def bomb() -> bytes:
    """A PNG whose header claims 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png()[33:]


def rows(count: int = 40) -> list[dict]:
    return [
        {
            "item_id": f"i{number:03d}",
            "product_id": f"p{number // 2}",
            "title": f"mug {number}",
            "attributes": json.dumps({"Color": "Red", "size": str(number)}),
            "split": "train" if number < count // 2 else "test",
            "image": png((number, 0, 0)),
            "weight_g": number,
        }
        for number in range(count)
    ]


def write(folder, content: list[dict], name: str = "c.parquet") -> str:
    path = folder / name
    pq.write_table(pa.Table.from_pylist(content), path, row_group_size=7)
    return str(path)


def test_usable_rows_keep_unknown_columns_and_missing_columns_are_null(tmp_path):
    catalogue = open_catalogue(write(tmp_path, rows()))
    item = catalogue.item(3)
    assert (item.item_id, item.product_id, item.category, item.role) == ("i003", "p1", None, None)
    assert item.attributes == {"Color": "Red", "size": "3"}
    assert item.extra == {"weight_g": 3}
    assert catalogue.counts == {"rows": 40, "kept": 40, "quarantined": {}}


def test_every_kind_of_unusable_row_is_quarantined_with_its_reason(tmp_path):
    content = rows(60)
    whole = content[5]["image"]
    content[1]["item_id"] = "i000"
    content[2]["item_id"] = None
    content[3]["image"] = None
    content[4]["image"] = b"not an image"
    content[5]["image"] = whole[: len(whole) // 2]
    content[6]["image"] = bomb()
    content[7]["attributes"] = "{broken"
    content[8].update(title=None, attributes=None, image=None)
    content[9]["image"] = png(side=300, height=1)
    path = write(tmp_path, content)
    catalogue = open_catalogue(path, config=CatalogueConfig(max_bad_fraction=0.5))
    assert catalogue.counts["quarantined"] == {
        "duplicate_item_id": 1,
        "missing_item_id": 1,
        "missing_image": 1,
        "undecodable_image": 2,
        "decompression_bomb": 1,
        "bad_attributes": 1,
        "empty": 1,
        "aspect_ratio": 1,
    }
    assert len(catalogue) == 51
    assert catalogue.image(1).getpixel((0, 0)) == (10, 0, 0)
    target = tmp_path / "quarantine.parquet"
    catalogue.write_quarantine(str(target))
    quarantined = pq.read_table(target).to_pylist()
    assert {"item_id": "i006", "row": 6, "reason": "decompression_bomb", "detail": ""} in quarantined
    with pytest.raises(CatalogueError, match=r"9 of 60 rows are bad .*more than catalogue.max_bad_fraction 0.05"):
        open_catalogue(path)


@pytest.mark.parametrize(
    ("drop", "message"),
    [(("image",), "lacks the columns image or image_uri"), (("split", "item_id"), "lacks the columns item_id, split")],
)
def test_the_error_names_missing_columns(tmp_path, drop, message):
    content = [{name: value for name, value in row.items() if name not in drop} for row in rows()]
    with pytest.raises(CatalogueError, match=message):
        open_catalogue(write(tmp_path, content))


def test_the_error_names_a_missing_file_and_a_file_of_another_type(tmp_path):
    with pytest.raises(CatalogueError, match=r"nowhere\.parquet does not exist"):
        open_catalogue(str(tmp_path / "nowhere.parquet"))
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(CatalogueError, match="is no Parquet"):
        open_catalogue(str(tmp_path / "text.parquet"))


def test_relative_image_uris_start_from_the_folder_of_the_catalogue(tmp_path):
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    content = [{"item_id": "a", "split": "train", "title": "x", "image_uri": "a.png"}]
    catalogue = open_catalogue(write(tmp_path, content))
    assert catalogue.image(0).getpixel((0, 0)) == (1, 2, 3)


def test_the_fingerprint_depends_on_content_and_not_on_row_groups(tmp_path):
    content = rows()
    first = open_catalogue(write(tmp_path, content)).fingerprint
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "other.parquet", row_group_size=40)
    assert open_catalogue(str(tmp_path / "other.parquet")).fingerprint == first
    content[0]["title"] = "cup"
    assert open_catalogue(write(tmp_path, content, "changed.parquet")).fingerprint != first
    assert open_catalogue(write(tmp_path, rows()[::-1], "turned.parquet")).fingerprint != first


def test_selectors_match_split_role_and_columns(tmp_path):
    content = rows()
    for number, row in enumerate(content):
        row["role"] = "query" if number % 2 else "gallery"
    catalogue = open_catalogue(write(tmp_path, content))
    assert catalogue.rows(ItemSelector(split=("test",), role="query")).tolist() == list(range(21, 40, 2))
    assert catalogue.rows(ItemSelector(split=("train", "test"), where={"weight_g": "7"})).tolist() == [7]
    with pytest.raises(CatalogueError, match="no row of split val; it has the splits: test, train"):
        catalogue.rows(ItemSelector(split=("val",)))
    with pytest.raises(CatalogueError, match="has no column 'colour'"):
        catalogue.rows(ItemSelector(where={"colour": "red"}))
    with pytest.raises(CatalogueError, match="has no column 'description'"):
        catalogue.rows(ItemSelector(title_columns=("title", "description")))


def test_a_gallery_without_any_positive_is_an_error(tmp_path):
    content = rows()
    catalogue = open_catalogue(write(tmp_path, content))
    check_positives(catalogue, ItemSelector(split=("train",)), ItemSelector(split=("train",)))
    with pytest.raises(CatalogueError, match="so there are no positives"):
        check_positives(catalogue, ItemSelector(split=("train",)), ItemSelector(split=("test",)))


def read_in_another_process(staged: StagedCatalogue, row: int) -> tuple[str, bytes]:
    return staged.item(row).item_id, staged.image_bytes(row)


def test_staged_rows_equal_those_of_the_table_in_this_and_another_process(tmp_path):
    content = rows(600)
    config = CatalogueConfig(cache_dir=str(tmp_path / "staging"))
    path = write(tmp_path, content)
    staged = CatalogueRef(path, config, open_catalogue(path, config=config).fingerprint).open()
    for row in (0, 255, 256, 511, 599):
        assert staged.item(row).item_id == content[row]["item_id"]
        assert staged.image_bytes(row) == content[row]["image"]
    assert staged.title(7, ("title", "product_id")) == "mug 7 p3"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_in_another_process, (staged, 511)) == ("i511", content[511]["image"])


def stage_once(path: str, config: CatalogueConfig) -> str:
    return stage(open_catalogue(path, config=config), config)


def test_concurrent_staging_leaves_one_complete_file(tmp_path):
    config = CatalogueConfig(cache_dir=str(tmp_path / "staging"))
    path = write(tmp_path, rows())
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        made = pool.starmap(stage_once, [(path, config)] * 6)
    assert len(set(made)) == 1
    assert [file.name for file in (tmp_path / "staging").iterdir()] == [made[0].rsplit("/", 1)[1]]
    assert len(StagedCatalogue(made[0])) == 40


def test_a_catalogue_that_changed_during_a_run_is_an_error(tmp_path):
    config = CatalogueConfig(cache_dir=str(tmp_path / "staging"))
    ref = CatalogueRef(write(tmp_path, rows()), config, "0" * 64)
    with pytest.raises(CatalogueError, match="changed while it was in use"):
        ref.open()
    assert not np.any([file.exists() for file in [tmp_path / staged_path(config, "0" * 64)]])


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://nowhere/x.png", "image_not_fetched"),
        ("folder", "missing_image"),
        ("a\x00b", "missing_image"),
        ("a" * 4000, "missing_image"),
        ("missing.png", "missing_image"),
        ("data:image/png;base64,?", "undecodable_image"),
    ],
)
def test_an_unreadable_image_uri_quarantines_one_row(tmp_path, uri, reason):
    content = [{name: value for name, value in row.items() if name != "image"} for row in rows(30)]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "p.png").write_bytes(png())
    for row in content:
        row["image_uri"] = "folder/p.png"
    content[4]["image_uri"] = uri
    catalogue = open_catalogue(write(tmp_path, content))
    assert catalogue.counts["quarantined"] == {reason: 1}
    # The folder itself, tables and images in it, is a catalogue too.
    assert open_catalogue(str(tmp_path)).fingerprint == catalogue.fingerprint


def test_the_error_names_a_folder_without_parquet_files(tmp_path):
    (tmp_path / "p.png").write_bytes(png())
    with pytest.raises(CatalogueError, match=r"contains no \.parquet file"):
        open_catalogue(str(tmp_path))


def test_the_fingerprint_depends_on_row_order_and_not_on_row_groups(tmp_path):
    content = rows(3000)
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "one.parquet", row_group_size=11)
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "two.parquet", row_group_size=3000)
    pq.write_table(pa.Table.from_pylist(content[::-1]), tmp_path / "three.parquet")
    one, two, three = (open_catalogue(str(tmp_path / f"{name}.parquet")) for name in ("one", "two", "three"))
    assert one.fingerprint == two.fingerprint != three.fingerprint


def test_columns_of_folder_names_and_of_single_files_are_read(tmp_path):
    root = tmp_path / "catalogue"
    for place, split in enumerate(("train", "test")):
        (root / f"split={split}").mkdir(parents=True)
        part = [{k: v for k, v in row.items() if k != "split"} for row in rows(4)]
        for number, row in enumerate(part):
            row["item_id"] = f"{split}-{number}"
            if split == "test":
                row["shop"] = f"s{place}"
        pq.write_table(pa.Table.from_pylist(part), root / f"split={split}" / "part-0.parquet")
    catalogue = open_catalogue(str(root))
    assert sorted(zip(catalogue.column("split"), catalogue.column("shop"), strict=True)) == [
        *[("test", "s1")] * 4,
        *[("train", None)] * 4,
    ]


def test_what_tools_leave_in_a_folder_is_no_data(tmp_path):
    write(tmp_path, rows(4), "part-0.PARQUET")
    expected = open_catalogue(str(tmp_path)).fingerprint
    for name in ("._part-0.parquet", "_temporary/0/part-1.parquet", ".ipynb_checkpoints/part-0-checkpoint.parquet"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((tmp_path / "part-0.PARQUET").read_bytes())
    assert open_catalogue(str(tmp_path)).fingerprint == expected
    (tmp_path / "part-1.parquet").touch()
    with pytest.raises(CatalogueError, match=r"part-1\.parquet is empty"):
        open_catalogue(str(tmp_path))


@pytest.mark.parametrize("form", ["struct", "path in struct", "list", "path", "uri where null"])
def test_images_may_be_structs_lists_or_paths(tmp_path, form):
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    data = png((1, 2, 3))
    image, uri = {
        "struct": ({"bytes": data, "path": "a.png"}, None),
        "path in struct": ({"bytes": None, "path": "a.png"}, None),
        "list": ([data, png((9, 9, 9))], None),
        "path": ("a.png", None),
        "uri where null": (None, "a"),
    }[form]
    content = [{"item_id": "a", "split": "train", "title": "x", "image": image, "image_uri": uri}]
    if form != "uri where null":
        del content[0]["image_uri"]
    assert open_catalogue(write(tmp_path, content)).image(0).getpixel((0, 0)) == (1, 2, 3)


def test_missing_products_are_not_one_product(tmp_path):
    content = rows(4)
    for row, product in zip(content, (1.0, float("nan"), None, float("nan")), strict=True):
        row["product_id"] = product
    assert open_catalogue(write(tmp_path, content)).column("product_id") == ["1", None, None, None]


def test_ids_that_lost_digits_are_refused_or_put_aside(tmp_path):
    content = rows(40)
    content[3]["item_id"] = "4.00638E+12"
    catalogue = open_catalogue(write(tmp_path, content))
    assert catalogue.quarantine.to_pylist()[0]["reason"] == "rounded_id"
    for row in content:
        row["item_id"] = 1.5e19
    with pytest.raises(CatalogueError, match=r"column item_id: .* has lost digits; write it as text"):
        open_catalogue(write(tmp_path, content))
