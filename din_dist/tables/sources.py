"""Finds the user's files, and notices that they changed since they were prepared."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from din_dist.errors import InputError
from din_dist.files import is_remote, local_path, source_path
from din_dist.tables.formats import KNOWN, format_of
from din_dist.tables.search import RemoteSearch, Search, fixed_parts
from din_dist.tables.storage import File, RemoteFile, State, file_of, states
from din_dist.text import shown

_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_UNKNOWN_SIGN = "\ufffd"  # in place of bytes that are not UTF-8
_MOST_NAMED = 5  # files that were passed over
_PARTITION = re.compile(r"([^=]+)=(.*)")


class NothingThere(InputError):
    """There is no file of a supported type where the user said."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The files of a table.

    Attributes:
        files: the files, sorted by path.
        passed_over: the paths below the source of the files and folders that were not read.
    """

    files: list[File]
    passed_over: list[str]

    def describe(self) -> str:
        """Returns one line with the number of files read and the names of those that were not."""
        line = f"files: {len(self.files):,} read"
        if not self.passed_over:
            return line
        named, more = self.passed_over[:_MOST_NAMED], len(self.passed_over) - _MOST_NAMED
        return f"{line}, {len(self.passed_over):,} passed over: {', '.join(named)}{f' and {more:,} more' * (more > 0)}"


def absolute(source: str, flag: str = "data_path") -> str:
    """Returns the absolute path of `source` (a file, a folder or a glob), with `~` expanded and links as they are.

    The URI of a store stays one.
    """
    text = source_path(source, flag)
    return text if is_remote(text) else os.path.abspath(text)  # noqa: PTH100 (`resolve` would follow links)


def find_files(source: str, flag: str = "--data_path", table: str = "log") -> Found:
    """Finds a table's files: `source` itself, all files in that folder, or all that the glob matches.

    Each real file counts once, however many links lead to it. In folders and globs these are passed over:
    - files of other types,
    - names that begin with `.` or `_`,
    - links to files that were found already.

    Args:
        source: a file, a folder or a glob.
        flag: the flag that `source` was given by, for the texts of errors.
        table: the name of the table there.

    Raises:
        InputError: nothing is there, something cannot be read, a file is of an unsupported type, or formats are mixed.
    """
    source = absolute(source, flag.removeprefix("--"))
    path = file_of(source)
    root, rest = _split_glob(path)
    search = RemoteSearch(flag, table, root) if isinstance(root, RemoteFile) else Search(flag, table)
    if search.exists(path):
        if not search.is_dir(path):
            search.require_file(path)
            return Found([path], [])
        root, matches = path, [path]
    else:
        matches = search.matches(root, rest)
        if not matches:
            raise NothingThere(f"{source}: no such file, folder, or match of a glob. Correct {flag}.")
    search.add_all(matches)
    files = sorted(search.files)
    search.refuse_tables_above(files)
    passed_over = sorted(other.relative_to(root).as_posix() for other in search.passed_over)
    if not files:
        raise NothingThere(f"{source}: no file of a supported type there ({KNOWN}). Correct {flag}.")
    _require_one_format(source, files, table)
    return Found(files, passed_over)


def find_local_files(source: str, flag: str, table: str) -> tuple[Found, list[Path]]:
    """Finds the files of a table that must lie on this machine; see `find_files`.

    Returns:
        what was found, and its files.

    Raises:
        InputError: as `find_files`, and for the URI of a store.
    """
    found = find_files(local_path(source, flag.removeprefix("--")), flag, table)
    return found, [file for file in found.files if isinstance(file, Path)]


def _split_glob(path: File) -> tuple[File, tuple[str, ...]]:
    """Returns the folder that a glob begins at, and the rest of its parts; the path itself if it is no glob."""
    fixed = fixed_parts(path.parts)
    root = dataclasses.replace(path, parts=fixed) if isinstance(path, RemoteFile) else Path(*fixed)
    return root, path.parts[len(fixed) :]


def _require_one_format(source: str, files: list[File], table: str) -> None:
    first, form = files[0], format_of(files[0])
    for file in files:
        if format_of(file) is not form:
            raise InputError(
                f"{source}: all files of the {table} must have one format. Received: {first} ({form}) and "
                f"{file} ({format_of(file)}). Give a glob that matches one of them."
            )


def partition_of(file: File, wanted: Sequence[str] = ()) -> dict[str, str | None]:
    """Returns the columns that the names of a file's folders give, as Hive, Spark and pandas write them: NAME=VALUE.

    Args:
        file: the path of the file.
        wanted: the columns whose values are checked.

    Raises:
        InputError: a wanted column has two values, or one that is not UTF-8.
    """
    found: dict[str, str | None] = {}
    for folder in (file.parent, *file.parent.parents):
        if not (match := _PARTITION.fullmatch(folder.name)):
            continue
        name, value = (unquote(text) for text in match.groups())
        if name in wanted and _UNKNOWN_SIGN in value and _UNKNOWN_SIGN not in folder.name:
            raise InputError(f"{folder}: {name} must be UTF-8. Received: {match[2]!r}. Rename the folder.")
        told = None if value == _NULL_PARTITION else value
        if name in wanted and found.get(name, told) != told:
            raise InputError(
                f"{folder}: folders must give a column one value. Received: {name}={shown(told)}, and "
                f"{name}={shown(found[name])} below it. Rename one of the two."
            )
        found.setdefault(name, told)  # the innermost
    return dict(reversed(found.items()))


def fingerprint_files(files: Iterable[File], columns: Sequence[str] = ()) -> dict[str, dict[str, int | str]]:
    """Returns facts about each file, by its path: size in bytes, time of change in nanoseconds, digest of the content.

    A file of a store is not read: its digest is made from the size and the etag, or the time where there is no etag.

    Args:
        files: the files to read.
        columns: the columns of the table. If the names of folders give some of them, `partition` is one more fact.

    Raises:
        InputError: a file cannot be read.
    """
    files = list(files)
    found = {str(file): facts for file, facts in zip(files, _facts(files), strict=True)}
    for file in files:
        if partition := partition_text(file, columns):
            found[str(file)]["partition"] = partition
    return found


def _facts(files: Sequence[File]) -> list[dict[str, int | str]]:
    remote = states(file for file in files if isinstance(file, RemoteFile))
    return [
        remote[file].facts() if isinstance(file, RemoteFile) else {**_size_and_time(file), "digest": _digest(file)}
        for file in files
    ]


def partition_text(file: File, columns: Sequence[str]) -> str:
    """Returns NAME=VALUE of each of the `columns` that the names of a file's folders give; empty if there is none."""
    partition = partition_of(file)
    return "/".join(f"{name}={partition[name]}" for name in columns if name in partition)


