"""Stage functions that the test of the whole loop does not reach."""

from __future__ import annotations

import json

import pytest

from afmrl_ray.attributes.store import read_attributes, write_attributes
from afmrl_ray.catalogue import make_catalogue
from afmrl_ray.cit.pipeline import Pipeline
from afmrl_ray.cit.projection import ConfigProjection
from afmrl_ray.cit.spec import StageContext
from afmrl_ray.cit.stages import declare
from afmrl_ray.cit.stages.attributes import attribute_rows
from afmrl_ray.cit.tiny import pretraining_examples
from afmrl_ray.config import validate
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.annotate import Annotator, GeneratorRef
from afmrl_ray.models.pretrain import caption
from afmrl_ray.runs import RunDirectory, Stage, StageName, StageOutcome
from tests.cit.conftest import run_values


def run_function(config, reference, directory, kind, number=None, **upstream):
    """Call a stage's function as the pipeline does, on an existing catalogue."""
    spec = declare(StageName(kind, number), config)
    catalogue = Stage("catalogue", "", "", {}, {"catalogue": reference.path}, {}, {}, "", 0.0, None)
    catalogue.metrics["fingerprint"] = reference.fingerprint
    context = StageContext(
        name=str(spec.name),
        config=ConfigProjection(config, spec.reads, str(spec.name)),
        directory=str(directory),
        upstream={"catalogue": catalogue, **upstream},
        parameters=spec.parameters,
        catalogue_config=reference.config,
    )
    return spec.function(context)


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

    monkeypatch.setattr("afmrl_ray.cit.stages.attributes.annotate_rows", annotate_rows)
    outcome = run_function(config, tiny_catalogue_ref, tmp_path / "at", "labels")
    assert found == [(tiny_checkpoints["generator"], rows)]
    store = read_attributes(str(tmp_path / "at" / outcome.outputs["attributes"]))
    assert len(store) == len(rows)
    assert store.text(catalogue.column("item_id")[rows[0]]) == "color: red"


@pytest.mark.parametrize("names", [None, ("pattern", "color", "no such name")])
def test_the_oracle_writes_the_truth_or_of_it_what_is_taught(tiny_catalogue_ref, tmp_path, names):
    changes = {"annotate": {"ground_truth_column": "true_attributes"}, "teacher": {"kind": "column", "names": names}}
    config = validate(run_values(tmp_path, **changes))
    outcome = run_function(config, tiny_catalogue_ref, tmp_path, "oracle")
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


def test_only_queries_with_attributes_get_new_ones(tiny_catalogue_ref, tmp_path):
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
    outcome = run_function(config, tiny_catalogue_ref, tmp_path, "query-attributes", 0, gallery=before, queries=after)
    store = read_attributes(str(tmp_path / outcome.outputs["attributes"]))
    items, (fine, _) = catalogue.column("item_id"), config.evaluation.protocols
    queries = {items[row] for row in catalogue.rows(fine.query).tolist()}
    assert {item for item in items if store.text(item) == "color: new"} == queries
    assert len(store) == len(catalogue.rows(config.annotate.items)) > len(queries) > 0


def test_an_item_that_is_a_query_and_in_a_gallery_cannot_be_both(tiny_catalogue_ref, tmp_path):
    around = {"query": {"split": ["test"], "role": "gallery"}, "gallery": {"split": ["test"], "role": "query"}}
    protocols = [{"kind": "retrieval", "name": "fine"}, {"kind": "retrieval", "name": "around", **around}]
    config = validate(run_values(tmp_path, evaluation={"protocols": protocols}))
    catalogue, run = tiny_catalogue_ref.open(), RunDirectory(str(tmp_path), "t")
    before, after = (annotated(run, catalogue, config, name, "color: red") for name in ("before", "after"))
    with pytest.raises(ConfigError, match=r"evaluation\.protocols"):
        run_function(config, tiny_catalogue_ref, tmp_path, "query-attributes", 0, gallery=before, queries=after)


def test_labels_of_pairs_cover_all_their_items(tmp_path):
    config = validate(run_values(tmp_path, teacher={"kind": "column"}, distill={"items": {"split": ["val"]}}))
    pipeline = Pipeline(config, RunDirectory(str(tmp_path), "t"))
    store = read_attributes(pipeline.stage(StageName("labels-pairs")).output("attributes"))
    items = pipeline.catalogue.column("item_id")
    rows = pipeline.catalogue.rows(config.agcl.pairs[0].positive).tolist()
    assert all(store.text(items[row]) for row in rows)
    assert len(store) == len(rows)
