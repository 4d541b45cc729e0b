"""The user's files: finding them, and noticing that they changed since they were prepared."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from din_dist.errors import InputError
from din_dist.files import local_path
from din_dist.tables.formats import KNOWN, format_of
from din_dist.text import printable, shown

_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_TABLES = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table"}
_NOWHERE: frozenset[tuple[int, int]] = frozenset()
_UNKNOWN_SIGN = "\ufffd"  # in place of bytes that are not UTF-8
_MOST_NAMED = 5  # of the files that were passed over
_PARTITION = re.compile(r"([^=]+)=(.*)")


@dataclasses.dataclass(frozen=True)
class Found:
    """A table's files, sorted by path, and what was passed over: names by their path below the source."""

    files: list[Path]
    passed_over: list[str]

    def describe(self) -> str:
        """Returns one line for people."""
        line = f"files: {len(self.files):,} read"
        if not self.passed_over:
            return line
        named, more = self.passed_over[:_MOST_NAMED], len(self.passed_over) - _MOST_NAMED
        return f"{line}, {len(self.passed_over):,} passed over: {', '.join(named)}{f' and {more:,} more' * (more > 0)}"


def absolute(source: str, flag: str = "data_path") -> str:
    """Returns `source` (a file, a folder or a glob) from the root on, `~` spelled out; links are left alone."""
    return os.path.abspath(local_path(source, flag))  # noqa: PTH100 (`resolve` would follow links)


def find_files(source: str, flag: str = "--data_path", table: str = "log") -> Found:
    """Finds a table's files: `source` itself, all in that folder, or all that the glob matches.

    Each real file counts once, however many links lead to it. In folders and globs, files of other types, names that
    begin with `.` or `_`, and links to what was found already are passed over.

    Args:
        flag: the flag that `source` was given by; `table` is what it is called.

    Raises:
        InputError: nothing is there, something cannot be read, a file of an unsupported type was asked for, or formats
            are mixed.
    """
    source = absolute(source, flag.removeprefix("--"))
    path = Path(source)
    search = _Search(flag, table)
    if search.exists(path):
        if not _is_dir(path):
            search.require_file(path)
            return Found([path], [])
        root, matches = path, [path]
    else:
        root, matches = Path(*_fixed_parts(path)), search.matches(path)
        if not matches:
            raise InputError(f"{source}: no such file, folder, or match of a glob. Correct {flag}.")
    search.add_all(matches)
    files = sorted(search.files)
    search.refuse_tables_above(files)
    passed_over = sorted(other.relative_to(root).as_posix() for other in search.passed_over)
    if not files:
        raise InputError(f"{source}: no file of a supported type there ({KNOWN}). Correct {flag}.")
    _require_one_format(source, files, table)
    return Found(files, passed_over)


def _require_one_format(source: str, files: list[Path], table: str) -> None:
    first, form = files[0], format_of(files[0])
    for file in files:
        if format_of(file) is not form:
            raise InputError(
                f"{source}: all files of a {table} must have one format. Received: {first} ({form}) and "
                f"{file} ({format_of(file)}). Give a glob that matches one of them."
            )


