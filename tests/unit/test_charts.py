"""Charts as text: well-formed SVG, every point inside the frame, gaps and oddities survived."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from services.charts import _label, _thin, line_chart, stacked_chart, ticks


def _parse(chart: str) -> ET.Element:
    return ET.fromstring(f"<div>{chart}</div>")


def _numbers(path: str) -> list[tuple[float, float]]:
    values = [float(number) for number in re.findall(r"-?\d+\.?\d*", path)]
    return list(zip(values[::2], values[1::2], strict=True))


def test_a_curve_rises_where_its_values_rise() -> None:
    tree = _parse(line_chart({"reward/mean": [(1, 0.2), (2, 0.4), (3, 0.4), (4, 0.9)]}))
    path = tree.find(".//path")
    assert path is not None
    points = _numbers(path.attrib["d"])
    xs, ys = [x for x, _ in points], [y for _, y in points]
    assert xs == sorted(xs)
    assert ys[0] > ys[1] == ys[2] > ys[3], "pixels count down"
    titles = [title.text for title in tree.iter("title")]
    assert titles[-1] == "reward/mean, step 4: 0.9"


@pytest.mark.parametrize(
    "points",
    [
        [(0, 0.0)],
        [(5, 3.0)],
        [(1, 2.0), (2, 2.0)],
        [(1, -1e-9), (2, 1e-9)],
        [(1, 1.1754907e-38), (2, 1.1754907e-38)],
        [(1, 0.0), (2, 1e-300)],
        [(1, -3e-13), (2, 1e-14)],
        [(1, 1.0), (2, 1.0 + 1e-15)],
        [(1, -2e9), (2, -2e9 + 1e-6)],
        [(1, 1e-11), (2, 3e-11)],
        [(1, -5.0), (2, 1e12)],
        [(1, 0.1), (2, math.nan), (3, math.inf), (4, 0.3)],
        [(step, math.sin(step)) for step in range(5000)],
    ],
)
def test_every_point_lies_inside_the_frame(points: list[tuple[float, float]]) -> None:
    tree = _parse(line_chart({"x": points}))
    path = tree.find(".//path")
    assert path is not None
    drawn = _numbers(path.attrib["d"])
    assert 1 <= len(drawn) <= 410
    assert all(51.9 <= x <= 548.1 and 9.9 <= y <= 192.1 for x, y in drawn)


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart({}) == ""
    assert line_chart({"a": [(1, math.nan)], "b": []}) == ""
    assert stacked_chart({}) == ""
    assert stacked_chart({"a": [(1, 1.0)]}) == "", "one step is no course of time"
    assert stacked_chart({"a": [(1, 0.0), (2, 0.0)]}) == ""


def test_names_are_escaped() -> None:
    for chart in (line_chart({"<b>&": [(1, 1)]}), stacked_chart({"<b>&": [(1, 1), (2, 1)]})):
        assert "<b>" not in chart
        assert "&lt;b&gt;&amp;" in chart


def test_an_axis_can_start_at_zero() -> None:
    points = [(1, 10.0), (2, 11.0)]
    free = [text.text for text in _parse(line_chart({"a": points})).iter("text")]
    floored = [text.text for text in _parse(line_chart({"a": points}, floor_zero=True)).iter("text")]
    assert "0" not in free
    assert "0" in floored


def test_a_stack_reaches_the_sum_and_treats_a_missing_step_as_none() -> None:
    chart = stacked_chart({"sample": [(1, 1.0), (2, 1.0), (3, 1.0)], "evaluate": [(2, 3.0)]})
    tree = _parse(chart)
    sample, evaluate = (_numbers(polygon.attrib["points"]) for polygon in tree.iter("polygon"))
    assert len(sample) == len(evaluate) == 6
    assert min(y for _, y in evaluate) < min(y for _, y in sample)
    assert evaluate[0] == evaluate[-1], "no height where there was no evaluation"
    assert "sample 1 s" in chart
    assert "evaluate 1 s" in chart, "the legend gives the mean over all steps"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0.31, 0.87, [0.2, 0.4, 0.6, 0.8, 1]), (0, 60, [0, 20, 40, 60])],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 4) == expected


def test_labels_are_short() -> None:
    assert [_label(value) for value in (0.0, 0.25, 2.5e-05, 1234567.0)] == ["0", "0.25", "2.5e-05", "1.23e+06"]


def test_thinning_keeps_the_ends_and_the_mean() -> None:
    points = [(float(step), float(step % 2)) for step in range(2001)]
    thin = _thin(points)
    assert len(thin) <= 402
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(0.5, abs=0.05)
