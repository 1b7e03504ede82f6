"""The pieces of AGCL: each is plain InfoNCE but for its own sections."""

from __future__ import annotations

import pytest

from afmrl_ray.config import Config, load_config, with_values
from jobs.experiments.pieces import PIECES, piece_settings

SECTIONS = ("lexical", "mask", "batch_grouping")
OWN = {
    "printed-weights": {"lexical"},
    "weights": {"lexical"},
    "true-weights": {"lexical"},
    "mask": {"mask"},
    "true-mask": {"mask"},
    "batches": {"batch_grouping"},
    "true-batches": {"batch_grouping"},
    "all-pieces": set(SECTIONS),
    "all-true": set(SECTIONS),
}


@pytest.fixture(scope="module")
def study() -> Config:
    return load_config("jobs/configs/ladder.yaml")


def active(config: Config) -> set[str]:
    agcl = config.agcl
    found = {name for name in ("lexical", "mask") if getattr(agcl, name).enabled}
    return found | ({"batch_grouping"} if agcl.batch_grouping.fraction else set())


@pytest.mark.parametrize("key", list(PIECES))
def test_a_piece_has_its_own_sections_and_nothing_else(study, key):
    config = with_values(study, dict(piece_settings(study, key)))
    assert active(config) == OWN[key]
    assert config.agcl.attribute_dropout.query == config.agcl.attribute_dropout.positive == 1.0
    assert config.agcl.steps == study.agcl.steps


def test_pieces_have_the_settings_of_the_study_and_ceilings_what_is_true(study):
    settings = {key: with_values(study, dict(piece_settings(study, key))).agcl for key in PIECES}
    assert settings["weights"].lexical == settings["all-pieces"].lexical == study.agcl.lexical
    assert settings["mask"].mask == study.agcl.mask
    assert settings["batches"].batch_grouping == study.agcl.batch_grouping
    printed = settings["printed-weights"].lexical
    assert (printed.terms, printed.scale, printed.beta) == ("words", "raw", 1.0)
    assert settings["true-mask"].mask.kind == settings["all-true"].mask.kind == "column"
    assert settings["true-batches"].batch_grouping.column == "family_id"
    assert settings["true-batches"].batch_grouping.fraction == study.agcl.batch_grouping.fraction
