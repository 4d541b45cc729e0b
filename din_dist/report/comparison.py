"""Another job beside the one of the report: what it was told otherwise, and how much worse or better it ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from din_dist.config import Config
from din_dist.report.gain import Difference
from din_dist.report.job import JobRecord

_PLACES = ("output_dir", "flagfile", "data_dir", "export_dir")  # which say nothing about the model


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The other job.

    Attributes:
        record: its records.
        step: of its weights; None: it could not be scored.
        gain: that of the report's job over it, on the same examples; None likewise.
        problem: why it could not be scored; empty if it was.
    """

    record: JobRecord
    step: int | None = None
    gain: Difference | None = None
    problem: str = ""


def differing_settings(ours: str, others: str) -> Sequence[tuple[str, str, str]]:
    """Returns the name and both values of each setting that differs between two flagfiles."""
    own, other = _values(ours), _values(others)
    names = [name for name in dict.fromkeys([*own, *other]) if own.get(name) != other.get(name)]
    return [(name, own.get(name, "–"), other.get(name, "–")) for name in names if name not in _PLACES]


def _values(flags: str) -> dict[str, str]:
    """Returns the values of a flagfile by name. Of a flag without one, the value is as it is written."""
    found, known = {}, {field.name for _, part in Config().parts() for field in dataclasses.fields(part)}
    for line in flags.splitlines():
        if line.startswith("--"):
            name, equal, value = line[2:].partition("=")
            found[name if equal or name in known else name.removeprefix("no")] = value if equal else name
    return found
