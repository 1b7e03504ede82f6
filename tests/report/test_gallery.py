"""Attributes before and after RAR, and the worst failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from afmrl_ray import storage
from afmrl_ray.attributes.store import AttributeRow, write_attributes
from afmrl_ray.report import write_report
from afmrl_ray.report.collect import collect
from afmrl_ray.report.examples import PairChange, pair_changes
from afmrl_ray.report.gallery import make_gallery
from afmrl_ray.runs import RunDirectory, StageOutcome
from tests.report.fake_run import FakeItems, FakeRun

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


def commit_evaluation(run: RunDirectory, number: int, drawn: list[Any], worst: list[Any]) -> None:
    def body(directory: str) -> StageOutcome:
        storage.write_json(storage.join(directory, "examples.json"), drawn)
        storage.write_json(storage.join(directory, "failures.json"), worst)
        return StageOutcome({"examples": "examples.json", "failures": "failures.json"}, {"protocols": {}})

    run.run_stage(f"evaluate-r{number}", {}, body)


def query(title: str, right: int | None, **more: Any) -> dict[str, Any]:
    hits = [{"row": 3 + hit, "item_id": f"item-{hit}", "score": 0.9, "right": hit == right} for hit in range(5)]
    return {"query_row": 0, "item_id": ITEM, "title": title, "attributes": ROUNDS[-1], "hits": hits, **more}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    fake = FakeRun(str(tmp_path))
    for number, text in enumerate(ROUNDS):
        commit_attributes(fake.run, number, text)
    missed = {"row": 2, "item_id": "item-missed", "attributes": "color: green"}

    worst = [query(f"failed {rank}", None, rank=rank, missed=missed) for rank in (77, 61)]
    commit_evaluation(fake.run, 1, [query("drawn", 0)], worst)
    return fake.run


def test_a_query_shows_what_every_generator_wrote_and_what_it_changed(run: RunDirectory) -> None:
    gallery = make_gallery(collect(run), FakeItems())
    assert gallery is not None
    (example,) = gallery.examples
    assert [label for label, _ in example.attributes] == ["distilled", "after RAR, round 0", "after RAR, round 1"]
    changes = [[(pair.text, pair.kind) for pair in pairs] for _, pairs in example.attributes]
    assert changes[0] == [("color: blue", "kept"), ("size: small", "kept"), ("cap: red", "kept")]
    assert changes[1] == [("color: blue", "kept"), ("size: large", "changed"), ("cap: red", "removed")]
    assert changes[2] == [("color: blue", "kept"), ("size: large", "kept"), ("logo: star", "added")]


def test_failures_stand_in_a_section_of_their_own_with_the_positive_that_was_missed(run: RunDirectory) -> None:
    page = Path(write_report(run, items=FakeItems())).read_text("utf-8")
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


@pytest.mark.parametrize(
    ("promoted", "shown"), [({}, 1), ({0: True}, 1), ({0: True, 1: True}, 1), ({0: True, 1: False}, 0)]
)
def test_a_refused_round_is_not_shown_as_the_result(tmp_path: Path, promoted: dict[int, bool], shown: int) -> None:
    fake = FakeRun(str(tmp_path))
    for number, text in enumerate(ROUNDS):
        commit_attributes(fake.run, number, text)
    missed = {"row": 2, "item_id": "item-missed", "attributes": "color: green"}
    for number in range(2):
        commit_evaluation(
            fake.run, number, [query(f"drawn {number}", 0)], [query(f"failed {number}", None, rank=9, missed=missed)]
        )
    for number, yes in promoted.items():
        fake.stage(f"promotion-r{number}", {"promoted": yes, "why": []}, f"evaluate-r{number}")
    page = Path(write_report(fake.run)).read_text("utf-8")
    other = 1 - shown
    assert f"drawn {shown}" in page
    assert f"failed {shown}" in page
    assert f"drawn {other}" not in page
    assert f"failed {other}" not in page
    assert page.count(f"after round {shown}") == 2
    assert f"after round {other}" not in page
    assert ("after RAR, round 1 (refused)" in page) == (shown == 0)
    assert "after RAR, round 0 (refused)" not in page
