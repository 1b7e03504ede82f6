"""Which stages the run's config would not give, on stages written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from afmrl_ray.cit import stale
from afmrl_ray.cit.stale import stale_stages
from afmrl_ray.runs import Stage

CONFIG: dict[str, Any] = {
    "run": {"seed": 0},
    "encoder": {"kind": "vlm", "path": None},
    "agcl": {"steps": 60, "mask": {"enabled": True, "threshold": 0.9}},
}


def stage(name: str, *above: Stage, upstream: Any = None, seed: int = 0, **inputs: Any) -> Stage:
    named = {each.name: each.fingerprint for each in above}
    return Stage(
        name=name,
        fingerprint=f"of {name}",
        directory="",
        inputs={"config": {"agcl": CONFIG["agcl"], "run": {"seed": seed}}, "upstream": upstream or named, **inputs},
        outputs={},
        digests={},
        metrics={},
        committed_at="",
        seconds=0.0,
        peak_memory_mb=None,
    )


def rounds(count: int, **first: Any) -> list[Stage]:
    """Rounds with the upstream of a run's: those of a round, and the same stages of the round before."""
    found = [stage("distill", **first)]
    agcl = rar = found[0]
    for number in range(count):
        attributes = stage(f"attributes-r{number}", rar)
        agcl = stage(f"agcl-r{number}", attributes, agcl)
        gallery = stage(f"gallery-r{number}", agcl, attributes)
        rar = stage(f"rar-r{number}", rar, agcl, gallery)
        found += [attributes, agcl, gallery, rar]
    return found


def test_every_stage_is_judged_once_however_many_paths_lead_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    judge = stale.made_with
    monkeypatch.setattr(stale, "made_with", lambda each, config: asked.append(each.name) or judge(each, config))
    stages = rounds(40)
    assert stale_stages(stages, CONFIG) == set()
    assert sorted(asked) == sorted(each.name for each in stages)
    other = rounds(40, seed=1)
    assert stale_stages(other, CONFIG) == {each.name for each in other}


def test_whatever_is_downstream_of_a_changed_stage_is_stale() -> None:
    first = stage("first")
    second = stage("second", first)
    third = stage("third", second)
    beside = stage("beside")
    again = stage("first", upstream={"beside": beside.fingerprint})
    assert stale_stages([third, second, again, beside], CONFIG) == set()
    moved = stage("second", upstream={"first": "of another first"})
    assert stale_stages([third, moved, first, beside], CONFIG) == {"second", "third"}
    assert stale_stages([third, stage("second", first, seed=3), first, beside], CONFIG) == {"second", "third"}
    gone = stage("gone")
    assert stale_stages([stage("alone", gone)], CONFIG) == set()


@pytest.mark.parametrize(
    "changes",
    [
        {"agcl.steps": 5},
        {"agcl.mask.enabled": False},
        {"agcl.mask": {"enabled": False}},
        {"agcl.mask": {"enabled": False}, "agcl.steps": 5},
    ],
)
def test_a_variant_is_judged_by_what_it_does_not_change(changes: dict[str, Any]) -> None:
    masked = not any(key.startswith("agcl.mask") for key in changes)
    own = {"steps": changes.get("agcl.steps", 60), "mask": {"enabled": masked, "threshold": 0.9}}
    variant = stage("variant", config={"agcl": own}, changes=changes)
    assert stale_stages([variant], CONFIG) == set()
    assert stale_stages([stage("variant", config={"agcl": own})], CONFIG) == {"variant"}
    other = {**CONFIG, "agcl": {**CONFIG["agcl"], "steps": 61}}
    assert stale_stages([variant], other) == (set() if "agcl.steps" in changes else {"variant"})


def test_changes_of_a_variant_do_not_concern_its_upstream() -> None:
    base = stage("base")
    variant = stage("variant", base, config={"agcl": {**CONFIG["agcl"], "steps": 5}}, changes={"agcl.steps": 5})
    above = stage("above", variant, config={})
    assert stale_stages([base, variant, above], CONFIG) == set()
    other = {**CONFIG, "agcl": {**CONFIG["agcl"], "steps": 61}}
    assert stale_stages([base, variant, above], other) == {"base", "variant", "above"}


def test_a_seed_may_be_a_variants_own() -> None:
    assert stale_stages([stage("depth", seed=2, changes={"run.seed": 2})], CONFIG) == set()
    assert stale_stages([stage("depth", seed=2)], CONFIG) == {"depth"}


@pytest.mark.parametrize("upstream", [["of first", "of second"], "of first"])
def test_records_that_do_not_name_upstream_stages_have_none(upstream: Any) -> None:
    stages = [stage("first", seed=1), stage("old", upstream=upstream)]
    assert stale_stages(stages, CONFIG) == {"first"}
    assert stale.upstream_fingerprints(stages[1]) == {}
