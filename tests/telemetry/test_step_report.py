"""Times of an update: right in sum, whatever happens to the wall clock meanwhile."""

from __future__ import annotations

import itertools
import time

import pytest

from din_dist.telemetry import step_report
from din_dist.telemetry.step_report import Moment


class Clocks:
    """A steady clock that shows what the test says, and a wall clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.steady = 1000.0
        monkeypatch.setattr(step_report.time, "time", lambda: self.wall)
        monkeypatch.setattr(step_report.time, "perf_counter", lambda: self.steady)

    def pass_seconds(self, seconds: float) -> float:
        """Returns the wall clock's time then."""
        self.wall += seconds
        self.steady += seconds
        return self.wall


def test_parts_end_where_the_graph_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    started = Moment.now()
    marks = [clocks.pass_seconds(2.0), clocks.pass_seconds(3.0)]
    clocks.pass_seconds(4.0)
    assert started.seconds_between(marks) == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("jump", [-1e9, -3.5, -1.0, 1.0, 3.5, 432_000.0])
@pytest.mark.parametrize("part", range(3))
def test_a_wall_clock_that_is_set_changes_no_sum(monkeypatch: pytest.MonkeyPatch, jump: float, part: int) -> None:
    clocks = Clocks(monkeypatch)
    started = Moment.now()
    marks = []
    for number, seconds in enumerate((2.0, 3.0, 4.0)):
        if number == part:
            clocks.wall += jump
        marks.append(clocks.pass_seconds(seconds))
    found = started.seconds_between(marks[:2])
    assert sum(found) == pytest.approx(9.0)
    assert min(found) >= 0.0


def test_no_duration_is_taken_from_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wall clock that jumps by a day at each look."""
    days = itertools.count(step=86_400)
    now = time.time()
    monkeypatch.setattr(step_report.time, "time", lambda: now + next(days))
    before = time.perf_counter()
    started = Moment.now()
    found = started.seconds_between([time.time(), time.time()])
    assert 0.0 <= sum(found) <= time.perf_counter() - before
