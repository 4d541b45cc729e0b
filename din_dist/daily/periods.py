"""Finds the days of a log by the names of its files and folders.

These names count, directly in the folder of the log:

- a folder 2026-11-01 or day=2026-11-01, whatever stands before the sign of equality;
- a file 2026-11-01.parquet, .csv.gz or of another format that is read, also day=2026-11-01.parquet;
- a folder of such a name, as Spark writes it.

All other names are passed over.
"""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path

from din_dist.errors import InputError
from din_dist.files import is_remote
from din_dist.tables.formats import format_of
from din_dist.tables.storage import File, Listing, RemoteFile

_NAME = re.compile(r"(?:[^=.]+=)?(\d{4}-\d{2}-\d{2})(?:\..+)?", re.ASCII)
_FORMS = "Name it as 2026-11-01.parquet, 2026-11-01/ or day=2026-11-01/."


def find_days(log: str) -> dict[datetime.date, str]:
    """Returns the source of each day, in the order of days.

    Args:
        log: a folder of this machine or of a store, as `--log` names it.

    Raises:
        InputError: there is no such folder or no day in it, a day is there twice, or a name is no date.
    """
    found: dict[datetime.date, str] = {}
    for entry, is_folder in _entries(log):
        match = _NAME.fullmatch(entry.name)
        if not match or not (format_of(entry) or (is_folder and "." not in entry.name)):
            continue
        try:
            date = datetime.date.fromisoformat(match[1])
        except ValueError as error:
            raise InputError(f"--log: names must have dates. Received: {entry}. {_FORMS}") from error
        source = entry.uri if isinstance(entry, RemoteFile) else str(entry)
        if date in found:
            raise InputError(
                f"--log: must have one file or folder for each day. Received: {found[date]} and {source}. Move one of "
                "them away, or put both into one folder."
            )
        found[date] = source
    if not found:
        raise InputError(
            f"--log: must have files or folders that are named by their day. Received: {log}, with none. {_FORMS}"
        )
    return dict(sorted(found.items()))


def _entries(log: str) -> list[tuple[File, bool]]:
    """Returns what lies directly in a folder, in the order of names, and what of it is a folder itself."""
    if is_remote(log):
        top = RemoteFile.of(log)
        listing = Listing.of(top, recursive=False)
        if not listing.is_folder.get(top):
            raise _no_folder(log, "no such folder")
        return sorted((file, is_folder) for file, is_folder in listing.is_folder.items() if file != top)
    folder = Path(log).absolute()
    try:
        return sorted((Path(entry.path), entry.is_dir()) for entry in os.scandir(folder))
    except OSError as error:
        raise _no_folder(log, error.strerror) from error


def _no_folder(log: str, why: str | None) -> InputError:
    return InputError(f"--log: must be a folder that can be read. Received: {log}, {why}. Name the folder of the days.")
