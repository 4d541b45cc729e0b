"""Features that are made from an event's time: the hour of the day and the day of the week in a time zone."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import re
import zoneinfo

import numpy as np

from din_dist.features.spec import Kind

UTC = "UTC"
_BLOCK_SECONDS = 900  # zones change at a multiple of it
_FIRST, _LAST = -62_135_510_400, 253_402_214_400  # seconds: a day within the first and last that Python knows
_SECONDS_PER_DAY = 86_400
_BLOCKS_PER_DAY = _SECONDS_PER_DAY // _BLOCK_SECONDS
# Blocks between which a zone's changes are looked for: from 1800, when no zone had changed yet, in steps of half a day
# to 2100, and of a day for 400 years more, after which the calendar and so the rules repeat.
_EARLY, _RULES = -62_091 * _BLOCKS_PER_DAY, 47_482 * _BLOCKS_PER_DAY
_CYCLE = 146_097 * _BLOCKS_PER_DAY


class TimestampUnit(enum.StrEnum):
    """The unit of timestamps."""

    AUTO = "auto"  # by their size; see `unit_of`
    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    MICROSECONDS = "microseconds"
    NANOSECONDS = "nanoseconds"


PER_SECOND = {
    TimestampUnit.SECONDS: 1,
    TimestampUnit.MILLISECONDS: 10**3,
    TimestampUnit.MICROSECONDS: 10**6,
    TimestampUnit.NANOSECONDS: 10**9,
}


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": _SECONDS_PER_DAY}
_DELAY = re.compile(r"([0-9]{1,18})([smhd]?)")


@dataclasses.dataclass(frozen=True)
class Delay:
    """A length of time as users write it: 90s, 15m, 6h or 1d, or a number in the unit of the timestamps."""

    text: str

    @staticmethod
    def is_valid(text: str) -> bool:
        """Tells whether a text is such a length."""
        found = _DELAY.fullmatch(text)
        return found is not None and int(found[1]) * _SECONDS.get(found[2], 1) < 2**63 // 10**9

    def in_units(self, unit: TimestampUnit) -> int:
        """Returns the length in a unit, not `AUTO`."""
        found = _DELAY.fullmatch(self.text)
        assert found
        number, letter = int(found[1]), found[2]
        return number * _SECONDS[letter] * PER_SECOND[unit] if letter else number


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
    seconds = timestamps // PER_SECOND[unit]
    blocks, block_of = np.unique(np.clip(seconds, _FIRST, _LAST) // _BLOCK_SECONDS, return_inverse=True)
    local = seconds % (7 * _SECONDS_PER_DAY) + _offsets(blocks, zone)[block_of]
    if kind is Kind.HOUR_OF_DAY:
        return (1 + local % _SECONDS_PER_DAY // 3600).astype(np.int32)
    return (1 + (local // _SECONDS_PER_DAY + 3) % 7).astype(np.int32)  # 1970 began on a Thursday


@dataclasses.dataclass(frozen=True, eq=False)
class ZoneTable:
    """A time zone as a table, which gives the offsets of `time_rows` without a library of time zones.

    A time's block is its seconds, cut to `first` and `last`, divided by `block_seconds`. A block from `cycle_from` +
    `cycle` on stands for the one in the `cycle` blocks from `cycle_from` on that is a multiple of `cycle` before it.

    Attributes:
        starts: int64 `[S]`, ascending, the first block of each offset; the first is below all blocks.
        offsets: int64 `[S]`, the seconds by which local time is ahead of UTC from there on.
    """

    starts: np.ndarray
    offsets: np.ndarray
    first: int = _FIRST
    last: int = _LAST
    block_seconds: int = _BLOCK_SECONDS
    cycle_from: int = _RULES
    cycle: int = _CYCLE


@functools.cache
def zone_table(zone: str) -> ZoneTable:
    """Returns the table of a time zone; it takes a second, but for UTC.

    Args:
        zone: the IANA name of the time zone.
    """
    lowest = np.array([_FIRST // _BLOCK_SECONDS - 1], np.int64)
    if zone == UTC:
        return ZoneTable(lowest, np.zeros(1, np.int64))
    half_days = np.arange(_EARLY, _RULES, _BLOCKS_PER_DAY // 2)
    days = np.arange(_RULES, _RULES + _CYCLE + 1, _BLOCKS_PER_DAY)
    blocks = np.concatenate([half_days, days])
    ahead = _offsets(blocks, zone)
    changes = np.flatnonzero(ahead[1:] != ahead[:-1])
    low, high = blocks[changes], blocks[changes + 1]  # the change is after low, and at high or before
    before = ahead[changes]
    while (high - low > 1).any():
        middle = (low + high) // 2
        changed = _offsets(middle, zone) != before
        low, high = np.where(changed, low, middle), np.where(changed, middle, high)
    return ZoneTable(np.concatenate([lowest, high]), np.concatenate([ahead[:1], _offsets(high, zone)]))


def _offsets(blocks: np.ndarray, zone: str) -> np.ndarray:
    """Returns the seconds by which local time is ahead of UTC, int64 `[n]`."""
    if zone == UTC:
        return np.zeros(len(blocks), np.int64)
    place = zoneinfo.ZoneInfo(zone)
    first = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    step = datetime.timedelta(seconds=_BLOCK_SECONDS)
    ahead = ((first + block * step).astimezone(place).utcoffset() for block in blocks.tolist())
    return np.array([int(offset.total_seconds()) if offset else 0 for offset in ahead], np.int64)
