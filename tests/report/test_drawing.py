"""Charts: titles, error bars, lines over steps, themes."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from afmrl_ray.report.drawing import LIGHT, Panel, Theme, draw_png, errorbar, lines_over_steps, make_charts
from afmrl_ray.report.estimate import Estimate


def test_a_title_wider_than_its_axes_is_aligned_with_their_right_end() -> None:
    def draw(axes: Axes, theme: Theme) -> None:
        axes.barh(["a name that takes most of the width of the chart"], [1.0])
        axes_of.append(axes)

    axes_of: list[Axes] = []
    wide, short = "gain over the reference variant, points", "short"
    draw_png([Panel(title, draw) for title in (wide, short)])
    boxes = []
    for axes, title in zip(axes_of, (wide, short), strict=True):
        (text,) = axes.findobj(lambda it, title=title: isinstance(it, Text) and it.get_text() == title)
        boxes.append(text.get_window_extent())
    assert all(box.x1 <= axes.bbox.x1 + 1 for box, axes in zip(boxes, axes_of, strict=True))
    assert boxes[0].x0 < axes_of[0].bbox.x0
    assert boxes[1].x0 == pytest.approx(axes_of[1].bbox.x0, abs=1)


def test_error_bars_reach_from_low_to_high_and_skip_what_was_not_measured() -> None:
    axes = Figure().subplots()
    values = [Estimate(0.5, 0.4, 0.7), Estimate(None), Estimate(0.3)]
    errorbar(axes, LIGHT, 0, values, "x", scale=100.0)
    (container,) = axes.containers
    assert container.lines[0].get_xydata().tolist() == [[0, 50], [2, 30]]
    (bars,) = container.lines[2]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([40, 70]), pytest.approx([30, 30])]


def test_lines_over_steps_are_moving_averages_of_the_logged_values() -> None:
    log = [{"step": step, "loss": float(step)} for step in range(40)]
    axes = Figure().subplots()
    lines_over_steps([("round 0", [*log, {"step": 40}], "loss")])(axes, LIGHT)
    (line,) = [line for line in axes.lines if line.get_label() == "round 0"]
    # 40 values, so a window of two.
    np.testing.assert_allclose(line.get_ydata(), [0.0, *(step - 0.5 for step in range(1, 40))])


def test_charts_are_drawn_once_in_each_theme() -> None:
    (chart,) = make_charts([Panel("title", lambda axes, theme: None)])
    light, dark = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("L")) for each in (chart.light, chart.dark)
    )
    assert chart.title == "title"
    assert np.median(light) > 240
    assert np.median(dark) < 60
