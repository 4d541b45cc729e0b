"""Features that are made from an event's time: the hour of the day and the day of the week in a time zone."""

from __future__ import annotations

import datetime
import enum
import zoneinfo

import numpy as np

from din_dist.features.spec import Kind

UTC = "UTC"
_BLOCK_SECONDS = 900  # zones change at a multiple of it
_FIRST, _LAST = -62_135_510_400, 253_402_214_400  # seconds: a day within the first and last that Python knows
_SECONDS_PER_DAY = 86_400


class TimestampUnit(enum.StrEnum):
    """The unit of timestamps."""

    AUTO = "auto"  # by their size; see `unit_of`
    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    MICROSECONDS = "microseconds"
    NANOSECONDS = "nanoseconds"


_PER_SECOND = {
    TimestampUnit.SECONDS: 1,
    TimestampUnit.MILLISECONDS: 10**3,
    TimestampUnit.MICROSECONDS: 10**6,
    TimestampUnit.NANOSECONDS: 10**9,
}


def unit_of(median: float) -> TimestampUnit:
    """Returns the unit in which a timestamp of this size lies between 1973 and 5138."""
    for unit, end in ((TimestampUnit.SECONDS, 1e11), (TimestampUnit.MILLISECONDS, 1e14)):
        if abs(median) < end:
            return unit
    return TimestampUnit.MICROSECONDS if abs(median) < 1e17 else TimestampUnit.NANOSECONDS


def is_zone(name: str) -> bool:
    """Tells whether a time zone of this IANA name is known."""
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def time_rows(timestamps: np.ndarray, kind: Kind, unit: TimestampUnit, zone: str) -> np.ndarray:
    """Returns the row of each time in the table of a feature, int32 `[n]`: 1 + hour (0 to 23), or 1 + day (Monday 0).

    Args:
        timestamps: int64 `[n]`, since 1970, UTC.
        kind: `HOUR_OF_DAY` or `DAY_OF_WEEK`.
        unit: of the timestamps, not `AUTO`.
        zone: the IANA name of the time zone.
    """
    seconds = timestamps // _PER_SECOND[unit]
    blocks, block_of = np.unique(np.clip(seconds, _FIRST, _LAST) // _BLOCK_SECONDS, return_inverse=True)
    local = seconds % (7 * _SECONDS_PER_DAY) + _offsets(blocks, zone)[block_of]
    if kind is Kind.HOUR_OF_DAY:
        return (1 + local % _SECONDS_PER_DAY // 3600).astype(np.int32)
    return (1 + (local // _SECONDS_PER_DAY + 3) % 7).astype(np.int32)  # 1970 began on a Thursday


def _offsets(blocks: np.ndarray, zone: str) -> np.ndarray:
    """Returns the seconds by which local time is ahead of UTC, int64 `[n]`."""
    if zone == UTC:
        return np.zeros(len(blocks), np.int64)
    place = zoneinfo.ZoneInfo(zone)
    first = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    step = datetime.timedelta(seconds=_BLOCK_SECONDS)
    ahead = ((first + block * step).astimezone(place).utcoffset() for block in blocks.tolist())
    return np.array([int(offset.total_seconds()) if offset else 0 for offset in ahead], np.int64)
