"""Names of stages and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afmrl_ray.runs import StageName

WORD = st.from_regex(r"[a-z][a-z0-9]{0,7}", fullmatch=True)
KIND = st.lists(WORD, min_size=1, max_size=3).map("-".join).filter(lambda kind: StageName.parse(kind).round is None)


@given(KIND, st.none() | st.integers(0, 10_000))
def test_a_name_survives_its_text(kind: str, number: int | None) -> None:
    name = StageName(kind, number)
    assert StageName.parse(str(name)) == name


def test_names_are_those_on_disk() -> None:
    assert str(StageName("agcl", 0)) == "agcl-r0"
    assert str(StageName("evaluate-baseline")) == "evaluate-baseline"
    assert StageName.parse("query-attributes-r12") == StageName("query-attributes", 12)
    assert StageName.parse("labels-pairs") == StageName("labels-pairs")


@pytest.mark.parametrize(("kind", "number"), [("agcl-r0", None), ("AGCL", 0), ("", None), ("agcl-", 0), ("agcl", -1)])
def test_malformed_names_are_refused(kind: str, number: int | None) -> None:
    with pytest.raises(ValueError, match=r"is no kind of stage|is negative"):
        StageName(kind, number)
