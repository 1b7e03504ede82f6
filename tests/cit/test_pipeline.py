"""Stages as declared data: what runs, what is skipped, what a change touches, and what the bookkeeping costs."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from afmrl_ray.cit.driver import run_cit
from afmrl_ray.cit.projection import UndeclaredReadError, fingerprinted_values
from afmrl_ray.cit.schedule import declarations, describe, resources
from afmrl_ray.cit.spec import StageSpec
from afmrl_ray.cit.stages import BY_ROUND, ONCE, declare, run_names
from afmrl_ray.config import validate, with_values
from afmrl_ray.runs import RunDirectory, StageName, StageOutcome
from tests.cit.fake_stages import FakePipeline, fake_run

ROUND = ("attributes", "agcl", "gallery", "rar", "evaluate", "promotion")


def names_of_a_run(rounds: int) -> set[str]:
    by_round = {f"{kind}-r{number}" for number in range(rounds) for kind in ROUND}
    return {"catalogue", "models", "baselines", "labels", "distill", *by_round, f"attributes-r{rounds}"}


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_a_run_of_any_number_of_rounds_runs_each_stage_once_and_skips_it_the_next_time(tmp_path, rounds):
    config = validate({"cit": {"rounds": rounds}})
    pipeline = FakePipeline(config, fake_run(tmp_path))
    run_cit(pipeline)
    assert sorted(pipeline.ran) == sorted(names_of_a_run(rounds))
    again = FakePipeline(config, pipeline.run)
    run_cit(again)
    assert again.ran == []
    longer = FakePipeline(with_values(config, {"cit.rounds": rounds + 1}), pipeline.run)
    run_cit(longer)
    assert set(longer.ran) == names_of_a_run(rounds + 1) - names_of_a_run(rounds)


def bookkeeping_calls(tmp_path, rounds: int) -> int:
    """Calls of functions of `afmrl_ray.cit` and `afmrl_ray.config` while a committed run is gone through again."""
    config = validate({"cit": {"rounds": rounds}})
    run = fake_run(tmp_path / str(rounds))
    run_cit(FakePipeline(config, run))
    calls = 0

    def count(frame, event, _):
        nonlocal calls
        path = frame.f_code.co_filename
        calls += event == "call" and ("afmrl_ray/cit" in path or "afmrl_ray/config" in path)

    pipeline = FakePipeline(config, RunDirectory(str(tmp_path / str(rounds)), "t"))
    sys.setprofile(count)
    try:
        run_cit(pipeline)
    finally:
        sys.setprofile(None)
    assert pipeline.ran == []
    return calls


def test_twenty_rounds_cost_at_most_twenty_times_the_bookkeeping_of_one(tmp_path):
    one, twenty = bookkeeping_calls(tmp_path, 1), bookkeeping_calls(tmp_path, 20)
    assert one < twenty <= 20 * one


def test_a_late_round_is_reached_without_deep_recursion(tmp_path):
    config = validate({"cit": {"rounds": 1}})
    pipeline = FakePipeline(config, fake_run(tmp_path))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(160)
    try:
        fingerprint = pipeline.fingerprint(StageName("promotion", 60))
    finally:
        sys.setrecursionlimit(limit)
    assert len(fingerprint) == 64
    assert pipeline.ran == []


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ({"evaluation.bootstrap_samples": 60}, {"baselines", "evaluate", "promotion"}),
        ({"rar.steps": 3}, {"rar", "attributes-r1", "evaluate", "promotion"}),
        ({"annotate.pool.batch_size": 5}, {"attributes", "agcl", "gallery", "rar", "evaluate", "promotion"}),
        ({"evaluation.pool.batch_size": 5}, {"baselines", "gallery", "rar", "attributes-r1", "evaluate", "promotion"}),
        ({"annotate.pool.num_workers": 2, "run.name": "x", "ray.num_cpus": 2, "agcl.workers.max_failures": 9}, set()),
        ({"rar.tokens_per_microbatch": 5, "catalogue.cache_dir": "elsewhere"}, set()),
        ({"cit.gate.max_loss": 0.5}, {"promotion"}),
        ({"cit.patience": 3, "index.kind": "exact"}, set()),
    ],
)
def test_a_change_reruns_what_reads_it_and_what_is_downstream(tmp_path, change, rerun):
    config = validate({"cit": {"rounds": 1}})
    first = FakePipeline(config, fake_run(tmp_path))
    run_cit(first)
    second = FakePipeline(with_values(config, change), first.run)
    run_cit(second)
    expected = {name for name in names_of_a_run(1) if name in rerun or StageName.parse(name).kind in rerun}
    assert set(second.ran) == expected


def test_the_seed_reruns_everything_that_draws(tmp_path):
    config = validate({"cit": {"rounds": 1}})
    first = FakePipeline(config, fake_run(tmp_path))
    run_cit(first)
    second = FakePipeline(with_values(config, {"run.seed": 1}), first.run)
    run_cit(second)
    assert names_of_a_run(1) - set(second.ran) == {"catalogue", "labels"}


def test_a_function_that_reads_an_undeclared_field_fails_with_its_name(tmp_path):
    def function(context):
        return StageOutcome({}, {"steps": context.config.agcl.steps + context.config.distill.steps})

    pipeline = FakePipeline(validate({}), fake_run(tmp_path), kept=("sum",))
    name = pipeline.add(StageSpec(StageName("sum"), function, reads=("agcl.steps",)))
    with pytest.raises(UndeclaredReadError, match=r"stage sum reads the config field distill,.*add it to `reads`"):
        pipeline.stage(name)
    assert pipeline.run.committed(name) is None


def test_an_added_stage_gets_its_changes_and_its_upstream(tmp_path):
    def function(context):
        return StageOutcome({}, {"steps": context.config.agcl.steps, "labels": context.upstream["labels"].name})

    spec = StageSpec(
        StageName("variant"), function, reads=("agcl",), upstream={"labels": StageName("labels")},
        changes={"agcl.steps": 3},
    )  # fmt: skip
    pipeline = FakePipeline(validate({}), fake_run(tmp_path), kept=("variant",))
    found = pipeline.stage(pipeline.add(spec))
    assert found.metrics == {"steps": 3, "labels": "labels"}
    assert found.inputs["changes"] == {"agcl.steps": 3}
    assert found.inputs["upstream"] == {"labels": pipeline.fingerprint(StageName("labels"))}
    assert pipeline.ran == ["catalogue", "labels", "variant"]
    pipeline.add(spec)
    with pytest.raises(ValueError, match="declared twice"):
        pipeline.add(replace(spec, changes={}))


def test_every_declaration_names_existing_fields_stages_and_says_what_it_does():
    config = validate({"teacher": {"kind": "column"}})
    specs = [declare(StageName("catalogue"), config), *(declare(StageName(kind), config) for kind in ONCE)]
    specs += [declare(StageName(kind, number), config) for kind in BY_ROUND for number in (0, 1, 5)]
    for spec in specs:
        fingerprinted_values(config, spec.reads)
        for upstream in spec.upstream.values():
            assert declare(upstream, config).name == upstream
        assert spec.summary.endswith("."), spec.name
        assert "\n" not in spec.summary
    with pytest.raises(KeyError, match="there is no stage agcl;"):
        declare(StageName("agcl"), config)


def test_a_run_with_checkpoints_makes_none(tmp_path):
    config = validate({"encoder": {"path": "e"}, "generator": {"path": "g"}, "cit": {"rounds": 1}})
    assert StageName("models") not in {spec.name for spec in declarations(config)}
    assert StageName("models") in {spec.name for spec in declarations(with_values(config, {"encoder.path": None}))}


def test_the_schedule_lists_stages_upstream_first_with_their_resources():
    config = validate({"cit": {"rounds": 2, "baseline": True}, "agcl": {"workers": {"num_workers": 4}}})
    specs = declarations(config)
    places = {spec.name: place for place, spec in enumerate(specs)}
    assert all(places[upstream] < places[spec.name] for spec in specs for upstream in spec.upstream.values())
    assert {str(name) for name in run_names(config)} < {str(spec.name) for spec in specs}
    asked = resources(config)
    assert [demand.count for demand in asked["agcl"]] == [4]
    assert set(asked) >= {"models", "distill", "attributes", "agcl", "gallery", "rar", "evaluate"}
    text = describe(config, {"CPU": 2.0})
    assert "MORE THAN AVAILABLE (CPU)" in text
    (line,) = (line for line in text.splitlines() if line.startswith("  stages"))
    assert line.index("distill") < line.index("attributes-r0") < line.index("agcl-r0") < line.index("promotion-r0")


def test_the_baseline_does_not_depend_on_settings_of_attributes(tmp_path):
    config = validate({})
    changes = {"agcl.lexical.scale": "self", "agcl.mask.enabled": True, "agcl.attribute_dropout.query": 0.8}
    run, name = fake_run(tmp_path), StageName("baseline")
    first, same, other = (
        FakePipeline(with_values(config, changed), run).fingerprint(name)
        for changed in ({}, changes, {"agcl.steps": 7})
    )
    assert first == same != other
    stage = FakePipeline(config, run).stage(name)
    assert stage.inputs["config"]["agcl"]["lexical"]["enabled"] is False
