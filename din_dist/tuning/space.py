"""Reads the file that says which settings to search, and between which values."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from din_dist.errors import InputError
from din_dist.files import read_record
from din_dist.text import reason, shown


class ValueKind(enum.StrEnum):
    """The values that a setting takes."""

    WHOLE = "a whole number"
    NUMBER = "a number"
    OTHER = "no number"


_RANGE, _CHOICES = frozenset({"low", "high", "log", "step"}), frozenset({"choices"})


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A setting that is searched: a range of numbers, or choices.

    Attributes:
        name: the setting's flag.
        kind: of its values.
        low: the least value of a range; `high` is the largest.
        log: whether the logarithm of the value is searched.
        step: the distance between values of a range; None: any value, or each whole number.
        choices: the values, as they are written on a command line; empty for a range.
    """

    name: str
    kind: ValueKind
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    choices: tuple[str, ...] = ()

    def texts(self) -> tuple[str, ...]:
        """Returns the values that a setting must accept for the space to make sense: choices, or both bounds."""
        return self.choices or (self.text(self.low), self.text(self.high))

    def text(self, value: Any) -> str:
        """Returns a value as it is written on a command line."""
        return str(int(value)) if self.kind is ValueKind.WHOLE and not self.choices else str(value)

    def has(self, value: Any) -> bool:
        """Tells whether a number, or the text of a choice, is one of the values."""
        if self.choices or not isinstance(value, (int, float)):
            return value in self.choices
        steps = (value - self.low) / self.step if self.step else 0.0
        return self.low <= value <= self.high and math.isclose(steps, round(steps), abs_tol=1e-9)

    def to_json(self) -> dict[str, Any]:
        """Returns what decides which values are tried."""
        return {**dataclasses.asdict(self), "choices": list(self.choices)}


def read_space(path: Path, kinds: Mapping[str, ValueKind], refused: Mapping[str, str]) -> list[Dimension]:
    """Reads a space: a TOML file with a table for each setting.

    Args:
        path: the file.
        kinds: by name, the settings that may be searched.
        refused: by name, the rule that keeps a setting from being searched.

    Raises:
        InputError: the file cannot be read, or has something that is not a range or choices of such a setting.
    """
    try:
        tables = tomllib.loads(read_record(path))
    except (OSError, ValueError) as error:
        rule = "--space: must be a TOML file with a table for each setting"
        raise InputError(f"{rule}. Received: {path}: {reason(error)}. Correct it.") from error
    if not tables:
        raise InputError(f"--space: must name a setting to search. Received: {path}, which is empty. Add one.")
    return [_dimension(path, name, table, kinds, refused) for name, table in tables.items()]


def _dimension(
    path: Path, name: str, table: Any, kinds: Mapping[str, ValueKind], refused: Mapping[str, str]
) -> Dimension:
    def check(holds: bool, rule: str, received: object, remedy: str) -> None:
        if not holds:
            raise InputError(f"{path}: [{name}] {rule}. Received: {shown(received)}. {remedy}")

    check(name not in refused, refused.get(name, ""), name, "Leave it out, or give it as a flag.")
    similar = difflib.get_close_matches(name, kinds, n=1)
    remedy = f"Did you mean {similar[0]}?" if similar else "See din-dist train --help."
    check(name in kinds, "must be a setting of train", name, remedy)
    example = 'For example low = 1e-4, high = 1e-2, log = true, or choices = ["32", "64"].'
    check(isinstance(table, dict), "must be a table", table, example)
    kind, given = kinds[name], set(table)
    check(
        given == _CHOICES or ({"low", "high"} <= given <= _RANGE),
        "must have low and high, with log or step if wanted, or choices alone",
        sorted(given),
        example,
    )
    if given == _CHOICES:
        return Dimension(name, kind, choices=_choices(table["choices"], check))
    check(kind is not ValueKind.OTHER, "is no number, and needs choices", table, "Give choices = [...].")
    return _range(name, kind, table, check)


def _choices(values: Any, check: Any) -> tuple[str, ...]:
    rule, remedy = "must have choices that are a list of different values", 'For example choices = ["32", "64"].'
    check(isinstance(values, list) and bool(values), rule, values, remedy)
    for value in values:
        check(isinstance(value, (str, int, float)), rule, value, remedy)
        check("\n" not in str(value), "must have choices of one line each", value, remedy)
    texts = tuple(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
    check(len(set(texts)) == len(texts), rule, values, remedy)
    return texts


def _range(name: str, kind: ValueKind, table: Mapping[str, Any], check: Any) -> Dimension:
    log = table.get("log", False)
    check(isinstance(log, bool), "must have a log that is true or false", log, "Correct it.")
    whole = kind is ValueKind.WHOLE
    numbers: dict[str, float] = {}
    for part, words in {"low": "a low", "high": "a high", "step": "a step"}.items():
        if part in table:
            value = table[part]
            fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            check(fits and math.isfinite(value), f"must have {words} that is {kind}", value, "Correct it.")
            numbers[part] = value if whole else float(value)
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    check(low < high, "must have a low below its high", [low, high], "Correct one of them.")
    check(not log or low > 0, "must have a low above 0 to be searched by logarithm", low, "Correct it, or drop log.")
    check(not (log and step is not None), "takes log or step", sorted(table), "Drop one of them.")
    fits = step is None or 0 < step <= high - low
    check(fits, "must have a step that fits between low and high", step, "Correct it.")
    return Dimension(name, kind, low, high, log, step)


def words(values: Mapping[str, Any], space: Sequence[Dimension]) -> dict[str, str]:
    """Returns the values of a trial, by setting, as they are written on a command line."""
    return {dimension.name: dimension.text(values[dimension.name]) for dimension in space if dimension.name in values}
