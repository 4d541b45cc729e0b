"""Cuts the rows to score into parts and records in the results' folder which process does which part.

PREDICTIONS_DIR/
    plan.json                        the request; a command with the same request resumes it
    part-00000-of-00012.parquet ...  published one by one, each complete
    predictions.json                 published last
    .part-...                        claims, and parts that are being written
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from din_dist.errors import InputError
from din_dist.files import claimed, published, read_record, write_text
from din_dist.tables.sources import check_unchanged, fingerprint_files
from din_dist.tables.storage import File
from din_dist.tables.survey import Survey, survey_table
from din_dist.tables.writer import suffix_of
from din_dist.text import is_count, parse_json, printable, to_json

PLAN = "plan.json"
SUMMARY = "predictions.json"
_VERSION = 1
STOPPING = ".stopping"
MOST_PLAN_BYTES = 1 << 28
_BEGIN_ANEW = "Give --overwrite to begin anew, or another --predictions_dir."


@dataclasses.dataclass(frozen=True)
class Part:
    """A range of rows of one input file, whose results become one output file."""

    name: str
    path: Path
    first_row: int  # from 0
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The request: files to score and settings.

    `settings` holds everything else that the results depend on, under the names that the user knows.
    """

    files: Mapping[str, Survey]
    fingerprints: Mapping[str, Mapping[str, int | str]]
    rows_per_part: int
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, files: Sequence[Path], rows_per_part: int, settings: Mapping[str, Any]) -> Plan:
        """Makes a plan. Each file is read twice, once for its digest and once for its rows.

        Raises:
            InputError: a file is damaged.
        """
        fingerprints = fingerprint_files(files)
        surveys = {str(file): survey_table(file) for file in files}
        return cls(surveys, fingerprints, rows_per_part, settings)

    @property
    def num_rows(self) -> int:
        return sum(survey.num_rows for survey in self.files.values())

    def parts(self) -> list[Part]:
        """Returns the parts in the order of the rows. A file without rows has one part, for its column names."""
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
    """The folder of the results, which several processes share. The first process to claim a part gets it.

    `StoreParts` is the same in an object store.
    """

    folder: File

    def __init__(self, folder: File) -> None:
        self.folder = folder

    def names(self) -> set[str]:
        """Returns the names of all files."""
        return {path.name for path in self._here.iterdir()}

    @property
    def _here(self) -> Path:
        assert isinstance(self.folder, Path)
        return self.folder

    def _read(self, name: str) -> str:
        return read_record(self._here / name)

    def _write(self, name: str, text: str) -> None:
        write_text(self._here / name, text)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self._here / name).unlink(missing_ok=True)

    def begin(
        self,
        files: Sequence[Path],
        rows_per_part: int,
        settings: Mapping[str, Any],
        overwrite: bool,
        check: Callable[[Plan], None] = lambda _: None,
    ) -> Plan:
        """Returns the plan to follow, which is the one in the folder if it is the same.

        Only one process may call this, while it holds the folder's lock. An old plan without a published part is
        ignored.

        Args:
            files: to score.
            rows_per_part: the most rows of a part.
            settings: see `Plan`.
            overwrite: delete the results that are there.
            check: may refuse a new plan before it is written, by raising an error.

        Raises:
            InputError: the folder has another plan, a file is damaged or changed, or the folder cannot be written.
        """
        with self.writing():
            names = self.names()
            leftover = [name for name in names if fnmatch(name, ".part-*") or name == STOPPING]
            self._remove(leftover)  # of processes that were killed
            parts = sorted(name for name in names if fnmatch(name, "part-*-of-*"))
            if overwrite:
                self._remove([name for name in (SUMMARY, PLAN) if name in names])
                self._remove(parts)
            elif parts:
                if PLAN in names:
                    return self._resumed(files, rows_per_part, settings)
                raise InputError(
                    f"--predictions_dir: must be for these predictions alone. Received: {self.folder} with "
                    f"{parts[0]}, and no {PLAN}. {_BEGIN_ANEW}"
                )
            plan = Plan.of(files, rows_per_part, settings)
            check_unchanged(plan.fingerprints, files, "reading began", _BEGIN_ANEW)
            check(plan)
            self._write(PLAN, to_json(plan.to_json()) + "\n")
        return plan

    def _resumed(self, files: Sequence[Path], rows_per_part: int, settings: Mapping[str, Any]) -> Plan:
        path = self.folder / PLAN
        try:
            fields = parse_json(self._read(PLAN))
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
        names = self.names()
        return [part for part in plan.parts() if part.name not in names]

    def has(self, part: Part) -> bool:
        return (self._here / part.name).exists()

    def share(self, plan: Plan, rank: int, world_size: int) -> list[Part]:
        """Returns the missing parts that a process may do, in the order in which it claims them."""
        return in_turn(self.missing(plan), rank, world_size)

    @contextlib.contextmanager
    def published(self, part: Part) -> Iterator[BinaryIO]:
        """Yields a stream whose content becomes the part when the block ends without an error."""
        with published(self._here / part.name) as stream:
            yield stream

    @contextlib.contextmanager
    def claimed(self, part: Part) -> Iterator[bool]:
        """Yields True if this process may write the part; no other process gets it until the block ends."""
        with self.writing(), claimed(self._here / f".{part.name}.claim") as is_first:
            # Another process may have published the part, and ended its claim, after this one looked.
            yield is_first and not self.has(part)

    def stop_all(self) -> None:
        """Asks the other processes to stop, which they do between two batches."""
        with contextlib.suppress(OSError):
            (self._here / STOPPING).touch()

    def is_stopping(self) -> bool:
        return (self._here / STOPPING).exists()

    def finish(self, plan: Plan) -> None:
        """Publishes the summary. Only one process may call this, after all parts are published."""
        fields = {
            "num_rows": plan.num_rows,
            "settings": plan.settings,
            "parts": [
                {"name": part.name, "file": str(part.path), "first_row": part.first_row + 1, "num_rows": part.num_rows}
                for part in plan.parts()
            ],
        }
        with self.writing():
            self._write(SUMMARY, json.dumps(fields, indent=1) + "\n")

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
    """Returns the order in which one of `count` processes claims parts: its own share first, then those of the others.

    A share is a range of consecutive parts, so that a process reads on without skipping. Shares of other processes
    are taken from the last part backwards.

    Args:
        parts: all missing parts.
        index: number of this process.
        count: number of processes.
    """
    bounds = [len(parts) * number // count for number in range(count + 1)]
    shares = [list(parts[low:high]) for low, high in itertools.pairwise(bounds)]
    others = [share[::-1] for share in shares[index + 1 :] + shares[:index]]
    return [part for share in [shares[index], *others] for part in share]
