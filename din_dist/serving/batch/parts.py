"""What is to be scored, cut into parts, and who has done which: all of it is in the folder of the results.

PREDICTIONS_DIR/
    plan.json                        what is asked for: a command that asks for the same goes on
    part-00000-of-00012.parquet ...  published one by one, each whole
    predictions.json                 published last
    .part-...                        claims, and parts that are being written
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from din_dist.errors import InputError
from din_dist.files import claimed, read_record, write_text
from din_dist.tables.sources import check_unchanged, fingerprint_files
from din_dist.tables.survey import Survey, survey_table
from din_dist.tables.writer import suffix_of
from din_dist.text import is_count, parse_json, printable, to_json

PLAN = "plan.json"
SUMMARY = "predictions.json"
_VERSION = 1
_STOPPING = ".stopping"
_BEGIN_ANEW = "Give --overwrite to begin anew, or another --predictions_dir."


@dataclasses.dataclass(frozen=True)
class Part:
    """Up to so many rows of one file, written to one file."""

    name: str
    path: Path
    first_row: int  # from 0
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked for.

    `settings` are all that the results depend on besides the `files`, by the names that the user knows them by.
    """

    files: Mapping[str, Survey]
    fingerprints: Mapping[str, Mapping[str, int | str]]
    rows_per_part: int
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, files: Sequence[Path], rows_per_part: int, settings: Mapping[str, Any]) -> Plan:
        """Reads the files through, once for a digest and once for their rows.

        Raises:
            InputError: one is damaged.
        """
        fingerprints = fingerprint_files(files)
        surveys = {str(file): survey_table(file) for file in files}
        return cls(surveys, fingerprints, rows_per_part, settings)

    @property
    def num_rows(self) -> int:
        return sum(survey.num_rows for survey in self.files.values())

    def parts(self) -> list[Part]:
        """In the order of the rows; a file without rows has one part without rows, which names the columns."""
        places = [
            (Path(path), first_row, min(self.rows_per_part, survey.num_rows - first_row))
            for path, survey in self.files.items()
            for first_row in range(0, max(1, survey.num_rows), self.rows_per_part)
        ]
        return [
            Part(f"part-{number:05d}-of-{len(places):05d}{suffix_of(path)}", path, first_row, num_rows)
            for number, (path, first_row, num_rows) in enumerate(places)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "files": {path: dataclasses.asdict(survey) for path, survey in self.files.items()},
            "fingerprints": self.fingerprints,
            "rows_per_part": self.rows_per_part,
            "settings": self.settings,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Plan:
        files = {
            path: Survey(tuple(survey["columns"]), survey["num_rows"], survey["num_bytes"])
            for path, survey in fields["files"].items()
        }
        counts = [count for survey in files.values() for count in (survey.num_rows, survey.num_bytes)]
        if not all(map(is_count, counts)) or not is_count(fields["rows_per_part"]) or not fields["rows_per_part"]:
            raise ValueError("counts that cannot be")
        return cls(files, fields["fingerprints"], fields["rows_per_part"], fields["settings"])


class PartsFolder:
    """The folder of the results, as its processes share it. Parts are claimed by whoever comes first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(
        self,
        files: Sequence[Path],
        rows_per_part: int,
        settings: Mapping[str, Any],
        overwrite: bool,
        check: Callable[[Plan], None] = lambda _: None,
    ) -> Plan:
        """The plan to follow, one that was begun before if it is the same. For one process, which holds the folder.

        `check` may refuse a new plan before it is written down. One of which no part is published binds nobody.

        Raises:
            InputError: another plan was begun here, a file is damaged or changed, or the folder cannot be written.
        """
        with self.writing():
            for leftover in (*self.folder.glob(".part-*"), self.folder / _STOPPING):
                leftover.unlink(missing_ok=True)  # of processes that were killed
            path = self.folder / PLAN
            if overwrite:
                for old in (self.folder / SUMMARY, path, *self.folder.glob("part-*-of-*")):
                    old.unlink(missing_ok=True)
            elif (stray := next(self.folder.glob("part-*-of-*"), None)) is not None:
                if path.exists():
                    return self._resumed(files, rows_per_part, settings)
                raise InputError(
                    f"--predictions_dir: must be for these predictions alone. Received: {self.folder} with "
                    f"{stray.name}, and no {PLAN}. {_BEGIN_ANEW}"
                )
            plan = Plan.of(files, rows_per_part, settings)
            check_unchanged(plan.fingerprints, files, "reading began", _BEGIN_ANEW)
            check(plan)
            write_text(path, to_json(plan.to_json()) + "\n")
        return plan

    def _resumed(self, files: Sequence[Path], rows_per_part: int, settings: Mapping[str, Any]) -> Plan:
        path = self.folder / PLAN
        try:
            fields = parse_json(read_record(path))
            if fields["version"] != _VERSION:
                raise ValueError(f"version {fields['version']}")
            plan = Plan.from_json(fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: must be of this version. Received: {printable(str(error))}. {_BEGIN_ANEW}"
            ) from error
        before = {**plan.settings, "--rows_per_part": plan.rows_per_part}
        now = {**settings, "--rows_per_part": rows_per_part}
        for name in now:
            if before.get(name) != now[name]:
                raise InputError(
                    f"{name}: predictions that were begun go on with the same settings. Received: {now[name]!r} "
                    f"where {self.folder} was begun with {before.get(name)!r}. {_BEGIN_ANEW}"
                )
        check_unchanged(plan.fingerprints, files, f"{self.folder} was begun", _BEGIN_ANEW)
        return plan

    def missing(self, plan: Plan) -> list[Part]:
        names = {path.name for path in self.folder.glob("part-*")}
        return [part for part in plan.parts() if part.name not in names]

    def has(self, part: Part) -> bool:
        return (self.folder / part.name).exists()

    @contextlib.contextmanager
    def claimed(self, part: Part) -> Iterator[bool]:
        """Yields True if this process may write the part; no other process gets it until the block ends."""
        with self.writing(), claimed(self.folder / f".{part.name}.claim") as is_first:
            # Another process may have published the part, and ended its claim, after this one looked.
            yield is_first and not self.has(part)

    def stop_all(self) -> None:
        """Asks the other processes to stop; they look between batches."""
        with contextlib.suppress(OSError):
            (self.folder / _STOPPING).touch()

    def is_stopping(self) -> bool:
        return (self.folder / _STOPPING).exists()

    def finish(self, plan: Plan) -> None:
        """Publishes the summary. For one process, when all parts are there."""
        fields = {
            "num_rows": plan.num_rows,
            "settings": plan.settings,
            "parts": [
                {"name": part.name, "file": str(part.path), "first_row": part.first_row + 1, "num_rows": part.num_rows}
                for part in plan.parts()
            ],
        }
        with self.writing():
            write_text(self.folder / SUMMARY, json.dumps(fields, indent=1) + "\n")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"--predictions_dir: must be a folder that can be written. Received: {self.folder}, "
                f"{error.strerror or error}. Make room or give rights there; the same command goes on."
            ) from error


def in_turn(parts: Sequence[Part], index: int, count: int) -> list[Part]:
    """The order in which one of `count` processes asks for the parts: its own share first, then those of the others.

    Each has a run of them to itself, so that it reads on instead of skipping; of the others' it begins with the last.
    """
    bounds = [len(parts) * number // count for number in range(count + 1)]
    shares = [list(parts[low:high]) for low, high in itertools.pairwise(bounds)]
    others = [share[::-1] for share in shares[index + 1 :] + shares[:index]]
    return [part for share in [shares[index], *others] for part in share]
