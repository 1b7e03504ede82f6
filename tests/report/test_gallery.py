"""Attributes before and after RAR, and the worst failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from afmrl_ray import storage
from afmrl_ray.attributes.store import AttributeRow, write_attributes
from afmrl_ray.cit.stages import RunDirectory, StageOutcome
from afmrl_ray.report import write_report
from afmrl_ray.report.collect import collect
from afmrl_ray.report.examples import PairChange, pair_changes
from afmrl_ray.report.gallery import make_gallery
from tests.report.fake_run import FakeListings, FakeRun

ITEM = "item-00000"
ROUNDS = ("color: blue; size: small; cap: red", "color: blue; size: large", "color: blue; size: large; logo: star")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, "a: 1; b: 2", [("a: 1", "kept"), ("b: 2", "kept")]),
        ("a: 1; b: 2", "a: 1; c: 3", [("a: 1", "kept"), ("c: 3", "added"), ("b: 2", "removed")]),
        ("a: 1", "a: 2", [("a: 2", "changed")]),
        ("a: 1", "", [("a: 1", "removed")]),
        ("", "a: 1", [("a: 1", "added")]),
        ("", "", []),
    ],
)
def test_pairs_are_held_against_those_before(before: str | None, after: str, expected: list[tuple[str, str]]) -> None:
    assert pair_changes(before, after) == [PairChange(text, kind) for text, kind in expected]  # type: ignore[arg-type]


def commit_attributes(run: RunDirectory, number: int, text: str) -> None:
    def body(directory: str) -> StageOutcome:
        path = storage.join(directory, "attributes.parquet")
        write_attributes(path, [AttributeRow(ITEM, text)], fingerprint=f"generator {number}")
        return StageOutcome({"attributes": "attributes.parquet"}, {})

    run.run_stage(f"attributes-r{number}", {}, body)


def query(title: str, right: int | None, **more: Any) -> dict[str, Any]:
    hits = [{"row": 3 + hit, "item_id": f"item-{hit}", "score": 0.9, "right": hit == right} for hit in range(5)]
    return {"query_row": 0, "item_id": ITEM, "title": title, "attributes": ROUNDS[-1], "hits": hits, **more}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    fake = FakeRun(str(tmp_path))
    for number, text in enumerate(ROUNDS):
        commit_attributes(fake.run, number, text)
    missed = {"row": 2, "item_id": "item-missed", "attributes": "color: green"}

    def body(directory: str) -> StageOutcome:
        storage.write_json(storage.join(directory, "examples.json"), [query("drawn", 0)])
        worst = [query(f"failed {rank}", None, rank=rank, missed=missed) for rank in (77, 61)]
        storage.write_json(storage.join(directory, "failures.json"), worst)
        return StageOutcome({"examples": "examples.json", "failures": "failures.json"}, {"protocols": {}})

    fake.run.run_stage("evaluate-r1", {}, body)
    return fake.run


def test_a_query_shows_what_every_generator_wrote_and_what_it_changed(run: RunDirectory) -> None:
    gallery = make_gallery(collect(run), FakeListings())
    assert gallery is not None
    (example,) = gallery.examples
    assert [label for label, _ in example.attributes] == ["distilled", "after RAR, round 0", "after RAR, round 1"]
    changes = [[(pair.text, pair.kind) for pair in pairs] for _, pairs in example.attributes]
    assert changes[0] == [("color: blue", "kept"), ("size: small", "kept"), ("cap: red", "kept")]
    assert changes[1] == [("color: blue", "kept"), ("size: large", "changed"), ("cap: red", "removed")]
    assert changes[2] == [("color: blue", "kept"), ("size: large", "kept"), ("logo: star", "added")]


def test_failures_stand_in_a_section_of_their_own_with_the_positive_that_was_missed(run: RunDirectory) -> None:
    page = Path(write_report(run, listings=FakeListings())).read_text("utf-8")
    examples, failures = page.split("<h2>Worst failures</h2>")
    assert "drawn" in examples
    assert "failed 77" not in examples
    assert failures.index("failed 77") < failures.index("failed 61")
    assert "first positive in place 77" in failures
    assert failures.count("its positive item-missed") == 2
    assert failures.count("color: green") == 2
    assert failures.count("✓ right") == 0
    assert failures.count("✗ wrong") == 10


def test_without_failures_there_is_no_such_section(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    fake.stage("evaluate-r0", {"protocols": {}}, examples=True)
    assert "Worst failures" not in Path(write_report(fake.run)).read_text("utf-8")
