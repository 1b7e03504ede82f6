"""Which rounds are promoted and when a run ends: on hand-made numbers, and in the driver with given evaluations."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from afmrl_ray.cit.driver import run_cit
from afmrl_ray.cit.promotion import GUARDED, converged, decide
from afmrl_ray.cit.spec import StageContext
from afmrl_ray.config import validate
from afmrl_ray.config.cit import GateConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.retrieval.evaluate import Value
from afmrl_ray.retrieval.per_query import read_per_query
from afmrl_ray.runs import Stage, StageName, StageOutcome
from tests.cit.fake_stages import FakePipeline, evaluation_of, fake_run

SURE, UNSURE, FINE = Value(-0.05, -0.07, -0.03), Value(-0.05, -0.09, -0.01), Value(0.01, -0.01, 0.03)


@pytest.mark.parametrize(
    ("changes", "strict", "refused"),
    [
        ({}, False, []),
        ({"a": FINE, "b": UNSURE}, False, []),
        ({"a": FINE, "b": UNSURE}, True, ["b"]),
        ({"a": SURE, "b": SURE, "c": FINE}, False, ["a", "b"]),
        ({"a": Value(-0.03)}, False, ["a"]),
    ],
)
def test_a_round_that_surely_loses_too_much_is_refused(changes, strict, refused):
    found = decide(changes, GateConfig(protocols=tuple(changes), max_loss=0.02, strict=strict))
    assert found.promoted == (not refused)
    assert [line.split()[0] for line in found.why] == refused


def test_a_run_has_converged_when_the_last_rounds_gained_nothing_for_sure():
    gain, none, loss = Value(0.05, 0.01, 0.09), Value(0.05, -0.01, 0.11), Value(-0.05, -0.09, -0.01)
    assert not converged([none, none], None)
    assert not converged([none], 2)
    assert converged([gain, none, loss], 2)
    assert not converged([none, gain], 1)
    assert not converged([none, gain, none], 2)


def make(tmp_path, fractions, **cit) -> FakePipeline:
    """A pipeline whose evaluations are given: by protocol, the fraction of correct queries in each round."""
    protocols = [
        {"kind": "retrieval", "name": "fine"},
        {"kind": "retrieval", "name": "chosen", "query": {"split": ["val"]}},
        {"kind": "labels", "name": "families", "label": "family_id"},
    ]
    evaluation = {"protocols": protocols, "bootstrap_samples": 200}
    config = validate({"evaluation": evaluation, "cit": {"rounds": 4, **cit}})
    metrics = {each.name: GUARDED[each.kind] for each in config.evaluation.protocols}

    def evaluate(context: StageContext) -> StageOutcome:
        number = StageName.parse(context.name).round
        return evaluation_of(
            {
                name: (metrics[name], (np.arange(1000) < 1000 * values[number]).astype(float))
                for name, values in fractions.items()
            }
        )(context)

    return FakePipeline(config, fake_run(tmp_path), functions={"evaluate": evaluate})


def evaluated(pipeline: FakePipeline) -> list[int | None]:
    names = [StageName.parse(name) for name in pipeline.ran]
    return [name.round for name in names if name.kind == "evaluate"]


def promotion(pipeline: FakePipeline, number: int) -> Stage:
    return pipeline.stage(StageName("promotion", number))


def test_a_refused_round_ends_the_run_and_the_last_good_one_stays_its_result(tmp_path, caplog):
    shares = {"fine": [0.5, 0.6, 0.9, 0.9], "families": [0.8, 0.79, 0.6, 0.9]}
    pipeline = make(tmp_path, shares, gate={"protocols": ["families"], "max_loss": 0.05})
    run_cit(pipeline)
    assert evaluated(pipeline) == [0, 1, 2]
    assert "round 2 is refused" in caplog.text
    assert "families changes by -0.1900" in caplog.text
    assert promotion(pipeline, 2).metrics["promoted_round"] == 1
    assert promotion(pipeline, 2).metrics["gain"]["mean"] == pytest.approx(0.3)
    again = make(tmp_path, shares, gate={"protocols": ["families"], "max_loss": 0.05})
    run_cit(again)
    assert evaluated(again) == [], "what is committed was run again"
    free = make(tmp_path, shares)
    run_cit(free)
    assert evaluated(free) == [3]
    assert promotion(free, 3).metrics["promoted_round"] == 3


def test_losses_are_counted_from_the_last_promoted_round(tmp_path):
    shares = {"fine": [0.5] * 4, "families": [0.8, 0.77, 0.74, 0.7]}
    pipeline = make(tmp_path, shares, gate={"protocols": ["families"], "max_loss": 0.05})
    run_cit(pipeline)
    assert evaluated(pipeline) == [0, 1, 2, 3]
    assert [promotion(pipeline, number).metrics["promoted"] for number in range(4)] == [True] * 4


def test_a_run_ends_when_rounds_gain_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pipeline = make(tmp_path, {"fine": [0.5, 0.6, 0.6, 0.7], "families": [0.5] * 4}, patience=1)
    run_cit(pipeline)
    assert evaluated(pipeline) == [0, 1, 2]
    assert "no significant gain for 1 rounds" in caplog.text


def test_gains_are_those_of_the_protocol_that_decides(tmp_path):
    shares = {"fine": [0.5, 0.6, 0.7, 0.8], "chosen": [0.5, 0.5, 0.7, 0.8], "families": [0.5] * 4}
    default = make(tmp_path, shares, patience=1)
    run_cit(default)
    assert evaluated(default) == [0, 1, 2, 3]
    chosen = make(tmp_path, shares, patience=1, selection_protocol="chosen")
    run_cit(chosen)
    assert promotion(chosen, 1).metrics["gain"]["mean"] == 0, "the earlier decision was taken for this one"
    assert "promotion-r2" not in chosen.ran


def test_numbers_of_queries_survive_the_disk(tmp_path):
    pipeline = make(tmp_path, {"fine": [0.25], "families": [0.5]})
    rows, values = read_per_query(pipeline.stage(StageName("evaluate", 0)), "fine", "hit@1")
    assert rows.tolist() == list(range(1000))
    assert values.sum() == 250


def test_a_guard_of_what_is_not_measured_is_refused():
    with pytest.raises(ConfigError, match=r"cit\.gate\.protocols: 'coarse' is not a protocol"):
        validate({"cit": {"gate": {"protocols": ["coarse"]}}})
