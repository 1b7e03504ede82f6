"""The record of the ladder, from runs whose stages are written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from afmrl_ray.cit.evaluation import write_per_query

from afmrl_ray import storage
from afmrl_ray.cit.ladder_record import ladder_record, stands_on
from afmrl_ray.cit.stages import RunDirectory, StageOutcome
from afmrl_ray.config import validate
from afmrl_ray.errors import ConfigError
from afmrl_ray.retrieval.evaluate import ProtocolResult
from afmrl_ray.retrieval.seeds import over_seeds

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


def test_means_gains_and_order_of_the_rungs(tmp_path, config):
    record = ladder_record(config, [write_run(tmp_path, seed) for seed in (0, 1)], title="t")
    rungs = {rung["key"]: rung for rung in record["rungs"]}
    assert list(rungs) == ["vlm2vec", "agcl", "distilled"]
    assert record["seeds"] == 2
    assert all(rung["encoder_steps"] == 77 for rung in record["rungs"])
    expected = over_seeds([0.5, 0.75])
    found = rungs["vlm2vec"]["metrics"]["fine"]["hit@1"]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((expected.mean, expected.low, expected.high))
    # Nothing that is measured lies below the lowest rung; metrics that are no means over queries have no paired gain.
    assert rungs["vlm2vec"]["gain"] == {}
    assert rungs["agcl"]["gain"]["fine"]["hit@1"]["mean"] == pytest.approx(0.25)
    assert rungs["distilled"]["gain"]["fine"]["hit@1"]["mean"] == pytest.approx(-0.375)
    assert rungs["agcl"]["gain"]["fine"].keys() == {"hit@1"}


def test_a_rung_counts_the_seeds_that_measured_it_and_pairs_those_that_both_have(tmp_path, config):
    runs = [write_run(tmp_path, seed) for seed in (0, 1)]
    storage.remove(storage.join(runs[1].path, "stages", "evaluate-agcl-labels", "stage.json"))
    rungs = {rung["key"]: rung for rung in ladder_record(config, runs, title="t")["rungs"]}
    assert [rung["seeds"] for rung in rungs.values()] == [2, 1, 2]
    assert rungs["agcl"]["metrics"]["fine"]["hit@1"] == {"mean": 0.75, "low": None, "high": None}
    assert rungs["distilled"]["gain"]["fine"]["hit@1"]["mean"] == pytest.approx(0.25)
    for run in runs:
        storage.remove(storage.join(run.path, "stages", "evaluate-agcl-labels"))
    rungs = {rung["key"]: rung for rung in ladder_record(config, runs, title="t")["rungs"]}
    assert list(rungs) == ["vlm2vec", "distilled"]
    assert (rungs["distilled"]["below"], rungs["distilled"]["gain"]) == (None, {})


def test_seeds_that_answered_other_queries_are_refused(tmp_path, config):
    runs = [write_run(tmp_path, 0), write_run(tmp_path, 1, rows=[3, 5, 8, 10])]
    with pytest.raises(ValueError, match="same queries"):
        ladder_record(config, runs, title="t")


def test_encoders_that_took_other_numbers_of_steps_are_not_compared(tmp_path, config):
    runs = [write_run(tmp_path, 0), write_run(tmp_path, 1, steps=78)]
    with pytest.raises(ConfigError, match=r"77 of baseline.*78 of baseline"):
        ladder_record(config, runs, title="t")


def test_a_rung_made_with_other_settings_is_left_out_and_told(tmp_path, config, caplog):
    run = write_run(tmp_path, 0)
    evaluated = run.committed("evaluate-distilled")
    # The encoder of one rung is trained anew, its evaluation is not.
    inputs = {"upstream": {}, "config": {"agcl": {"steps": 77}}, "more": 1}
    run.run_stage("agcl-r0", inputs, lambda _: StageOutcome({}, {}))
    assert evaluated.fingerprint == run.committed("evaluate-distilled").fingerprint
    record = ladder_record(config, [run], title="t")
    assert [rung["key"] for rung in record["rungs"]] == ["vlm2vec", "agcl"]
    assert "evaluate-distilled" in caplog.text


def test_a_rung_costs_what_it_stands_on_but_not_what_all_share(tmp_path):
    run = write_run(tmp_path, 0)
    assert {name for name, _ in stands_on(run, "evaluate-agcl-labels")} == {"agcl-labels", "labels"}
    assert {name for name, _ in stands_on(run, "evaluate-baseline")} == {"baseline"}
