"""A stage sees the config fields that it declares, and no others."""

from __future__ import annotations

import pickle

import pytest

from afmrl_ray.cit.projection import ConfigProjection, UndeclaredReadError, fingerprinted_values
from afmrl_ray.config import validate, with_values

CONFIG = validate({"agcl": {"steps": 7}, "annotate": {"pool": {"batch_size": 3}}})
READS = ("agcl", "annotate.items", "rar.reward.kind")


@pytest.fixture(params=["as made", "pickled"])
def projection(request: pytest.FixtureRequest) -> ConfigProjection:
    made = ConfigProjection(CONFIG, READS, "demo-r0")
    return made if request.param == "as made" else pickle.loads(pickle.dumps(made))


def test_declared_fields_are_those_of_the_config(projection: ConfigProjection) -> None:
    assert projection.agcl is CONFIG.agcl or projection.agcl == CONFIG.agcl
    assert projection.agcl.workers.num_workers == CONFIG.agcl.workers.num_workers
    assert projection.annotate.items == CONFIG.annotate.items
    assert projection.rar.reward.kind == CONFIG.rar.reward.kind


@pytest.mark.parametrize("path", ["distill", "annotate.pool", "rar.steps", "rar.reward.k"])
def test_an_undeclared_read_names_the_stage_and_the_field(projection: ConfigProjection, path: str) -> None:
    *parents, last = path.split(".")
    section = projection
    for parent in parents:
        section = getattr(section, parent)
    with pytest.raises(UndeclaredReadError, match=rf"stage demo-r0 reads the config field {path},"):
        getattr(section, last)
    # `hasattr` and defaults do not hide it.
    with pytest.raises(UndeclaredReadError):
        getattr(section, last, None)


def test_a_projection_is_frozen(projection: ConfigProjection) -> None:
    with pytest.raises(AttributeError, match="frozen"):
        projection.agcl = None


@pytest.mark.parametrize("read", ["agcll", "agcl.stepz", "agcl.steps.x", "agcl.sides"])
def test_a_declared_name_must_be_a_field(read: str) -> None:
    with pytest.raises(ValueError, match="is no field of the config"):
        ConfigProjection(CONFIG, (read,), "demo")


def test_fingerprints_hold_declared_fields_without_those_of_the_runtime() -> None:
    values = fingerprinted_values(CONFIG, (*READS, "run", "ray", "annotate.pool"))
    assert values["agcl"] == CONFIG.agcl.fingerprinted()
    assert values["annotate"] == {"items": CONFIG.annotate.items.fingerprinted(), "pool": {"batch_size": 3}}
    assert values["rar"] == {"reward": {"kind": CONFIG.rar.reward.kind}}
    assert values["run"] == {"seed": CONFIG.run.seed}
    assert values["ray"] == {}
    assert fingerprinted_values(CONFIG, ("run.name", "run.seed")) == {"run": {"seed": CONFIG.run.seed}}


def test_order_and_repetition_of_the_declaration_do_not_matter() -> None:
    once = fingerprinted_values(CONFIG, ("rar.reward", "rar.steps"))
    assert once == fingerprinted_values(CONFIG, ("rar.steps", "rar.reward", "rar.reward.kind", "rar.steps"))
    assert fingerprinted_values(CONFIG, ("rar.reward.kind", "rar")) == fingerprinted_values(CONFIG, ("rar",))


@pytest.mark.parametrize(("change", "differs"), [("agcl.steps", True), ("rar.reward.k", False), ("rar.steps", False)])
def test_only_declared_fields_change_the_fingerprint(change: str, differs: bool) -> None:
    changed = with_values(CONFIG, {change: 11})
    assert (fingerprinted_values(changed, READS) != fingerprinted_values(CONFIG, READS)) == differs
