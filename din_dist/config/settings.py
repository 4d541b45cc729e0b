"""How settings are declared: default, help text and rules of a setting stand together on its field.

`cli/flags.py` makes a flag from each field, so that a setting is written down once. A broken rule raises an
`InputError` that gives the rule, the received value and a remedy.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from din_dist.errors import InputError
from din_dist.files import local_path, source_path

INT32_MAX, UINT32_MAX, INT64_MAX = 2**31 - 1, 2**32 - 1, 2**63 - 1

Check = Callable[[str, Any], None]  # takes the name and the value of a setting; raises `InputError`

_COMPARISONS = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def setting(
    default: Any,
    help_text: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    may_change: bool = False,
    theme: str = "",
) -> Any:
    """Makes the field of a number, a switch, a choice or a list.

    Args:
        at_least: inclusive lower bound; `above` is the exclusive one.
        at_most: inclusive upper bound; `below` is the exclusive one. Whole numbers without either must fit into int32.
        may_change: true if a job may be resumed with another value. Such a setting must not decide what is learned.
        theme: heading of the flag in `--help`. Default: that of the class.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return _field(default, help_text, bounds=given, may_change=may_change, theme=theme)


def text_setting(
    default: Any,
    help_text: str,
    *,
    check: Check | None = None,
    may_change: bool = False,
    theme: str = "",
    later: bool = False,
) -> Any:
    """Makes the field of a text, a choice or a list; see `setting`.

    Args:
        check: the field's own rule.
        later: true for a field that was added later. It is saved only where it is not the default, so that other jobs
            are saved as before.
    """
    return _field(default, help_text, check=check, may_change=may_change, theme=theme, later=later)


def path_setting(
    default: str,
    help_text: str,
    *,
    check: Check | None = None,
    may_change: bool = False,
    theme: str = "",
    later: bool = False,
) -> Any:
    """Makes the field of a path, which users may write in any form that `files.local_path` takes."""
    return _field(default, help_text, check=check, path=local_path, may_change=may_change, theme=theme, later=later)


def source_setting(default: str, help_text: str, *, check: Check | None = None, later: bool = False) -> Any:
    """Makes the field of files that are only read, which may lie in a store; see `files.source_path`."""
    return _field(default, help_text, check=check, path=source_path, may_change=True, theme="", later=later)


def port_setting(default: int, help_text: str, *, lowest: int = 0, may_change: bool = False, theme: str = "") -> Any:
    """Makes the field of a TCP port. 0 stands for any free port; a `lowest` of -1 adds a value for "none"."""
    rule = "must be a port, 0 or -1" if lowest < 0 else "must be a port, or 0"

    def check(name: str, value: int) -> None:
        require(lowest <= value <= 65535, rule, name, value, "Ports go up to 65535.")

    return _field(default, help_text, check=check, may_change=may_change, theme=theme)


def time_setting(default: int, help_text: str, *, theme: str = "", later: bool = False) -> Any:
    """Makes the field of a timestamp, 64 bits; see `text_setting`."""
    return _field(default, help_text, bounds={"at_most": INT64_MAX}, theme=theme, later=later)


def count_setting(help_text: str, *, later: bool = False) -> Any:
    """Makes the field of a whole number that is not negative, 0 by default; see `text_setting`.

    It may change, because the fingerprint of prepared data tells what it has decided.
    """
    return _field(0, help_text, bounds={"at_least": 0}, may_change=True, theme="", later=later)


def flagless(default: Any) -> Any:
    """Makes a field that has no flag and may differ when a job is resumed."""
    return dataclasses.field(default=default, metadata={"may_change": True})


def _field(default: Any, help_text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of the dataclasses of settings. Building one checks the rule of each field.

    A rule over two fields stands in `__post_init__` of its class, which first calls this one.
    """

    THEME: ClassVar[str] = ""  # heading of the flags in `--help`

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if parse := field.metadata.get("path"):
                object.__setattr__(self, field.name, parse(getattr(self, field.name), field.name))
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))


def check_setting(field: dataclasses.Field, value: Any) -> None:
    """Checks the rules of one setting, whatever the others are.

    Raises:
        InputError: the value breaks one.
    """
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)):
            _check_number(field, number)
    if check := field.metadata.get("check"):
        check(field.name, value)


def is_saved(field: dataclasses.Field, value: object) -> bool:
    """Tells whether a setting of this value is written where a job is saved."""
    default: Any = field.default
    if isinstance(value, (list, tuple)):  # compared as text, because a flag has its numbers so
        value, default = list_text(value), list_text(default)
    return not field.metadata.get("later") or value != default


def theme_of(kind: type[Settings], field: dataclasses.Field) -> str:
    """Returns the heading of a setting in `--help`."""
    return field.metadata.get("theme") or kind.THEME


def _check_number(field: dataclasses.Field, number: float) -> None:
    bounds = field.metadata.get("bounds", {})
    if isinstance(number, int):
        most = max(bounds.get("at_most", 0), INT32_MAX)
        bounds = {"at_least": -most, "at_most": most} | bounds
    remedy = f"For example {_text(field.default)}."
    require(math.isfinite(number), "must be finite", field.name, number, remedy)
    for kind, bound in bounds.items():
        holds, words = _COMPARISONS[kind]
        require(holds(number, bound), f"must be {words} {bound}", field.name, number, remedy)


def _text(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def require(holds: bool, rule: str, name: str, value: object, remedy: str) -> None:
    """Raises `InputError` in the form that all settings share, unless the rule holds."""
    if not holds:
        raise InputError(f"--{name}: {rule}. Received: {value!r}. {remedy}")


def list_text(values: Iterable[object]) -> str:
    """Returns values in the syntax of a list flag, with commas and quotes in them escaped."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()
