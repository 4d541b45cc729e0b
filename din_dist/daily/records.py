"""The folder of daily training, and the records of what is done there.

WORK_DIR/
    daily.json                 the first day and the period
    days/DATE/PHASE.json       what a finished phase of a day has found: prepared, evaluated, trained, exported
    days/DATE/evaluation.json  all numbers of the evaluation
    prepared/DATE/             the prepared data up to that day
    jobs/DATE/                 the job that trained on that day
    versions/NUMBER/           the export of that day, whose number is 20261101 for 2026-11-01

A record is written last. A phase without one is done again, and later ones are not begun.
"""

from __future__ import annotations

import datetime
import enum
import re
from pathlib import Path
from typing import Any

from din_dist.errors import InputError
from din_dist.files import delete_folder, make_folder, read_record, write_text
from din_dist.text import parse_json, reason, to_json


class DayPhase(enum.StrEnum):
    PREPARED = "prepared"
    EVALUATED = "evaluated"
    TRAINED = "trained"
    EXPORTED = "exported"


class WorkFolder:
    """The folder of daily training.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def versions(self) -> Path:
        """The folder of the exports, which `serve` takes."""
        return self.root / "versions"

    def prepared(self, date: datetime.date) -> Path:
        """Returns the folder of the prepared data up to a day."""
        return self.root / "prepared" / str(date)

    def job(self, date: datetime.date) -> Path:
        """Returns the folder of the job that trains on a day."""
        return self.root / "jobs" / str(date)

    def export(self, date: datetime.date) -> Path:
        """Returns the folder of the export of a day."""
        return self.versions / str(version_of(date))

    def evaluation(self, date: datetime.date) -> Path:
        """Returns the file of all numbers of a day's evaluation."""
        return self._day(date) / "evaluation.json"

    def read(self, date: datetime.date, phase: DayPhase) -> dict[str, Any] | None:
        """Returns the record of a phase; None if the phase is not done.

        Raises:
            InputError: it cannot be read.
        """
        return self._read(self._day(date) / f"{phase}.json")

    def write(self, date: datetime.date, phase: DayPhase, values: dict[str, Any]) -> None:
        """Records that a phase is done.

        Raises:
            OSError: the record cannot be written.
        """
        self._write(self._day(date) / f"{phase}.json", values)

    def make_day(self, date: datetime.date) -> None:
        """Makes the folder of a day's records.

        Raises:
            OSError: it cannot be made.
        """
        make_folder(self._day(date))

    def finished(self) -> list[datetime.date]:
        """Returns the days whose export is recorded, the oldest first."""
        folders = (self.root / "days").glob("*/")
        dates = [folder.name for folder in folders if re.fullmatch(r"\d{4}-\d{2}-\d{2}", folder.name, re.ASCII)]
        days = sorted(map(datetime.date.fromisoformat, dates))
        return [date for date in days if (self._day(date) / f"{DayPhase.EXPORTED}.json").is_file()]

    def begin(self, settings: dict[str, str]) -> None:
        """Records the settings that must stay, or compares them with those of the first command.

        Args:
            settings: by the names of their flags.

        Raises:
            InputError: one of them is another one now.
            OSError: they cannot be written.
        """
        path = self.root / "daily.json"
        before = self._read(path)
        if before is None:
            self._write(path, settings)
            return
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"--{name}: stays as it was at the first command. Received: {value}, and {self.root} began with "
                    f"{before.get(name)}. Give that, or another --work_dir."
                )

    def delete(self, folder: Path) -> None:
        """Deletes one of the folders, its name first.

        Raises:
            OSError: it cannot be deleted.
        """
        if folder.parent.is_dir():
            delete_folder(folder)

    def _day(self, date: datetime.date) -> Path:
        return self.root / "days" / str(date)

    def _write(self, path: Path, values: dict[str, Any]) -> None:
        make_folder(path.parent)
        write_text(path, to_json(values) + "\n")

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            values = parse_json(read_record(path))
            if not isinstance(values, dict):
                raise ValueError("another form")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: must be as it was written. Received: {reason(error)}. Delete it, and the phase is done again."
            ) from error
        return values


def version_of(date: datetime.date) -> int:
    """Returns the number of a day's export: 20261101 for 2026-11-01."""
    return int(f"{date:%Y%m%d}")
