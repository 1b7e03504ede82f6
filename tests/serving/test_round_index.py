"""Search under changes: against a plain recomputation, across replicas, restarts and merges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.live_index import LiveIndex, merge
from afmrl_ray.serving.records import EmbeddedItem, StoredItem
from afmrl_ray.serving.round_index import Filters
from afmrl_ray.serving.store import ItemStore
from tests.serving.conftest import unit


def item(item_id: str, title: str = "t", category: str | None = "c") -> StoredItem:
    return StoredItem(item_id, title, category, None, None, b"image", b"thumbnail")


def upsert(live: LiveIndex, stored: StoredItem, vector: np.ndarray, text: str = "color: red") -> None:
    bundle = live.state.current
    missing = live.write(lambda store: store.upsert(stored, {bundle.key: EmbeddedItem(text, vector)}))
    assert missing is None


def opened(folder: Path, bundle: Bundle, **more) -> LiveIndex:
    return LiveIndex(str(folder), bundle, **{"rounds_kept": 2, "max_delta_items": 1000, **more})


def found(live: LiveIndex, vector: np.ndarray, k: int = 5, filters: Filters = Filters()) -> list[str]:  # noqa: B008
    hits = live.search(live.state.current.key, vector, k, filters)
    assert hits is not None
    return [hit.item_id for hit in hits]


VECTORS = {name: unit(*values) for name, values in (("a", (1, 0)), ("b", (0.9, 0.1)), ("c", (0, 1)), ("d", (-1, 0.2)))}
NAMES = ("new-1", "new-2", "new-3")
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("upsert"), st.integers(0, 5), st.sampled_from(sorted(VECTORS)), st.sampled_from(["x", "y"])),
        st.tuples(st.just("delete"), st.integers(0, 5), st.just(""), st.just("")),
        st.tuples(st.sampled_from(["merge", "restart"]), st.just(0), st.just(""), st.just("")),
    ),
    max_size=12,
)


@given(changes=CHANGES, query=st.sampled_from(sorted(VECTORS)), category=st.sampled_from([None, "x", "y"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_search_equals_a_plain_recomputation(bundles, tmp_path_factory, changes, query, category) -> None:
    folder, bundle = tmp_path_factory.mktemp("state"), bundles[1]
    live, other = opened(folder, bundle), opened(folder, bundle)
    index = live.current()
    base = [index._table.record(row) for row in range(index._index.ntotal)]
    names = [record.item_id for record in base[:3]] + list(NAMES)
    vectors = index._index.reconstruct_n(0, len(base))
    wanted = {record.item_id: (vectors[row], record.category) for row, record in enumerate(base)}
    for kind, which, vector, of_category in changes:
        if kind == "upsert":
            upsert(live, item(names[which], category=of_category), VECTORS[vector])
            wanted[names[which]] = VECTORS[vector], of_category
        elif kind == "delete":
            live.write(lambda store, name=names[which]: store.delete(name))
            wanted.pop(names[which], None)
        elif kind == "merge":
            assert merge(str(folder), bundle) is not None
        else:
            live = opened(folder, bundle)
    scores = sorted(
        (-float(vector @ VECTORS[query]), name)
        for name, (vector, of_category) in wanted.items()
        if category in (None, of_category)
    )
    for each in (live, other):
        hits = each.search(bundle.key, VECTORS[query], 7, Filters(category))
        assert hits is not None
        assert [hit.score for hit in hits] == pytest.approx([-score for score, _ in scores[:7]], abs=1e-5)
        sure = [name for score, name in scores if sum(abs(score - other) < 1e-4 for other, _ in scores) == 1][:2]
        assert [hit.item_id for hit in hits if hit.item_id in sure] == [
            n for n in sure if n in {h.item_id for h in hits}
        ]
        assert len(each.current()) == len(wanted)


def test_another_replica_sees_a_change_at_once(bundles, tmp_path: Path) -> None:
    one, other = opened(tmp_path, bundles[1]), opened(tmp_path, bundles[1])
    assert "new" not in found(other, VECTORS["a"])
    upsert(one, item("new"), VECTORS["a"])
    assert found(other, VECTORS["a"])[0] == "new"
    other.write(lambda store: store.delete("new"))
    assert "new" not in found(one, VECTORS["a"])


def test_an_upserted_item_is_found_after_a_restart(bundles, tmp_path: Path) -> None:
    upsert(opened(tmp_path, bundles[1]), item("new", title="kept"), VECTORS["a"])
    later = opened(tmp_path, bundles[1])
    assert found(later, VECTORS["a"])[0] == "new"
    record = later.current().get("new")
    assert record is not None
    assert (record.title, record.attributes, record.thumbnail) == ("kept", "color: red", b"thumbnail")


def test_a_merge_keeps_every_item_and_searches_the_new_index(bundles, tmp_path: Path) -> None:
    live = opened(tmp_path, bundles[1], max_delta_items=1)
    for name, vector in VECTORS.items():
        upsert(live, item(f"new-{name}"), vector, text=f"color: {name}")
    gone = found(live, VECTORS["c"], k=9)[-1]
    live.write(lambda store: store.delete(gone))
    assert live.merge_is_due
    before = live.search(bundles[1].key, VECTORS["b"], 50, Filters())
    assert merge(str(tmp_path), bundles[1]) is not None
    after = live.search(bundles[1].key, VECTORS["b"], 50, Filters())
    assert before is not None
    assert after is not None
    assert [hit.item_id for hit in after] == [hit.item_id for hit in before]
    assert live.current().delta_items == 0
    assert found(live, VECTORS["a"], filters=Filters(attributes=(("color", "d"),))) == ["new-d"]
    record = live.current().get("new-a")
    assert record is not None
    assert record.thumbnail == b"thumbnail"
    assert live.current().get(gone) is None
    upsert(live, item("new-a", title="changed"), VECTORS["d"])
    assert found(live, VECTORS["d"], k=2) == ["new-d", "new-a"] or found(live, VECTORS["d"], k=2) == ["new-a", "new-d"]


def test_one_replica_merges_at_a_time(bundles, tmp_path: Path) -> None:
    live = opened(tmp_path, bundles[1])
    upsert(live, item("new"), VECTORS["a"])
    assert live.store.acquire_lock("merge", 60)
    assert merge(str(tmp_path), bundles[1]) is None
    live.store.release_lock("merge")
    assert merge(str(tmp_path), bundles[1]) is not None


def test_a_vector_of_another_bundle_is_not_searched(bundles, tmp_path: Path) -> None:
    live = opened(tmp_path, bundles[1])
    assert live.search(bundles[0].key, VECTORS["a"], 3, Filters()) is None


def test_an_item_needs_a_vector_of_every_round_that_is_or_will_be_served(bundles, tmp_path: Path) -> None:
    store = ItemStore(str(tmp_path))
    store.start(bundles[0])
    store.begin_switch(bundles[1])
    one, both = (
        {bundles[0].key: EmbeddedItem("", VECTORS["a"])},
        {b.key: EmbeddedItem("", VECTORS["a"]) for b in bundles},
    )
    assert store.upsert(item("new"), one) == {bundles[1].key: bundles[1]}
    assert store.item("new") is None
    assert store.upsert(item("new"), both) is None
    assert store.finish_switch(bundles[1].key)
    state = store.state()
    assert state is not None
    assert (state.current, state.switching_to, state.history) == (bundles[1], None, (bundles[0],))


def test_a_switch_waits_for_items_without_a_vector(bundles, tmp_path: Path) -> None:
    store = ItemStore(str(tmp_path))
    store.start(bundles[0])
    stored = item("new")
    store.upsert(stored, {bundles[0].key: EmbeddedItem("", VECTORS["a"])})
    store.begin_switch(bundles[1])
    assert store.without_vector(bundles[1].key, 5) == [stored]
    assert not store.finish_switch(bundles[1].key)
    changed = item("new", title="changed")
    store.upsert(changed, {b.key: EmbeddedItem("", VECTORS["b"]) for b in bundles})
    # The vector that the switch computed for the replaced item arrives too late.
    store.add_vector(stored, bundles[1].key, EmbeddedItem("", VECTORS["d"]))
    (change,) = store.changes(bundles[1].key, 0)
    assert change.item is not None
    assert np.array_equal(change.item.vector, VECTORS["b"])
    assert store.finish_switch(bundles[1].key)


def test_a_failed_write_changes_nothing(bundles, tmp_path: Path) -> None:
    store = ItemStore(str(tmp_path))
    store.start(bundles[0])
    with pytest.raises(AttributeError):
        store.upsert(item("new"), {bundles[0].key: None})  # type: ignore[dict-item]
    assert store.item("new") is None
    assert store.changes(bundles[0].key, 0) == []
