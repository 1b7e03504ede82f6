"""What the benchmark of attributes counts for each way to get them, on a world written by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from afmrl_ray.config.evaluation import EvaluationConfig, RetrievalProtocol

STORED = {"valid": "color: red; size: small", "invalid": "", "gallery": "color: blue"}
WRITTEN = {
    ("valid", None): STORED["valid"],
    ("valid", 1): "color: red",
    # Cut after its first pair, what never ends is valid.
    ("invalid", None): "",
    ("invalid", 1): "cap: green",
}
ITEMS = ["valid", "invalid", "gallery"]


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "jobs/bench"))
    return importlib.import_module("inference_cost")


def bench_of(cost: Any, with_attributes: str = "both") -> Any:
    bench = cost.Bench.__new__(cost.Bench)
    bench.queries, bench.gallery = np.array([0, 1]), np.array([2])
    bench.encoder = SimpleNamespace(items=ITEMS)
    bench.store = SimpleNamespace(text=STORED.__getitem__)
    bench.annotator = SimpleNamespace(
        annotate=lambda rows, max_pairs=None: [(WRITTEN[ITEMS[row], max_pairs], "") for row in rows]
    )
    bench.catalogue = SimpleNamespace(title=lambda row, columns: ITEMS[row], image_bytes=lambda row: b"")
    bench.protocol = RetrievalProtocol(name="fine", with_attributes=with_attributes)
    bench.config = SimpleNamespace(
        generator=SimpleNamespace(title_columns=()),
        evaluation=EvaluationConfig(bootstrap_samples=10),
        run=SimpleNamespace(seed=0),
    )
    bench._galleries = {}
    return bench


def test_the_first_pairs_of_what_is_invalid_as_a_whole_are_those_that_are_written(cost: Any) -> None:
    ways = bench_of(cost).ways([1])
    assert {way.name: way.texts for way in ways} == {
        "no attributes": ["", ""],
        "all, from a cache": [STORED["valid"], ""],
        "first 1": ["color: red", "cap: green"],
        "all, written": [STORED["valid"], ""],
    }


@pytest.mark.parametrize("row", ["valid", "invalid"])
def test_a_way_that_gives_other_attributes_than_are_searched_with_is_found_out(
    cost: Any, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    bench = bench_of(cost)
    ways = bench.ways([1])
    bench.check(ways, [0, 1])
    monkeypatch.setitem(WRITTEN, (row, None), "color: other")
    with pytest.raises(RuntimeError, match=f"all, written: 'color: other' for {row}"):
        bench.check(ways, [0, 1])


@pytest.mark.parametrize(("with_attributes", "shown"), [("both", STORED["gallery"]), ("query", "")])
def test_the_gallery_has_attributes_only_where_the_protocol_shows_them(
    cost: Any, monkeypatch: pytest.MonkeyPatch, with_attributes: str, shown: str
) -> None:
    bench = bench_of(cost, with_attributes)
    embedded: list[list[str]] = []
    monkeypatch.setattr(bench, "_embed", lambda rows, texts, side: embedded.append(texts) or np.zeros((len(rows), 2)))
    monkeypatch.setattr(cost, "rank", lambda *args, **more: None)
    monkeypatch.setattr(cost, "hit_at_k", lambda ranking, k: np.ones(2))
    for way in bench.ways([]):
        bench.point(way, [1.0])
    none, cache = ["", ""], [STORED["valid"], ""]
    # A gallery without attributes is embedded once for all.
    assert embedded == [[""], none, *([[shown]] if shown else []), cache, cache]
