"""Bodies of stages that the loop's own test does not reach."""

from __future__ import annotations

import json

import pytest

from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.catalogue import make_catalogue
from afmrl_ray.cit.bodies import labels_body, oracle_body
from afmrl_ray.cit.tiny import pretraining_examples
from afmrl_ray.config import validate
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

    monkeypatch.setattr("afmrl_ray.cit.bodies.annotate_rows", annotate_rows)
    outcome = labels_body(config, tiny_catalogue_ref, str(tmp_path / "at"))
    assert found == [(tiny_checkpoints["generator"], rows)]
    store = read_attributes(str(tmp_path / "at" / outcome.outputs["attributes"]))
    assert len(store) == len(rows)
    assert store.text(catalogue.column("item_id")[rows[0]]) == "color: red"


@pytest.mark.parametrize("names", [None, ("pattern", "color", "no such name")])
def test_the_oracle_writes_the_truth_or_of_it_what_is_taught(tiny_catalogue_ref, tmp_path, names):
    changes = {"annotate": {"truth_column": "true_attributes"}, "teacher": {"kind": "column", "names": names}}
    config = validate(run_values(tmp_path, **changes))
    outcome = oracle_body(config, tiny_catalogue_ref, str(tmp_path))
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
