"""Preparing ahead changes when a step's inputs are made, never what they are."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
import torch

from afmrl_ray.agcl.prepare import Prefetcher, Preparer
from afmrl_ray.attributes.lexical import BM25
from afmrl_ray.attributes.store import AttributeRow, read_attributes, write_attributes
from afmrl_ray.config import validate
from afmrl_ray.models.item_processor import ItemProcessor


@pytest.fixture(scope="module")
def store(tiny_catalogue_ref, tmp_path_factory):
    items = tiny_catalogue_ref.open().column("item_id")
    path = str(tmp_path_factory.mktemp("store") / "attributes.parquet")
    rows = [AttributeRow(item, f"color: red; size: {place % 5}") for place, item in enumerate(items)]
    write_attributes(path, rows, fingerprint="t")
    return read_attributes(path)


@pytest.fixture(scope="module")
def sparse(tiny_catalogue_ref, tmp_path_factory):
    """Attributes of each third item alone."""
    items = tiny_catalogue_ref.open().column("item_id")[::3]
    path = str(tmp_path_factory.mktemp("store") / "attributes.parquet")
    write_attributes(path, [AttributeRow(item, "color: red") for item in items], fingerprint="t")
    return read_attributes(path)


def preparer(tiny_checkpoints, tiny_catalogue_ref, store, *, rank: int = 0, world: int = 1, **agcl) -> Preparer:
    config = validate(
        {"encoder": {"image": {"min_pixels": 784, "max_pixels": 3136}}, "agcl": {"batch_size": 6, **agcl}}
    )
    processor = ItemProcessor.from_pretrained(tiny_checkpoints["encoder"], config.encoder.image)
    return Preparer(config, tiny_catalogue_ref.open(), processor, store, rank=rank, world=world)


def ids(prepared) -> list[list[int]]:
    return [row.input_ids.tolist() for row in prepared.rows]


def test_steps_taken_ahead_are_those_prepared_one_by_one(tiny_checkpoints, tiny_catalogue_ref, store):
    ours = preparer(tiny_checkpoints, tiny_catalogue_ref, store)
    threads = []
    plain = ours.prepare

    def noted(step):
        threads.append((step, threading.current_thread() is threading.main_thread()))
        return plain(step)

    ours.prepare = noted
    ahead = Prefetcher(ours, steps=4)
    found = [ahead.take(step) for step in range(4)]
    assert threads == [(0, True), (1, False), (2, False), (3, False)]
    for step, prepared in enumerate(found):
        expected = plain(step)
        assert ids(prepared) == ids(expected)
        assert torch.equal(prepared.query_to_positive.lexical, expected.query_to_positive.lexical)
        assert torch.equal(prepared.positive_to_query.lexical, expected.positive_to_query.lexical)
    # A resumed training begins anywhere.
    assert ids(Prefetcher(ours, steps=4).take(2)) == ids(plain(2))


def test_what_goes_wrong_ahead_is_raised_where_the_step_is_taken(tiny_checkpoints, tiny_catalogue_ref, store):
    ours = preparer(tiny_checkpoints, tiny_catalogue_ref, store)
    plain = ours.prepare

    def failing(step):
        if step == 1:
            raise OSError("the image of row 7 is gone")
        return plain(step)

    ours.prepare = failing
    ahead = Prefetcher(ours, steps=3)
    ahead.take(0)
    with pytest.raises(OSError, match="row 7"):
        ahead.take(1)


@pytest.mark.parametrize("idf", ["corpus", "batch"])
def test_the_scores_of_two_workers_are_those_of_one(tiny_checkpoints, tiny_catalogue_ref, store, idf):
    given = (tiny_checkpoints, tiny_catalogue_ref, store)
    whole = preparer(*given, lexical={"idf": idf}).prepare(0)
    parts = [preparer(*given, rank=rank, world=2, lexical={"idf": idf}).prepare(0) for rank in (0, 1)]
    for task in ("query_to_positive", "positive_to_query"):
        shares = torch.cat([getattr(part, task).lexical for part in parts])
        assert torch.equal(shares, getattr(whole, task).lexical)
    if idf == "batch":
        texts = whole.query_to_positive.direction.candidate_texts
        expected = BM25().fit(texts).scores(whole.query_to_positive.direction.own_texts, texts)
        np.testing.assert_array_equal(whole.query_to_positive.lexical.numpy(), expected)


def test_nothing_is_scored_that_nothing_asks_for(tiny_checkpoints, tiny_catalogue_ref, store):
    off = {"lexical": {"enabled": False}, "bidirectional": False}
    prepared = preparer(tiny_checkpoints, tiny_catalogue_ref, store, **off).prepare(0)
    assert prepared.query_to_positive.lexical is None
    assert prepared.positive_to_query is None
    masked = preparer(
        tiny_checkpoints, tiny_catalogue_ref, store, **off, mask={"enabled": True, "kind": "attributes"}
    ).prepare(0)
    assert masked.query_to_positive.lexical is not None


@pytest.mark.parametrize(
    ("given", "lexical", "told"),
    [
        ("sparse", True, ["agcl.pairs.0.query", "agcl.pairs.0.positive"]),
        ("sparse", False, []),
        ("store", True, []),
    ],
)
def test_sides_without_attributes_are_told_of_where_weights_need_them(
    tiny_checkpoints, tiny_catalogue_ref, request, caplog, given, lexical, told
):
    with caplog.at_level(logging.WARNING, "afmrl_ray.agcl.prepare"):
        chosen = request.getfixturevalue(given)
        preparer(tiny_checkpoints, tiny_catalogue_ref, chosen, lexical={"enabled": lexical})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == told
