"""promtool, and what our own checks need to know of a PromQL expression."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.support.programs import program
from tests.support.repository import ROOT

PROMETHEUS = ROOT / "docker" / "prometheus"
# Of Prometheus itself, and of a Pushgateway.
FOREIGN_METRICS = {"up", "push_time_seconds", "ALERTS"}

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_LABELS = re.compile(r"\{[^{}]*\}|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)")
_RANGE = re.compile(r"\[[^\[\]]*\]|\boffset\s+\w+")
_NAME = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")
_WORDS = {"and", "or", "unless", "bool", "offset", "Inf", "NaN", "by", "without", "on", "ignoring"}
_MATCHER = re.compile(r'(\w+)\s*(=~|=)\s*"([^"]*)"')


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs it; without it the test is skipped, and fails in continuous integration."""
    return subprocess.run([program("promtool"), *arguments], capture_output=True, text=True)


def metric_names(expression: str) -> set[str]:
    """The metrics that an expression reads: its names that are no function, no label and no word of the language."""
    bare = _RANGE.sub("", _LABELS.sub("", _STRING.sub('""', expression)))
    followed_by_call = {match.group() for match in re.finditer(r"[A-Za-z_:][A-Za-z0-9_:]*(?=\s*\()", bare)}
    numberless = re.sub(r"\b\d[\w.]*", "", bare)
    return set(_NAME.findall(numberless)) - followed_by_call - _WORDS


def asked_values(expression: str, label: str) -> set[str]:
    """The values of a label that an expression's matchers name."""
    return {value for name, _, values in _MATCHER.findall(expression) if name == label for value in values.split("|")}
