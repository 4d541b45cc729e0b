"""Parses JSON from outside that may hold anything, and writes values for people and for programs."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_MOST_SHOWN, _MOST_REASON = 100, 300  # characters
# Control characters, half surrogate pairs, and marks of the direction of writing: a terminal obeys them.
_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Returns `text` with escapes in place of characters that a terminal would obey or a log could not hold."""
    return _UNSHOWN.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def printable_line(text: str) -> str:
    """Returns `text` as `printable` shows it, on one line."""
    return " ".join(printable(text).split())


def shown(value: Any, most: int = _MOST_SHOWN) -> str:
    """Returns the first `most` characters of a value's `repr`, for an error's text."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def is_integer(value: Any) -> bool:
    """Tells whether a value of JSON is an integer of at most 64 bits, signed."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_count(value: Any) -> bool:
    """Tells whether a value of JSON is an integer of at most 64 bits, signed, and not negative."""
    return is_integer(value) and value >= 0


def reason(error: Exception) -> str:
    """Returns the reason of an error as one short line, for another error's text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable((str(error).splitlines() or [type(error).__name__])[0])[:_MOST_REASON]


def parse_json(text: str | bytes) -> Any:
    """Returns the value that `text` holds.

    Raises:
        ValueError: `text` is not JSON, not UTF-8, nested too deeply, or has a number of too many digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise NestedTooDeeply("lists or objects nested too deeply") from None


class NestedTooDeeply(ValueError):
    """Raised for JSON that is nested more deeply than a parser can follow."""


def to_json(values: dict[str, Any]) -> str:
    """Returns a line of JSON. Numbers that are not finite become null, because JSON has no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(values), allow_nan=False)


def duration(seconds: float) -> str:
    """Returns a time span as people read it: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def bytes_of(text: str) -> int | None:
    """Returns the bytes of an amount such as 4GiB, 500MB or 1000000; None if it is none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?", text.strip(), re.IGNORECASE)
    if not found:
        return None
    number, unit = float(found[1]), (found[2] or "").upper()
    power = " KMGT".index(unit[0]) if unit else 0
    return int(number * (1024 if unit.endswith("I") else 1000) ** power)