def check_unchanged(
    recorded: Mapping[str, Mapping[str, int | str]],
    files: Iterable[File],
    since: str = "the data was prepared",
    remedy: str = "Give launch/train.sh or prepare_data --overwrite_prepared once, or give another --data_dir.",
) -> None:
    """Compares files with facts that were recorded before. To touch a file or to copy it back is no change.

    Args:
        recorded: the facts by path; see `fingerprint_files`.
        files: the files as they are now.
        since: when the facts were recorded, for the text of the error.
        remedy: what the user can do, for the text of the error.

    Raises:
        InputError: a file was changed, added or removed; the text names the first one.
    """
    now = {str(file): file for file in files}
    remote = states(file for path, file in now.items() if isinstance(file, RemoteFile) and path in recorded)
    for path in sorted({*now, *recorded}):
        if path not in recorded:
            what = "was added"
        elif path not in now:
            what = "was removed"
        elif _is_changed(now[path], remote, recorded[path]):
            what = "has changed"
        else:
            continue
        raise InputError(f"{path}: this file {what} since {since}. {remedy}")


def _is_changed(file: File, remote: Mapping[RemoteFile, State], recorded: Mapping[str, int | str]) -> bool:
    if isinstance(file, RemoteFile):
        return remote[file].facts()["digest"] != recorded["digest"]
    now = _size_and_time(file)
    if now["size"] != recorded["size"]:
        return True
    return now["mtime_ns"] != recorded["mtime_ns"] and _digest(file) != recorded["digest"]


def _size_and_time(file: Path) -> dict[str, int | str]:
    try:
        found = file.stat()
    except OSError as error:
        raise _not_readable(file, error) from error
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise _not_readable(file, error) from error


def _not_readable(file: Path, error: OSError) -> InputError:
    return InputError(f"{file}: must be readable. Received: {error.strerror or error}. Correct that.")
