"""Inference cost: attributes of every source, galleries, table and chart, with stubs in place of models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from afmrl_ray.config.evaluation import EvaluationConfig, RetrievalProtocol
from afmrl_ray.report.drawing import LIGHT
from jobs.experiments import attribute_sources
from jobs.experiments.attribute_sources import Measurement, SearchedRound
from jobs.experiments.inference_cost import chart, table

STORED = {"valid": "color: red; size: small", "invalid": "", "gallery": "color: blue"}
GENERATED = {
    ("valid", None): STORED["valid"],
    ("valid", 1): "color: red",
    # An output that never ends is invalid as a whole, and valid when it is cut after its first pair.
    ("invalid", None): "",
    ("invalid", 1): "cap: green",
}
ITEMS = ["valid", "invalid", "gallery"]


def searched_round(with_attributes: str = "both") -> Any:
    """A round with two queries and a gallery of one item."""
    searched: Any = SearchedRound.__new__(SearchedRound)
    searched.queries, searched.gallery = np.array([0, 1]), np.array([2])
    searched.encoder = SimpleNamespace(items=ITEMS)
    searched.store = SimpleNamespace(text=STORED.__getitem__)
    searched.annotator = SimpleNamespace(
        annotate=lambda rows, max_pairs=None: [(GENERATED[ITEMS[row], max_pairs], "") for row in rows]
    )
    searched.catalogue = SimpleNamespace(title=lambda row, columns: ITEMS[row], image_bytes=lambda row: b"")
    searched.protocol = RetrievalProtocol(name="fine", with_attributes=with_attributes)
    searched.config = SimpleNamespace(
        generator=SimpleNamespace(title_columns=()),
        evaluation=EvaluationConfig(bootstrap_samples=10),
        run=SimpleNamespace(seed=0),
    )
    searched._galleries = {}
    return searched


def test_the_first_pairs_of_an_invalid_text_are_generated() -> None:
    sources = searched_round().sources([1])
    assert {source.name: source.texts for source in sources} == {
        "no attributes": ["", ""],
        "all, from a cache": [STORED["valid"], ""],
        "first 1": ["color: red", "cap: green"],
        "all, generated": [STORED["valid"], ""],
    }


@pytest.mark.parametrize("row", ["valid", "invalid"])
def test_a_source_with_other_attributes_than_are_searched_with_is_refused(
    monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    searched = searched_round()
    sources = searched.sources([1])
    searched.check(sources, [0, 1])
    monkeypatch.setitem(GENERATED, (row, None), "color: other")
    with pytest.raises(RuntimeError, match=f"all, generated: 'color: other' for {row}"):
        searched.check(sources, [0, 1])


@pytest.mark.parametrize(("with_attributes", "shown"), [("both", STORED["gallery"]), ("query", "")])
def test_the_gallery_has_attributes_only_if_the_protocol_uses_them_there(
    monkeypatch: pytest.MonkeyPatch, with_attributes: str, shown: str
) -> None:
    searched = searched_round(with_attributes)
    embedded: list[list[str]] = []
    monkeypatch.setattr(
        searched, "_embed", lambda rows, texts, items: embedded.append(texts) or np.zeros((len(rows), 2))
    )
    monkeypatch.setattr(attribute_sources, "rank", lambda *args, **more: None)
    monkeypatch.setattr(attribute_sources, "hit_at_k", lambda ranking, k: np.ones(2))
    for source in searched.sources([]):
        searched.measure(source, [1.0])
    none, cache = ["", ""], [STORED["valid"], ""]
    # A gallery without attributes is embedded once for all sources.
    assert embedded == [[""], none, *([[shown]] if shown else []), cache, cache]


FOUND = [Measurement("cheap", 0.2, 0.18, 0.22, 9.7, [9.5, 9.7]), Measurement("dear", 0.3, 0.28, 0.32, 88.3, [88.3])]


def test_the_table_has_a_row_per_source() -> None:
    assert table(FOUND).rows == [
        ["cheap", "20.0", "18.0 to 22.0", "9.7", "9.5 to 9.7"],
        ["dear", "30.0", "28.0 to 32.0", "88.3", "88.3 to 88.3"],
    ]


def test_the_chart_labels_milliseconds_with_plain_numbers() -> None:
    figure = Figure()
    axes = figure.subplots()
    chart(FOUND)(axes, LIGHT)
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    labels = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert labels == ["10", "20", "50"]
    assert not any(label.get_text() for label in axes.get_xticklabels(minor=True))
