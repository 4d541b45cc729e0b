"""The user's files: finding them, and noticing that they changed since they were prepared."""

from __future__ import annotations

import enum
import glob
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from din_dist.errors import InputError


class Format(enum.StrEnum):
    PARQUET = "Parquet"
    CSV = "CSV"
    JSON_LINES = "JSON lines"


_FORMATS = {
    ".parquet": Format.PARQUET,
    ".pq": Format.PARQUET,
    ".csv": Format.CSV,
    ".csv.gz": Format.CSV,
    ".jsonl": Format.JSON_LINES,
    ".jsonl.gz": Format.JSON_LINES,
    ".ndjson": Format.JSON_LINES,
    ".ndjson.gz": Format.JSON_LINES,
    ".json": Format.JSON_LINES,
    ".json.gz": Format.JSON_LINES,
}
_KNOWN = ", ".join(_FORMATS)


def format_of(path: Path) -> Format | None:
    """The format that the file's name promises, None if it is none of ours."""
    return next((form for suffix, form in _FORMATS.items() if path.name.lower().endswith(suffix)), None)


def absolute(source: str) -> str:
    """`source` (a file, a folder or a glob) from the root on, `~` spelled out; links are left alone."""
    return os.path.abspath(Path(source).expanduser())  # noqa: PTH100 (`resolve` would follow links)


def find_files(source: str, flag: str = "--data_path", table: str = "log") -> list[Path]:
    """A table's files, sorted by path: `source` itself, all in that folder, or all that the glob matches.

    In folders and globs, files of other types and names that begin with `.` or `_` are passed over.
    `flag` is what `source` was given by, and `table` what it is called.

    Raises:
        InputError: nothing is there, a file of an unsupported type was asked for, or formats are mixed.
    """
    source = absolute(source)
    path = Path(source)
    if path.is_file():
        if format_of(path) is None:
            raise InputError(
                f"{source}: a {table}'s file must be one of {_KNOWN}. Received: another type. Convert or rename it."
            )
        return [path]
    if path.is_dir():
        found = _files_below(path)
    else:
        matches = [Path(match) for match in glob.glob(source, recursive=True)]  # noqa: PTH207 (absolute, `**`)
        if not matches:
            raise InputError(f"{source}: no such file, folder, or match of a glob. Correct {flag}.")
        found = {file for match in matches for file in (_files_below(match) if match.is_dir() else [match])}
    files = sorted(file for file in found if file.name[0] not in "._" and format_of(file))
    if not files:
        raise InputError(f"{source}: no file of a supported type there ({_KNOWN}). Correct {flag}.")
    first, form = files[0], format_of(files[0])
    for file in files:
        if format_of(file) is not form:
            raise InputError(
                f"{source}: all files of a {table} must have one format. Received: {first} ({form}) and "
                f"{file} ({format_of(file)}). Give a glob that matches one of them."
            )
    return files


def _files_below(folder: Path) -> set[Path]:
    found: set[Path] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] not in "._"]
        found.update(Path(root, name) for name in names)
    return found


def fingerprint_files(files: Iterable[Path]) -> dict[str, dict[str, int | str]]:
    """Path -> size in bytes, time of change in nanoseconds, digest of the content."""
    return {str(file): {**_size_and_time(file), "digest": _digest(file)} for file in files}


def check_unchanged(
    recorded: Mapping[str, Mapping[str, int | str]],
    files: Iterable[Path],
    since: str = "the data was prepared",
    remedy: str = "Give launch/train.sh or prepare_data --overwrite_prepared once, or give another --data_dir.",
) -> None:
    """Compares the files of today with those that were recorded; a mere `touch` or a copy back is no change.

    Raises:
        InputError: naming the first file that was changed, added or removed.
    """
    now = {str(file) for file in files}
    for path in sorted(now | set(recorded)):
        if path not in recorded:
            what = "was added"
        elif path not in now:
            what = "was removed"
        elif _is_changed(Path(path), recorded[path]):
            what = "has changed"
        else:
            continue
        raise InputError(f"{path}: this file {what} since {since}. {remedy}")


def _is_changed(file: Path, recorded: Mapping[str, int | str]) -> bool:
    now = _size_and_time(file)
    if now["size"] != recorded["size"]:
        return True
    return now["mtime_ns"] != recorded["mtime_ns"] and _digest(file) != recorded["digest"]


def _size_and_time(file: Path) -> dict[str, int | str]:
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
