"""Hours and weekdays of timestamps: against Python's own calendar, and across changes of the clock."""

from __future__ import annotations

import datetime
import zoneinfo

import numpy as np
import pytest

from din_dist.features.spec import Kind
from din_dist.features.times import TimestampUnit, is_zone, time_rows, unit_of


@pytest.mark.parametrize(
    ("median", "unit"),
    [
        (0, "seconds"),
        (1_500_000_000, "seconds"),
        (1e11 - 1, "seconds"),
        (1e11, "milliseconds"),
        (1_500_000_000_000, "milliseconds"),
        (1e14, "microseconds"),
        (1e17 - 100, "microseconds"),
        (1e17, "nanoseconds"),
        (-1_500_000_000_000, "milliseconds"),
    ],
)
def test_the_unit_follows_from_the_size(median: float, unit: str) -> None:
    assert unit_of(median) == unit


@pytest.mark.parametrize("zone", ["UTC", "Europe/Vienna", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"])
def test_against_python(zone: str) -> None:
    random = np.random.default_rng(1)
    seconds = random.integers(-(10**9), 4 * 10**9, 2000)
    seconds[:4] = [1_521_939_599, 1_521_939_600, 1_540_688_399, 1_540_688_400]  # Vienna turned its clocks
    times = [datetime.datetime.fromtimestamp(second, zoneinfo.ZoneInfo(zone)) for second in seconds.tolist()]
    for unit, factor in (("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)):
        given = seconds * factor + factor // 2
        hours = time_rows(given, Kind.HOUR_OF_DAY, TimestampUnit(unit), zone)
        days = time_rows(given, Kind.DAY_OF_WEEK, TimestampUnit(unit), zone)
        assert hours.dtype == np.int32
        assert hours.tolist() == [1 + time.hour for time in times]
        assert days.tolist() == [1 + time.weekday() for time in times]


def test_times_that_no_calendar_has() -> None:
    """They have some row, because a log may hold any integer."""
    ends = np.array([-(2**63), 2**63 - 1, 0])
    for kind, most in ((Kind.HOUR_OF_DAY, 24), (Kind.DAY_OF_WEEK, 7)):
        for zone in ("UTC", "Europe/Vienna"):
            found = time_rows(ends, kind, TimestampUnit.SECONDS, zone)
            assert (found >= 1).all()
            assert (found <= most).all()


def test_zones() -> None:
    assert is_zone("Europe/Vienna")
    assert not is_zone("Europe/Atlantis")
    assert not is_zone("../etc/passwd")
    assert not is_zone("")