class _Search:
    """Walks folders; each real folder and each real file once."""

    def __init__(self, flag: str, table: str) -> None:
        self._flag, self._table = flag, table
        self._seen: set[tuple[int, int]] = set()  # device and inode
        self.files: list[Path] = []
        self.passed_over: list[Path] = []

    def add_all(self, paths: Iterable[Path]) -> None:
        """Adds files, and all below folders. What is no link comes first: so a file keeps the name that is its own."""
        links = list(paths)
        while links:
            found: list[Path] = []
            for path in links:
                self._add_tree(path, found)
            links = found

    def _add_tree(self, top: Path, links: list[Path]) -> None:
        """Adds what is at `top`, without following the `links` below it, which it notes."""
        pending = [top]  # a stack: folders may be nested deeper than functions
        while pending:
            path = pending.pop()
            if path is not top and path.name[0] in "._":
                self.passed_over.append(path)
            elif path is not top and self._is_link(path):
                links.append(path)
            elif not _is_dir(path):
                self._add(path)
            elif self._is_known(path):
                self.passed_over.append(path)
            else:
                entries = self._entries(path)
                self._refuse_tables(path, {entry.name for entry in entries})
                pending.extend(reversed(entries))

    def refuse_tables_above(self, files: Iterable[Path]) -> None:
        """Refuses files of folders and globs that lie within a table, wherever its log is."""
        seen: set[Path] = set()
        for file in files:
            for folder in file.parents:
                if folder in seen:
                    break
                seen.add(folder)
                self._refuse_tables(folder, {name for name in (*_TABLES, "metadata") if _is_dir(folder / name)})

    def _refuse_tables(self, folder: Path, names: set[str]) -> None:
        """Refuses tables whose folder keeps files of earlier versions: which are of today, a log of theirs tells."""
        kinds = [kind for name, kind in _TABLES.items() if name in names]
        if "metadata" in names and any((folder / "metadata").glob("*.metadata.json")):
            kinds.append("an Iceberg table")
        if kinds:
            raise InputError(
                f"{folder}: a {self._table} is files, all of which count. Received: {kinds[0]}, whose folder keeps "
                "files of earlier versions too. Write it out as Parquet, for example with Spark."
            )

    def _add(self, path: Path) -> None:
        """Adds one file, unless it is passed over."""
        if path.name[0] in "._" or format_of(path) is None:
            self.passed_over.append(path)
            return
        self._require_name(path)
        self._require_readable(path)
        if self._is_known(path):
            self.passed_over.append(path)
        else:
            self.files.append(path)

    def exists(self, path: Path) -> bool:
        """Tells whether there is something at `path`.

        Raises:
            InputError: that cannot be told for want of rights.
        """
        try:
            path.stat()
        except PermissionError as error:
            raise self._unreadable(path, f"{error.strerror}") from error
        except OSError:
            return False
        return True

    def require_file(self, path: Path) -> None:
        """Checks a file that was asked for by its name.

        Raises:
            InputError: it cannot be read, or its type is none of ours.
        """
        self._require_name(path)
        self._require_readable(path)
        if format_of(path) is None:
            raise InputError(
                f"{path}: a {self._table}'s file must be one of {KNOWN}. Received: another type. Convert or rename it."
            )

    def _require_name(self, path: Path) -> None:
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{printable(str(path))}: names of files and folders must be UTF-8. Received: "
                f"{os.fsencode(str(path)[error.start : error.end])!r} in one. Rename it, or give {self._flag} a glob "
                "that leaves it out."
            ) from error

    def _require_readable(self, path: Path) -> None:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            what = "a link to what is not there" if path.is_symlink() else error.strerror
            raise self._unreadable(path, f"{what}") from error
        if not stat.S_ISREG(mode):  # which can be read once only, or never ends
            raise self._unreadable(path, "a pipe or a device")
        if not os.access(path, os.R_OK, effective_ids=True):
            raise self._unreadable(path, "no rights to read it")

    def _is_link(self, path: Path) -> bool:
        try:
            return path.is_symlink()
        except OSError as error:
            raise self._unreadable(path, f"{error.strerror}") from error

    def _is_there(self, path: Path) -> bool:
        """Tells whether there is something at `path`, if only a link to nowhere."""
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._unreadable(path, f"{error.strerror}") from error
        return True

    def _is_known(self, path: Path) -> bool:
        status = path.stat()
        key = (status.st_dev, status.st_ino)
        known = key in self._seen
        self._seen.add(key)
        return known

    def _entries(self, folder: Path) -> list[Path]:
        try:
            return sorted(folder.iterdir())
        except OSError as error:
            raise self._unreadable(folder, f"{error.strerror}") from error

    def _unreadable(self, path: Path, received: str) -> InputError:
        return InputError(
            f"{path}: all of a {self._table} must be readable, files and folders. Received: {received}. Correct that, "
            f"or give {self._flag} a glob that leaves it out."
        )

    def matches(self, pattern: Path) -> list[Path]:
        """Returns what a glob matches; unlike Python's, it does not pass over folders that cannot be read.

        Raises:
            InputError: one cannot.
        """
        fixed = _fixed_parts(pattern)
        found = dict.fromkeys(self._matches(Path(*fixed), pattern.parts[len(fixed) :]))
        return sorted(found, key=lambda path: (path.resolve() != path, path))  # a file's own name first

    def _matches(self, base: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """Yields what `parts` match below `base`, in any order."""
        pending = [(base, parts, _NOWHERE)]  # and the folders that `**` has come through: links may lead in a circle
        while pending:
            base, parts, above = pending.pop()
            if not parts:
                if self._is_there(base):
                    yield base
                continue
            part, rest = parts[0], parts[1:]
            if not _is_magic(part):
                pending.append((base / part, rest, above))
            elif _is_dir(base):
                if part == "**":
                    status = base.stat()
                    if (key := (status.st_dev, status.st_ino)) in above:
                        continue
                    above = above | {key}
                    pending.append((base, rest, above))
                for entry in self._entries(base):
                    if part == "**":
                        if entry.name[0] != "." and _is_dir(entry):
                            pending.append((entry, parts, above))
                    elif fnmatch.fnmatchcase(entry.name, part) and (entry.name[0] != "." or part[0] == "."):
                        pending.append((entry, rest, above))


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # of a folder without rights
        return False


def _is_magic(part: str) -> bool:
    return any(sign in part for sign in "*?[")


def _fixed_parts(pattern: Path) -> tuple[str, ...]:
    """Returns what stands before a pattern's first sign of a glob."""
    parts = pattern.parts
    return parts[: next((place for place, part in enumerate(parts) if _is_magic(part)), len(parts))]


def partition_of(file: Path, wanted: Sequence[str] = ()) -> dict[str, str | None]:
    """Returns the columns that the names of a file's folders give, as Hive, Spark and pandas write them: NAME=VALUE.

    Raises:
        InputError: of a `wanted` column there are two values, or one that is not UTF-8.
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


def fingerprint_files(files: Iterable[Path], columns: Sequence[str] = ()) -> dict[str, dict[str, int | str]]:
    """Returns by path: size in bytes, time of change in nanoseconds, digest of the content.

    Also `partition`, where the names of a file's folders give some of the `columns`.

    Raises:
        InputError: a file cannot be read.
    """
    found = {str(file): {**_size_and_time(file), "digest": _digest(file)} for file in files}
    for path, facts in found.items():
        if partition := partition_text(Path(path), columns):
            facts["partition"] = partition
    return found


def partition_text(file: Path, columns: Sequence[str]) -> str:
    """Returns which of the `columns` the names of a file's folders give, and with what values; empty for none."""
    partition = partition_of(file)
    return "/".join(f"{name}={partition[name]}" for name in columns if name in partition)


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
