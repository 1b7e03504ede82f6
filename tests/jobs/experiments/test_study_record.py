"""The record of the ablation study, from runs with stages of given numbers."""

from __future__ import annotations

import numpy as np
import pytest

from afmrl_ray import storage
from afmrl_ray.config import validate
from afmrl_ray.errors import ConfigError
from afmrl_ray.retrieval.evaluate import ProtocolResult
from afmrl_ray.retrieval.per_query import write_per_query
from afmrl_ray.retrieval.seeds import over_seeds
from afmrl_ray.runs import RunDirectory, StageOutcome
from jobs.experiments.study_record import study_record, upstream_costs

HITS = {
    "evaluate-baseline": ([0, 1, 0, 1], [0, 1, 1, 1]),
    "evaluate-agcl-labels": ([0, 1, 1, 1], [1, 1, 1, 1]),
    "evaluate-distilled": ([1, 1, 1, 1], [0, 0, 0, 0]),
}
TRAINED = {"evaluate-baseline": "baseline", "evaluate-agcl-labels": "agcl-labels", "evaluate-distilled": "agcl-r0"}


def write_run(path, seed: int, rows: list[int] | None = None, steps: int = 77) -> RunDirectory:
    run = RunDirectory(str(path), f"t-s{seed}")
    run.write_run({"config": {"run": {"seed": seed}, "agcl": {"steps": steps}}})
    models = run.run_stage("models", {}, lambda _: StageOutcome({}, {}))
    labels = run.run_stage("labels", {"upstream": {"models": models.fingerprint}}, lambda _: StageOutcome({}, {}))
    for name, hits in HITS.items():
        above = labels if name != "evaluate-baseline" else models
        encoder = run.run_stage(
            TRAINED[name],
            {"upstream": {above.name: above.fingerprint}, "config": {"agcl": {"steps": steps}}},
            lambda _: StageOutcome({}, {}),
        )
        values = np.array(hits[seed], dtype=np.float32)

        def body(directory: str, values=values) -> StageOutcome:
            found = ProtocolResult({}, np.array(rows or [3, 5, 8, 9]), {"hit@1": values})
            write_per_query(storage.join(directory, "per_query.safetensors"), {"fine": found})
            metric = {"mean": float(values.mean()), "low": 0.0, "high": 1.0}
            metrics = {"hit@1": metric, "nmi": {"mean": 0.5, "low": None, "high": None}}
            record = {"kind": "retrieval", "queries": 4, "gallery": 8, "metrics": metrics}
            return StageOutcome({"per_query": "per_query.safetensors"}, {"protocols": {"fine": record}})

        run.run_stage(name, {"upstream": {encoder.name: encoder.fingerprint}}, body)
    return run


@pytest.fixture
def config():
    protocols = [{"kind": "retrieval", "name": "fine"}]
    cit = {"rounds": 3, "init_from": "base"}
    return validate({"cit": cit, "evaluation": {"protocols": protocols}})


def test_means_gains_and_order_of_the_variants(tmp_path, config):
    record = study_record(config, [write_run(tmp_path, seed) for seed in (0, 1)], title="t")
    variants = {variant["key"]: variant for variant in record["variants"]}
    assert list(variants) == ["info-nce", "agcl", "distilled"]
    assert record["seeds"] == 2
    assert all(variant["encoder_steps"] == 77 for variant in record["variants"])
    expected = over_seeds([0.5, 0.75])
    found = variants["info-nce"]["metrics"]["fine"]["hit@1"]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((expected.mean, expected.low, expected.high))
    # The reference of the first variant is not measured; metrics that are not means over queries have no paired gain.
    assert variants["info-nce"]["gain"] == {}
    assert variants["agcl"]["gain"]["fine"]["hit@1"]["mean"] == pytest.approx(0.25)
    assert variants["distilled"]["gain"]["fine"]["hit@1"]["mean"] == pytest.approx(-0.375)
    assert variants["agcl"]["gain"]["fine"].keys() == {"hit@1"}


def test_a_variant_counts_its_seeds_and_is_paired_over_common_seeds(tmp_path, config):
    runs = [write_run(tmp_path, seed) for seed in (0, 1)]
    storage.remove(storage.join(runs[1].path, "stages", "evaluate-agcl-labels", "stage.json"))
    variants = {variant["key"]: variant for variant in study_record(config, runs, title="t")["variants"]}
    assert [variant["seeds"] for variant in variants.values()] == [2, 1, 2]
    assert variants["agcl"]["metrics"]["fine"]["hit@1"] == {"mean": 0.75, "low": None, "high": None}
    assert variants["distilled"]["gain"]["fine"]["hit@1"]["mean"] == pytest.approx(0.25)
    for run in runs:
        storage.remove(storage.join(run.path, "stages", "evaluate-agcl-labels"))
    variants = {variant["key"]: variant for variant in study_record(config, runs, title="t")["variants"]}
    assert list(variants) == ["info-nce", "distilled"]
    assert (variants["distilled"]["reference"], variants["distilled"]["gain"]) == (None, {})


def test_seeds_with_different_queries_are_refused(tmp_path, config):
    runs = [write_run(tmp_path, 0), write_run(tmp_path, 1, rows=[3, 5, 8, 10])]
    with pytest.raises(ValueError, match="different queries of protocol 'fine'"):
        study_record(config, runs, title="t")


def test_encoders_with_different_numbers_of_steps_are_refused(tmp_path, config):
    runs = [write_run(tmp_path, 0), write_run(tmp_path, 1, steps=78)]
    with pytest.raises(ConfigError, match=r"77 of baseline.*78 of baseline"):
        study_record(config, runs, title="t")


def test_a_stale_variant_is_left_out_with_a_warning(tmp_path, config, caplog):
    run = write_run(tmp_path, 0)
    evaluated = run.committed("evaluate-distilled")
    # The encoder of one variant is trained again, its evaluation is not.
    inputs = {"upstream": {}, "config": {"agcl": {"steps": 77}}, "more": 1}
    run.run_stage("agcl-r0", inputs, lambda _: StageOutcome({}, {}))
    assert evaluated.fingerprint == run.committed("evaluate-distilled").fingerprint
    record = study_record(config, [run], title="t")
    assert [variant["key"] for variant in record["variants"]] == ["info-nce", "agcl"]
    assert "evaluate-distilled" in caplog.text


def test_the_cost_of_a_variant_excludes_shared_stages(tmp_path):
    run = write_run(tmp_path, 0)
    assert {name for name, _ in upstream_costs(run, "evaluate-agcl-labels")} == {"agcl-labels", "labels"}
    assert {name for name, _ in upstream_costs(run, "evaluate-baseline")} == {"baseline"}
