"""Finds the user's files, and notices that they changed since they were prepared."""

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
_MOST_NAMED = 5  # files that were passed over
_PARTITION = re.compile(r"([^=]+)=(.*)")


@dataclasses.dataclass(frozen=True)
class Found:
    """The files of a table.

    Attributes:
        files: the files, sorted by path.
        passed_over: the paths below the source of the files and folders that were not read.
    """

    files: list[Path]
    passed_over: list[str]

    def describe(self) -> str:
        """Returns one line with the number of files read and the names of those that were not."""
        line = f"files: {len(self.files):,} read"
        if not self.passed_over:
            return line
        named, more = self.passed_over[:_MOST_NAMED], len(self.passed_over) - _MOST_NAMED
        return f"{line}, {len(self.passed_over):,} passed over: {', '.join(named)}{f' and {more:,} more' * (more > 0)}"


def absolute(source: str, flag: str = "data_path") -> str:
    """Returns the absolute path of `source` (a file, a folder or a glob), with `~` expanded and links as they are."""
    return os.path.abspath(local_path(source, flag))  # noqa: PTH100 (`resolve` would follow links)


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
    """Walks folders, and visits each real folder and each real file once."""

    def __init__(self, flag: str, table: str) -> None:
        self._flag, self._table = flag, table
        self._seen: set[tuple[int, int]] = set()  # device and inode
        self.files: list[Path] = []
        self.passed_over: list[Path] = []

    def add_all(self, paths: Iterable[Path]) -> None:
        """Adds files, and all files below folders. Links come last, so that a file keeps its own name."""
        links = list(paths)
        while links:
            found: list[Path] = []
            for path in links:
                self._add_tree(path, found)
            links = found

    def _add_tree(self, top: Path, links: list[Path]) -> None:
        """Adds the file or folder at `top`; the links below it are not followed but added to `links`."""
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
        """Refuses files that lie in a folder of a Delta, Hudi or Iceberg table, at any depth."""
        seen: set[Path] = set()
        for file in files:
            for folder in file.parents:
                if folder in seen:
                    break
                seen.add(folder)
                self._refuse_tables(folder, {name for name in (*_TABLES, "metadata") if _is_dir(folder / name)})

    def _refuse_tables(self, folder: Path, names: set[str]) -> None:
        """Refuses a table whose folder keeps files of earlier versions: only its own log tells which are current."""
        kinds = [kind for name, kind in _TABLES.items() if name in names]
        if "metadata" in names and any((folder / "metadata").glob("*.metadata.json")):
            kinds.append("an Iceberg table")
        if kinds:
            raise InputError(
                f"{folder}: all files of a {self._table} are read. Received: {kinds[0]}, whose folder keeps files of "
                "earlier versions too. Write it out as Parquet, for example with Spark."
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
        """Returns True if there is something at `path`.

        Raises:
            InputError: the rights to look there are missing.
        """
        try:
            path.stat()
        except PermissionError as error:
            raise self._unreadable(path, f"{error.strerror}") from error
        except OSError:
            return False
        return True

    def require_file(self, path: Path) -> None:
        """Checks a file that the user named.

        Raises:
            InputError: the file cannot be read, or its type is not supported.
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
            what = "a link to nowhere" if path.is_symlink() else error.strerror
            raise self._unreadable(path, f"{what}") from error
        if not stat.S_ISREG(mode):  # it can be read only once, or never ends
            raise self._unreadable(path, "a pipe or a device")
        if not os.access(path, os.R_OK, effective_ids=True):
            raise self._unreadable(path, "no rights to read it")

    def _is_link(self, path: Path) -> bool:
        try:
            return path.is_symlink()
        except OSError as error:
            raise self._unreadable(path, f"{error.strerror}") from error

    def _is_there(self, path: Path) -> bool:
        """Tells whether there is something at `path`, even a link to nowhere."""
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
            f"{path}: all files and folders of a {self._table} must be readable. Received: {received}. Correct that, "
            f"or give {self._flag} a glob that leaves it out."
        )

    def matches(self, pattern: Path) -> list[Path]:
        """Returns the paths that a glob matches. Unlike Python's, it does not pass over folders that cannot be read.

        Raises:
            InputError: a folder cannot be read.
        """
        fixed = _fixed_parts(pattern)
        found = dict.fromkeys(self._matches(Path(*fixed), pattern.parts[len(fixed) :]))
        return sorted(found, key=lambda path: (path.resolve() != path, path))  # a file's own name first

    def _matches(self, base: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """Yields the paths that `parts` match below `base`, in any order."""
        pending = [(base, parts, _NOWHERE)]  # with the folders that `**` came through: links may form a circle
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
    except OSError:  # its folder gives no rights
        return False


def _is_magic(part: str) -> bool:
    return any(sign in part for sign in "*?[")


def _fixed_parts(pattern: Path) -> tuple[str, ...]:
    """Returns the parts of a pattern before the first one with a sign of a glob."""
    parts = pattern.parts
    return parts[: next((place for place, part in enumerate(parts) if _is_magic(part)), len(parts))]


def partition_of(file: Path, wanted: Sequence[str] = ()) -> dict[str, str | None]:
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


def fingerprint_files(files: Iterable[Path], columns: Sequence[str] = ()) -> dict[str, dict[str, int | str]]:
    """Returns facts about each file, by its path: size in bytes, time of change in nanoseconds, digest of the content.

    Args:
        files: the files to read.
        columns: the columns of the table. If the names of folders give some of them, `partition` is one more fact.

    Raises:
        InputError: a file cannot be read.
    """
    found = {str(file): {**_size_and_time(file), "digest": _digest(file)} for file in files}
    for path, facts in found.items():
        if partition := partition_text(Path(path), columns):
            facts["partition"] = partition
    return found


def partition_text(file: Path, columns: Sequence[str]) -> str:
    """Returns NAME=VALUE of each of the `columns` that the names of a file's folders give; empty if there is none."""
    partition = partition_of(file)
    return "/".join(f"{name}={partition[name]}" for name in columns if name in partition)


def check_unchanged(
    recorded: Mapping[str, Mapping[str, int | str]],
    files: Iterable[Path],
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
