"""Where things lie in a chart, and that no string becomes markup."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import numpy as np
import pytest

from din_dist.metrics.calibration import calibration
from din_dist.report import charts
from din_dist.report.charts import Mark, Series

HOSTILE = '"><script>alert(1)</script>'


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.62, 0.79, [0.65, 0.7, 0.75]),
        (3, 3, [3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "text"), [(0.35, "0.35"), (12_000, "12k"), (2_500_000, "2.5M"), (0, "0")])
def test_compact_numbers(value: float, text: str) -> None:
    assert charts.compact(value) == text


def test_a_line_breaks_where_there_is_no_number() -> None:
    chart = charts.line_chart(
        [Series("s", [1, 2, 3, 4], [1.0, math.nan, 2.0, 3.0])], title="t", x_label="x", y_label="y"
    )
    root = ElementTree.fromstring(chart)
    lines = [line for line in root.iter("polyline") if line.get("class") == "line main"]
    assert [len(line.get("points", "").split()) for line in lines] == [1, 2]
    assert root.get("aria-label") == "t"


def test_a_point_without_neighbours_is_seen() -> None:
    """A line through it alone shows nothing."""
    values = [1.0, math.nan, 2.0, 3.0]
    chart = charts.line_chart([Series("s", [1, 2, 3, 4], values)], title="t", x_label="x", y_label="y")
    classes = [dot.get("class", "").split()[0] for dot in ElementTree.fromstring(chart).iter("circle")]
    assert classes == ["dot", "hit", "hit"]


def test_marks_do_not_cover_each_other() -> None:
    """Those that lie near have one label; each has its line and its words."""
    series = [Series("s", [0, 1000], [1.0, 2.0])]
    marks = [Mark(x, str(number), f"event {number}") for number, x in enumerate((100, 105, 110, 500, 1000), 1)]
    chart = charts.line_chart(series, title="t", x_label="x", y_label="y", marks=marks)
    groups = [each for each in ElementTree.fromstring(chart).iter("g") if each.get("class") == "mark"]
    assert [group.findtext("text") for group in groups] == ["1–3", "4", "5"]
    assert [len(group.findall("line")) for group in groups] == [3, 1, 1]
    assert groups[0].findtext("title") == "event 1\nevent 2\nevent 3"
    boxes = [(float(box.get("x", 0)), float(box.get("width", 0))) for group in groups for box in group.iter("rect")]
    assert all(x + width < following for (x, width), (following, _) in itertools.pairwise(boxes))


@pytest.mark.parametrize("distance", [1, 5, 15, 25, 40, 60])
def test_many_marks_at_any_distance_do_not_cover_each_other(distance: int) -> None:
    marks = [Mark(number * distance, str(number), "") for number in range(1, 16)]
    series = [Series("s", [0, 1000], [1.0, 2.0])]
    chart = charts.line_chart(series, title="t", x_label="x", y_label="y", marks=marks)
    boxes = [box for group in ElementTree.fromstring(chart).iter("g") for box in group.iter("rect")]
    spans = [(float(box.get("x", 0)), float(box.get("x", 0)) + float(box.get("width", 0))) for box in boxes]
    assert all(end <= begin + 1e-6 for (_, end), (begin, _) in itertools.pairwise(spans))


def test_nothing_to_draw_is_no_chart() -> None:
    assert charts.line_chart([Series("s", [1], [math.nan])], title="t", x_label="x", y_label="y") == ""


def test_ends_of_the_axes() -> None:
    """From zero: the lowest y is at the foot; the first and the last x at the sides."""
    chart = charts.line_chart(
        [Series("s", [10, 20], [0.0, 5.0], dots=True)], title="t", x_label="x", y_label="y", from_zero=True
    )
    first, last = [dot for dot in ElementTree.fromstring(chart).iter("circle") if "dot" in dot.get("class", "")]
    assert (first.get("cx"), first.get("cy")) == ("60.0", "210.0")
    assert last.get("cx") == "446.0"


def test_a_track_in_percent() -> None:
    """.75 lies half way from .5 to 1; what is not a number is left out."""
    root = ElementTree.fromstring(charts.track({"model": 0.75, "a": 0.6, "b": math.nan}, 0.5, 1.0, "title"))
    assert [shape.get("x") for shape in root.findall("svg")] == ["20.00%", "50.00%"]
    (gain,) = [line for line in root.iter("line") if line.get("class") == "gain"]
    assert (gain.get("x1"), gain.get("x2")) == ("20.00%", "50.00%")
    worse = ElementTree.fromstring(charts.track({"model": 0.6, "a": 0.75}, 0.5, 1.0, "title", worse=True))
    assert [line.get("class") for line in worse.iter("line")] == ["rail", "gain worse"]


def test_a_bar_and_its_tick() -> None:
    root = ElementTree.fromstring(charts.bar(0.25, "a quarter", tick=0.5))
    assert [rect.get("width") for rect in root.iter("rect")] == ["100%", "25.00%"]
    assert root.findall("line")[0].get("x1") == "50.00%"
    assert not ElementTree.fromstring(charts.bar(0.25, "a quarter")).findall("line")


def test_calibrated_points_lie_on_the_diagonal() -> None:
    found = calibration(np.array([0.5, 0.5]), np.array([1, 0]))
    root = ElementTree.fromstring(charts.calibration_chart([("predicted", found)], "t"))
    (point,) = root.iter("circle")
    assert (point.get("cx"), point.get("cy")) == ("253.0", "112.0")  # the middle of 60 to 446 and of 210 to 14


def test_no_string_becomes_markup() -> None:
    series = [Series(HOSTILE, [1, 2], [1.0, 2.0])]
    found = calibration(np.array([0.5, 0.5]), np.array([1, 0]))
    for chart in (
        charts.line_chart(series, title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE, marks=[Mark(1, HOSTILE, HOSTILE)]),
        charts.track({HOSTILE: 0.6, "b": 0.7}, 0.5, 1, HOSTILE),
        charts.bar(0.5, HOSTILE),
        charts.calibration_chart([(HOSTILE, found)], HOSTILE),
    ):
        assert "<script" not in chart
        assert not list(ElementTree.fromstring(chart).iter("script"))
