"""Runs promtool, and finds the metrics and label values in a PromQL expression.

metric_names('rate(din_dist_examples_total{run="a"}[5m])') == {"din_dist_examples_total"}
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.support.programs import program
from tests.support.repository import ROOT

PROMETHEUS = ROOT / "docker" / "prometheus"
# Prometheus itself and a Pushgateway make these.
FOREIGN_METRICS = {"up", "push_time_seconds", "ALERTS"}

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_LABELS = re.compile(r"\{[^{}]*\}|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)")
_RANGE = re.compile(r"\[[^\[\]]*\]|\boffset\s+\w+")
_NAME = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")
_WORDS = {"and", "or", "unless", "bool", "offset", "Inf", "NaN", "by", "without", "on", "ignoring"}
_MATCHER = re.compile(r'(\w+)\s*(=~|=)\s*"([^"]*)"')


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs promtool to its end; without it the test ends as in `programs.missing`."""
    return subprocess.run([program("promtool"), *arguments], capture_output=True, text=True)


def metric_names(expression: str) -> set[str]:
    """Returns the metrics that an expression reads: names that are no function, no label and no keyword."""
    bare = _RANGE.sub("", _LABELS.sub("", _STRING.sub('""', expression)))
    followed_by_call = {match.group() for match in re.finditer(r"[A-Za-z_:][A-Za-z0-9_:]*(?=\s*\()", bare)}
    numberless = re.sub(r"\b\d[\w.]*", "", bare)
    return set(_NAME.findall(numberless)) - followed_by_call - _WORDS


def asked_values(expression: str, label: str) -> set[str]:
    """Returns the values that an expression's matchers give for a label."""
    return {value for name, _, values in _MATCHER.findall(expression) if name == label for value in values.split("|")}
