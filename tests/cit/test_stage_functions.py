"""Bodies of stages that the loop's own test does not reach."""

from __future__ import annotations

import json

import pytest

from afmrl_ray.attributes.store import read_attributes, write_attributes
from afmrl_ray.catalogue import make_catalogue
from afmrl_ray.cit.pipeline import Pipeline
from afmrl_ray.cit.stage_functions import attribute_rows, labels_stage_fn, oracle_stage_fn, query_attributes_stage_fn
from afmrl_ray.cit.stages import RunDirectory, StageOutcome
from afmrl_ray.cit.tiny import pretraining_examples
from afmrl_ray.config import validate, with_values
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.annotate import Annotator, GeneratorRef
from afmrl_ray.models.pretrain import caption
from tests.cit.conftest import run_values


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_local_checkpoint_teaches_what_it_would_annotate(
    ray_local, tiny_checkpoints, tiny_catalogue_ref, tmp_path, monkeypatch
):
    values = run_values(tmp_path, teacher={"kind": "model", "path": tiny_checkpoints["generator"]})
    values["generator"]["max_new_tokens"] = 6
    config = validate(values)
    catalogue = tiny_catalogue_ref.open()
    rows = catalogue.rows(config.distill.items).tolist()
    # Random weights write nothing that parses, so one answer is put into the annotator's mouth.
    asked = Annotator(GeneratorRef(tiny_checkpoints["generator"], config.generator), tiny_catalogue_ref).annotate(rows)
    found = []

    def annotate_rows(given, generator, reference, *, pool):
        found.append((generator.path, given.tolist()))
        return [("color: red", ""), *asked[1:]]

    monkeypatch.setattr("afmrl_ray.cit.stage_functions.annotate_rows", annotate_rows)
    outcome = labels_stage_fn(config, tiny_catalogue_ref, [config.distill.items], str(tmp_path / "at"))
    assert found == [(tiny_checkpoints["generator"], rows)]
    store = read_attributes(str(tmp_path / "at" / outcome.outputs["attributes"]))
    assert len(store) == len(rows)
    assert store.text(catalogue.column("item_id")[rows[0]]) == "color: red"


@pytest.mark.parametrize("names", [None, ("pattern", "color", "no such name")])
def test_the_oracle_writes_the_truth_or_of_it_what_is_taught(tiny_catalogue_ref, tmp_path, names):
    changes = {"annotate": {"ground_truth_column": "true_attributes"}, "teacher": {"kind": "column", "names": names}}
    config = validate(run_values(tmp_path, **changes))
    outcome = oracle_stage_fn(config, tiny_catalogue_ref, str(tmp_path))
    store = read_attributes(str(tmp_path / outcome.outputs["attributes"]))
    catalogue = tiny_catalogue_ref.open()
    items, truth = (catalogue.column(name) for name in ("item_id", "true_attributes"))
    written, known = set(), set()
    for row in catalogue.rows(config.annotate.items).tolist():
        source, found = json.loads(truth[row]), store.get(items[row])
        wanted = list(source) if names is None else [name for name in names if name in source]
        assert list(found) == [(name, source[name]) for name in wanted]
        written |= {name for name, _ in found}
        known |= set(source)
    assert written == (known if names is None else {"pattern", "color"})


def test_the_pretraining_catalogue_shares_no_product_with_the_runs_own(tiny_catalogue_ref, tmp_path):
    config = validate(run_values(tmp_path, tiny={"pretrain_products": 600}))
    own = {
        caption(row["category"], json.loads(row["true_attributes"]).items())
        for row in make_catalogue(config.synthetic).to_pylist()
    }
    examples = pretraining_examples(config, tiny_catalogue_ref)
    assert len(examples) > 1000
    assert not own & {text for _, _, text in examples}


def annotated(run, catalogue, config, name: str, text: str):
    """A stage in which every item has the same attributes."""
    rows = catalogue.rows(config.annotate.items)

    def body(directory):
        written = attribute_rows(catalogue.column("item_id"), rows, [(text, "")] * len(rows))
        write_attributes(f"{directory}/attributes.parquet", written, fingerprint=name)
        return StageOutcome({"attributes": "attributes.parquet"}, {})

    return run.run_stage(name, {}, body)


