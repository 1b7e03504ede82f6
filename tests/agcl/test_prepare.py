"""Prefetching changes when a step's inputs are made, never what they are; BM25 scores are computed if needed."""

from __future__ import annotations

import itertools
import logging
import threading

import numpy as np
import pytest
import torch

from afmrl_ray.agcl.prepare import Prefetcher, Preparer
from afmrl_ray.agcl.qwen2_vl import TrainableQwen2VL
from afmrl_ray.attributes.lexical import BM25
from afmrl_ray.attributes.store import AttributeRow, read_attributes, write_attributes
from afmrl_ray.config import validate
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.adapters import load_for_training
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
    """Attributes of every third item only."""
    items = tiny_catalogue_ref.open().column("item_id")[::3]
    path = str(tmp_path_factory.mktemp("store") / "attributes.parquet")
    write_attributes(path, [AttributeRow(item, "color: red") for item in items], fingerprint="t")
    return read_attributes(path)


def preparer(tiny_checkpoints, tiny_catalogue_ref, store, *, rank: int = 0, world: int = 1, **agcl) -> Preparer:
    config = validate(
        {"encoder": {"image": {"min_pixels": 784, "max_pixels": 3136}}, "agcl": {"batch_size": 6, **agcl}}
    )
    base, catalogue = tiny_checkpoints["encoder"], tiny_catalogue_ref.open()
    model = load_for_training(base, "encoder", config.agcl.adapter, seed=0)
    processor = ItemProcessor.from_pretrained(base, config.encoder.image)
    encoder = TrainableQwen2VL(config, model, processor, catalogue)
    return Preparer(config, catalogue, encoder, store, rank=rank, world=world)


def ids(prepared) -> list[list[int]]:
    return [each.input_ids.tolist() for each in prepared.inputs]


def test_prefetched_steps_equal_those_prepared_one_by_one(tiny_checkpoints, tiny_catalogue_ref, store):
    ours = preparer(tiny_checkpoints, tiny_catalogue_ref, store)
    threads = []
    plain = ours.prepare

    def noted(step):
        threads.append((step, threading.current_thread() is threading.main_thread()))
        return plain(step)

    prefetcher = Prefetcher(noted, steps=4)
    found = [prefetcher.take(step) for step in range(4)]
    assert threads == [(0, True), (1, False), (2, False), (3, False)]
    for step, prepared in enumerate(found):
        expected = plain(step)
        assert ids(prepared) == ids(expected)
        for direction in ("query_to_positive", "positive_to_query"):
            scores = (getattr(each, direction).lexical_scores for each in (prepared, expected))
            assert torch.equal(*scores)
    # A resumed training begins at any step.
    assert ids(Prefetcher(plain, steps=4).take(2)) == ids(plain(2))


def test_an_error_while_prefetching_is_raised_where_the_step_is_taken():
    def failing(step):
        if step == 1:
            raise OSError("the image of row 7 is gone")
        return step

    prefetcher = Prefetcher(failing, steps=3)
    assert prefetcher.take(0) == 0
    with pytest.raises(OSError, match="row 7"):
        prefetcher.take(1)


@pytest.mark.parametrize("idf", ["corpus", "batch"])
def test_the_scores_of_two_workers_are_those_of_one(tiny_checkpoints, tiny_catalogue_ref, store, idf):
    given = (tiny_checkpoints, tiny_catalogue_ref, store)
    whole = preparer(*given, lexical={"idf": idf}).prepare(0)
    parts = [preparer(*given, rank=rank, world=2, lexical={"idf": idf}).prepare(0) for rank in (0, 1)]
    for direction in ("query_to_positive", "positive_to_query"):
        scores = torch.cat([getattr(part, direction).lexical_scores for part in parts])
        assert torch.equal(scores, getattr(whole, direction).lexical_scores)
    if idf == "batch":
        items = tiny_catalogue_ref.open().column("item_id")
        queries, positives = (
            [store.text(items[item.row]) for item in whole.items[side]] for side in (slice(6), slice(6, 12))
        )
        expected = BM25().fit(positives).scores(queries, positives)
        np.testing.assert_array_equal(whole.query_to_positive.lexical_scores.numpy(), expected)


@pytest.mark.parametrize("kind", ["attributes", "both"])
def test_lexical_scores_are_computed_only_for_weights_or_mask(tiny_checkpoints, tiny_catalogue_ref, store, kind):
    off = {"lexical": {"enabled": False}, "bidirectional": False}
    prepared = preparer(tiny_checkpoints, tiny_catalogue_ref, store, **off).prepare(0)
    assert prepared.query_to_positive.lexical_scores is None
    assert prepared.positive_to_query is None
    masked = preparer(tiny_checkpoints, tiny_catalogue_ref, store, **off, mask={"enabled": True, "kind": kind}).prepare(
        0
    )
    assert masked.query_to_positive.lexical_scores is not None


@pytest.mark.parametrize("lexical", [{"terms": "pairs"}, {"terms": "values", "idf_formula": "lucene"}])
@pytest.mark.parametrize("idf", ["corpus", "batch"])
def test_scores_are_of_the_configured_terms_and_idf(tiny_checkpoints, tiny_catalogue_ref, store, lexical, idf):
    prepared = preparer(tiny_checkpoints, tiny_catalogue_ref, store, lexical={**lexical, "idf": idf}).prepare(0)
    catalogue = tiny_catalogue_ref.open()
    items, splits = catalogue.column("item_id"), catalogue.column("split")
    queries, positives = (
        [store.text(items[item.row]) for item in prepared.items[side]] for side in (slice(6), slice(6, 12))
    )
    train = [store.text(item) for item, split in zip(items, splits, strict=True) if split == "train"]
    expected = BM25(**lexical).fit(train if idf == "corpus" else positives).scores(queries, positives)
    np.testing.assert_array_equal(prepared.query_to_positive.lexical_scores.numpy(), expected)


@pytest.mark.parametrize("kind", ["attributes", "both"])
def test_a_mask_by_attributes_without_attributes_is_refused(tiny_checkpoints, tiny_catalogue_ref, kind):
    with pytest.raises(ConfigError, match=f"^agcl.mask.kind {kind} needs attributes"):
        preparer(tiny_checkpoints, tiny_catalogue_ref, None, mask={"enabled": True, "kind": kind})


def test_candidates_have_the_codes_of_their_families_and_true_products(tiny_checkpoints, tiny_catalogue_ref):
    prepared = preparer(tiny_checkpoints, tiny_catalogue_ref, None).prepare(0)
    rows = [item.row for item in prepared.items[6:]]
    direction, catalogue = prepared.query_to_positive, tiny_catalogue_ref.open()
    for column, codes in (("family_id", direction.families), ("true_product_id", direction.true_products)):
        values = catalogue.column(column)
        for one, other in itertools.combinations(range(6), 2):
            assert (codes[one] == codes[other]) == (values[rows[one]] == values[rows[other]])


@pytest.mark.parametrize(
    ("given", "lexical", "named"),
    [
        ("sparse", True, ["agcl.pairs.0.query", "agcl.pairs.0.positive"]),
        ("sparse", False, []),
        ("store", True, []),
    ],
)
def test_missing_attributes_are_logged_if_weights_need_them(
    tiny_checkpoints, tiny_catalogue_ref, request, caplog, given, lexical, named
):
    with caplog.at_level(logging.WARNING, "afmrl_ray.agcl.prepare"):
        chosen = request.getfixturevalue(given)
        preparer(tiny_checkpoints, tiny_catalogue_ref, chosen, lexical={"enabled": lexical})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == named
