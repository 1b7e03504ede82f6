"""The item table is found whatever the name of its folder."""

from __future__ import annotations

import pytest

from afmrl_ray.retrieval.item_table import ItemRecord, ItemTable, write_items


@pytest.mark.parametrize("folder", ["mé [a b] #1", "q?mode=rw", "50%20", "plain"])
def test_a_table_is_read_from_a_folder_of_any_name(tmp_path, folder):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "items.sqlite"
    write_items(str(path), [ItemRecord("a", "mug", None, None, "color: red", None)])
    table = ItemTable(str(path))
    assert table.record(0).title == "mug"
    assert table.rows_with_attribute("color", "red").tolist() == [0]
    table.close()
    assert sorted(tmp_path.iterdir()) == [tmp_path / folder]
