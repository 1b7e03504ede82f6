"""The variants of the ablation study, on a run small enough for tests."""

from __future__ import annotations

import json

import numpy as np
import pytest

from afmrl_ray import storage
from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.cit.driver import open_run
from afmrl_ray.config import validate, with_values
from afmrl_ray.errors import ConfigError
from jobs.experiments.stages import AblationStudy
from jobs.experiments.variants import VARIANTS, check_comparable
from tests.cit.conftest import run_values
from tests.cit.fake_stages import FakePipeline, evaluation_of, fake_run


def study_config(path, **changes):
    config = validate(run_values(path, cit={"rounds": 3, "init_from": "base"}, **changes))
    small = {"distill.steps": 40, "agcl.steps": 2, "generator.max_new_tokens": 48, "agcl.workers.num_workers": 1}
    return with_values(config, {"annotate.ground_truth_column": "true_attributes", **small})


def record_of(run, name: str):
    return storage.read_json(storage.join(run.path, "stages", name, "stage.json"))


def test_the_reference_of_every_variant_is_an_earlier_one():
    seen = set()
    for variant in VARIANTS:
        assert variant.reference is None or variant.reference in seen
        assert variant.key not in seen
        seen.add(variant.key)


@pytest.mark.parametrize(("change", "named"), [({"init_from": "previous"}, "init_from"), ({"rounds": 2}, "rounds")])
def test_configs_whose_variants_cannot_be_compared_are_refused(tmp_path, change, named):
    cit = {"rounds": 3, "init_from": "base", **change}
    with pytest.raises(ConfigError, match=f"cit.{named}"):
        check_comparable(validate(run_values(tmp_path, cit=cit)))


class CataloguePipeline(FakePipeline):
    """Stages that do nothing, on a real catalogue."""

    @property
    def catalogue(self):
        return self._given_catalogue

    def __init__(self, config, run, catalogue):
        self._given_catalogue = catalogue
        super().__init__(config, run, functions={"evaluate": evaluation_of({"fine": ("hit@1", np.ones(10))})})


def test_every_variant_is_measured_by_the_stage_that_it_names(tmp_path, tiny_catalogue_ref):
    config = with_values(study_config(tmp_path), {"encoder.vision_cache.enabled": False})
    pipeline = CataloguePipeline(config, fake_run(tmp_path / "run"), tiny_catalogue_ref.open())
    study = AblationStudy(pipeline, dual_encoder="checkpoint")
    for variant in VARIANTS:
        stage = study.run(variant.key)
        assert stage.name == variant.evaluation
        assert variant.training in stage.inputs["upstream"]
    inputs = {name: pipeline.run.committed(name).inputs for name in ("dual-encoder-regions", "agcl-r1-fewer-products")}
    assert inputs["dual-encoder-regions"]["config"]["encoder"]["dual_encoder"]["region_weight"] == 0.1
    assert inputs["agcl-r1-fewer-products"]["config"]["agcl"]["train_fraction"] == 0.3
    # Every encoder is trained for the same number of steps.
    trained = {variant.training for variant in VARIANTS}
    assert {pipeline.run.committed(name).inputs["config"]["agcl"]["steps"] for name in trained} == {config.agcl.steps}


KEYS = ("agcl", "distilled", "oracle-input")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_variants_share_stages_and_differ_in_their_inputs(ray_local, tmp_path):
    config = study_config(tmp_path)
    with open_run(config) as pipeline:
        run, study = pipeline.run, AblationStudy(pipeline, dual_encoder=None)
        for key in KEYS:
            study.run(key)
        first = {stage.name: record_of(run, stage.name)["committed_at"] for stage in run.stages()}
        distilled, oracle = (record_of(run, name)["inputs"] for name in ("evaluate-distilled", "evaluate-oracle-input"))
        assert distilled["upstream"]["agcl-r0"] == oracle["upstream"]["agcl-r0"]
        assert "attributes-r0" in distilled["upstream"]
        assert "oracle" in oracle["upstream"]
        # The loss alone: the teacher's attributes are upstream, and no input of the encoder has attributes.
        labels = record_of(run, "agcl-labels")["inputs"]
        assert "labels" in labels["upstream"]
        assert labels["config"]["agcl"]["attribute_dropout"] == {"query": 1, "positive": 1}
        assert labels["config"]["agcl"]["steps"] == record_of(run, "agcl-r0")["inputs"]["config"]["agcl"]["steps"]
        truth = read_attributes(run.committed("oracle").output("attributes"))
        item = pipeline.catalogue.item(int(pipeline.catalogue.rows(config.annotate.items)[0]))
        assert dict(truth.get(item.item_id)) == json.loads(item.extra["true_attributes"])
        assert run.committed("oracle").metrics["quality"]["f1"] == pytest.approx(1.0)

    with open_run(config) as pipeline:
        study = AblationStudy(pipeline, dual_encoder=None)
        for key in KEYS:
            study.run(key)
        with pytest.raises(ConfigError, match="dual encoder"):
            study.run("dual-encoder")
    assert {stage.name: record_of(run, stage.name)["committed_at"] for stage in run.stages()} == first