def test_only_queries_that_are_enriched_are_written_anew(tiny_catalogue_ref, tmp_path):
    without_attributes = {"kind": "retrieval", "name": "texts", "with_attributes": "none"}
    without_attributes |= {
        "query": {"split": ["val"], "role": "gallery"},
        "gallery": {"split": ["val"], "role": "query"},
    }
    protocols = [{"kind": "retrieval", "name": "fine"}, without_attributes]
    config = validate(run_values(tmp_path, evaluation={"protocols": protocols}))
    catalogue, run = tiny_catalogue_ref.open(), RunDirectory(str(tmp_path), "t")
    before = annotated(run, catalogue, config, "before", "color: old")
    after = annotated(run, catalogue, config, "after", "color: new")
    outcome = query_attributes_stage_fn(config, tiny_catalogue_ref, before, after, str(tmp_path))
    store = read_attributes(str(tmp_path / outcome.outputs["attributes"]))
    items, (fine, _) = catalogue.column("item_id"), config.evaluation.protocols
    queries = {items[row] for row in catalogue.rows(fine.query).tolist()}
    assert {item for item in items if store.text(item) == "color: new"} == queries
    assert len(store) == len(catalogue.rows(config.annotate.items)) > len(queries) > 0


def test_a_item_that_is_a_query_and_in_a_gallery_cannot_be_both(tiny_catalogue_ref, tmp_path):
    around = {"query": {"split": ["test"], "role": "gallery"}, "gallery": {"split": ["test"], "role": "query"}}
    protocols = [{"kind": "retrieval", "name": "fine"}, {"kind": "retrieval", "name": "around", **around}]
    config = validate(run_values(tmp_path, evaluation={"protocols": protocols}))
    catalogue, run = tiny_catalogue_ref.open(), RunDirectory(str(tmp_path), "t")
    stages = [annotated(run, catalogue, config, name, "color: red") for name in ("before", "after")]
    with pytest.raises(ConfigError, match=r"evaluation\.protocols"):
        query_attributes_stage_fn(config, tiny_catalogue_ref, *stages, str(tmp_path))


def test_labels_of_pairs_hold_all_their_items_and_are_the_labels_where_those_do(tmp_path):
    config = validate(run_values(tmp_path, teacher={"kind": "column"}))
    run = RunDirectory(str(tmp_path), "t")
    taught = Pipeline(config, run)
    assert taught.pair_labels is taught.labels
    # Only queries are taught; the other side of every pair is asked about as well.
    elsewhere = Pipeline(with_values(config, {"distill.items.split": ["val"]}), run)
    store = read_attributes(elsewhere.pair_labels.output("attributes"))
    items = elsewhere.catalogue.column("item_id")
    rows = elsewhere.catalogue.rows(config.agcl.pairs[0].positive).tolist()
    assert all(store.text(items[row]) for row in rows)
    assert len(store) == len(rows)


def test_the_baseline_is_the_same_whatever_attributes_would_do(tmp_path):
    """Settings of weights and mask decide nothing there, so they do not have it trained again."""
    trained = []

    class Noted(Pipeline):
        models_stage = None

        def variant(self, changes):
            return Noted(with_values(self.config, changes), self.run)

        def _stage(self, name, inputs, body, *, resumable=False):
            if name == "baseline":
                trained.append(inputs)
            return super()._stage(name, inputs, (lambda _: StageOutcome({}, {})) if name == "baseline" else body)

    config = validate(run_values(tmp_path))
    changes = {"agcl.lexical.scale": "self", "agcl.mask.enabled": True, "agcl.attribute_dropout.query": 0.8}
    for changed in ({}, changes, {"agcl.steps": 7}):
        _ = Noted(with_values(config, changed), RunDirectory(str(tmp_path), "t")).baseline
    assert trained[0] == trained[1] != trained[2]
    assert trained[0]["config"]["agcl"]["lexical"]["enabled"] is False
