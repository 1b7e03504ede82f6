"""Example queries: attributes before and after RAR, retrieved items, the worst failures."""

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
from tests.report.page import Element, read_page

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
def test_pairs_are_compared_with_those_of_the_text_before(
    before: str | None, after: str, expected: list[tuple[str, str]]
) -> None:
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


def test_an_example_has_the_attributes_of_every_generator_and_their_changes(run: RunDirectory) -> None:
    gallery = make_gallery(collect(run), FakeItems())
    assert gallery is not None
    (example,) = gallery.examples
    assert [label for label, _ in example.attributes] == ["distilled", "after RAR, round 0", "after RAR, round 1"]
    changes = [[(pair.text, pair.kind) for pair in pairs] for _, pairs in example.attributes]
    assert changes[0] == [("color: blue", "kept"), ("size: small", "kept"), ("cap: red", "kept")]
    assert changes[1] == [("color: blue", "kept"), ("size: large", "changed"), ("cap: red", "removed")]
    assert changes[2] == [("color: blue", "kept"), ("size: large", "kept"), ("logo: star", "added")]


def titles(section: Element) -> list[str]:
    """Titles of the queries of a section."""
    return [article.all("p")[0].own_text for article in section.all("article")]


def test_failures_have_a_section_with_the_missed_positive_and_the_rank(run: RunDirectory) -> None:
    page = read_page(Path(write_report(run, items=FakeItems())).read_text("utf-8"))
    assert titles(page.section("examples")) == ["drawn"]
    failures = page.section("failures")
    assert titles(failures) == ["failed 77", "failed 61"]
    assert [rank.text for rank in failures.all("span", kind="rank")] == ["77", "61"]
    missed = failures.all("dl", kind="missed")
    assert [each.all("dt")[0].text.split()[-1] for each in missed] == ["item-missed"] * 2
    assert [each.all("dd")[0].text for each in missed] == ["color: green"] * 2
    assert len(failures.all("li")) == 10
    assert failures.all("li", kind="right") == []


def test_without_failures_there_is_no_such_section(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    fake.stage("evaluate-r0", {"protocols": {}}, examples=True)
    page = read_page(Path(write_report(fake.run)).read_text("utf-8"))
    assert page.find("examples") is not None
    assert page.find("failures") is None


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
    page = read_page(Path(write_report(fake.run)).read_text("utf-8"))
    examples, failures = page.section("examples"), page.section("failures")
    assert titles(examples) == [f"drawn {shown}"]
    assert titles(failures) == [f"failed {shown}"]
    rounds = [each.text for section in (examples, failures) for each in section.all("span", kind="round")]
    assert rounds == [f"{shown}"] * 2
    gallery = make_gallery(collect(fake.run), None)
    assert gallery is not None
    labels = [label for label, _ in gallery.examples[0].attributes]
    assert [label.endswith("(refused)") for label in labels] == [False, False, shown == 0]
