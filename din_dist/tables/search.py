"""Walks folders and matches globs, on this machine or in a store, by the same rules."""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Any

from din_dist.errors import InputError
from din_dist.tables.formats import KNOWN, format_of
from din_dist.tables.storage import Listing, Refused, RemoteFile
from din_dist.text import printable

_TABLES = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table"}
_NOWHERE: frozenset[object] = frozenset()
Entry = Any  # a `storage.File`; a search takes only those of its own kind


class Search:
    """Walks folders of this machine, and visits each real folder and each real file once.

    Args:
        flag: the flag that the source was given by, for the texts of errors.
        table: the name of the table there.
    """

    def __init__(self, flag: str, table: str) -> None:
        self._flag, self._table = flag, table
        self._seen: set[object] = set()
        self.files: list[Entry] = []
        self.passed_over: list[Entry] = []

    def add_all(self, paths: Iterable[Entry]) -> None:
        """Adds files, and all files below folders. Links come last, so that a file keeps its own name."""
        links = list(paths)
        while links:
            found: list[Entry] = []
            for path in links:
                self._add_tree(path, found)
            links = found

    def _add_tree(self, top: Entry, links: list[Entry]) -> None:
        """Adds the file or folder at `top`; the links below it are not followed but added to `links`."""
        pending = [top]  # a stack: folders may be nested deeper than functions
        while pending:
            path = pending.pop()
            if path is not top and path.name[0] in "._":
                self.passed_over.append(path)
            elif path is not top and self._is_link(path):
                links.append(path)
            elif not self.is_dir(path):
                self._add(path)
            elif self._is_known(path):
                self.passed_over.append(path)
            else:
                entries = self._entries(path)
                self._refuse_tables(path, {entry.name for entry in entries})
                pending.extend(reversed(entries))

    def refuse_tables_above(self, files: Iterable[Entry]) -> None:
        """Refuses files that lie in a folder of a Delta, Hudi or Iceberg table, at any depth."""
        seen: set[Entry] = set()
        for file in files:
            for folder in file.parents:
                if folder in seen:
                    break
                seen.add(folder)
                self._refuse_tables(folder, {name for name in (*_TABLES, "metadata") if self.is_dir(folder / name)})

    def _refuse_tables(self, folder: Entry, names: set[str]) -> None:
        """Refuses a table whose folder keeps files of earlier versions: only its own log tells which are current."""
        kinds = [kind for name, kind in _TABLES.items() if name in names]
        if "metadata" in names and self._has_snapshots(folder / "metadata"):
            kinds.append("an Iceberg table")
        if kinds:
            raise InputError(
                f"{folder}: all files of the {self._table} are read. Received: {kinds[0]}, whose folder keeps files of "
                "earlier versions too. Write it out as Parquet, for example with Spark."
            )

    def _add(self, path: Entry) -> None:
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

    def exists(self, path: Entry) -> bool:
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

    def require_file(self, path: Entry) -> None:
        """Checks a file that the user named.

        Raises:
            InputError: the file cannot be read, or its type is not supported.
        """
        self._require_name(path)
        self._require_readable(path)
        if format_of(path) is None:
            raise InputError(
                f"{path}: each file of the {self._table} must be one of {KNOWN}. Received: another type. Convert or "
                "rename it."
            )

    def _require_name(self, path: Entry) -> None:
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{printable(str(path))}: names of files and folders must be UTF-8. Received: "
                f"{os.fsencode(str(path)[error.start : error.end])!r} in one. Rename it, or give {self._flag} a glob "
                "that leaves it out."
            ) from error

    def _require_readable(self, path: Entry) -> None:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            what = "a link to nowhere" if path.is_symlink() else error.strerror
            raise self._unreadable(path, f"{what}") from error
        if not stat.S_ISREG(mode):  # it can be read only once, or never ends
            raise self._unreadable(path, "a pipe or a device")
        if not os.access(path, os.R_OK, effective_ids=True):
            raise self._unreadable(path, "no rights to read it")

    def _is_link(self, path: Entry) -> bool:
        try:
            return path.is_symlink()
        except OSError as error:
            raise self._unreadable(path, f"{error.strerror}") from error

    def _is_there(self, path: Entry) -> bool:
        """Tells whether there is something at `path`, even a link to nowhere."""
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._unreadable(path, f"{error.strerror}") from error
        return True

    def _is_known(self, path: Entry) -> bool:
        key = self._identity(path)
        known = key in self._seen
        self._seen.add(key)
        return known

    def _entries(self, folder: Entry) -> list[Entry]:
        try:
            return sorted(folder.iterdir())
        except OSError as error:
            raise self._unreadable(folder, f"{error.strerror}") from error

    def _unreadable(self, path: Entry, received: str) -> InputError:
        return InputError(
            f"{path}: all files and folders of the {self._table} must be readable. Received: {received}. Correct that, "
            f"or give {self._flag} a glob that leaves it out."
        )

    def matches(self, base: Entry, parts: tuple[str, ...]) -> list[Entry]:
        """Returns the paths that a glob matches. Unlike Python's, it does not pass over folders that cannot be read.

        Args:
            base: the folder that the glob begins at.
            parts: the rest of the glob, a text for each folder and the last.

        Raises:
            InputError: a folder cannot be read.
        """
        return self._in_order(dict.fromkeys(self._matches(base, parts)))

    def _matches(self, base: Entry, parts: tuple[str, ...]) -> Iterator[Entry]:
        """Yields the paths that `parts` match below `base`, in any order."""
        pending = [(base, parts, _NOWHERE)]  # with the folders that `**` came through: links may form a circle
        while pending:
            base, parts, above = pending.pop()
            if not parts:
                if self._is_there(base):
                    yield base
                continue
            part, rest = parts[0], parts[1:]
            if not is_magic(part):
                pending.append((base / part, rest, above))
            elif self.is_dir(base):
                if part == "**":
                    if (key := self._identity(base)) in above:
                        continue
                    above = above | {key}
                    pending.append((base, rest, above))
                for entry in self._entries(base):
                    if part == "**":
                        if entry.name[0] != "." and self.is_dir(entry):
                            pending.append((entry, parts, above))
                    elif fnmatch.fnmatchcase(entry.name, part) and (entry.name[0] != "." or part[0] == "."):
                        pending.append((entry, rest, above))

    def _in_order(self, found: Iterable[Entry]) -> list[Entry]:
        return sorted(found, key=lambda path: (path.resolve() != path, path))  # a file's own name first

    def _identity(self, path: Entry) -> object:
        status = path.stat()
        return status.st_dev, status.st_ino

    def _has_snapshots(self, folder: Entry) -> bool:
        """Tells whether a folder `metadata` is that of an Iceberg table."""
        return any(folder.glob("*.metadata.json"))

    def is_dir(self, path: Entry) -> bool:
        """Tells whether a path is a folder that can be reached."""
        try:
            return path.is_dir()
        except OSError:  # its folder gives no rights
            return False


class RemoteSearch(Search):
    """Walks folders of a store, which one listing names.

    Args:
        flag: as of `Search`.
        table: as of `Search`.
        top: what to list: a file, or a folder and all below it.

    Raises:
        InputError: the store does not answer or refuses.
    """

    def __init__(self, flag: str, table: str, top: RemoteFile) -> None:
        super().__init__(flag, table)
        self._top, self._is_folder = top, Listing.of(top).is_folder
        self._below: dict[RemoteFile, list[RemoteFile]] = {}
        for path in sorted(self._is_folder):
            self._below.setdefault(path.parent, []).append(path)

    def exists(self, path: RemoteFile) -> bool:
        return path in self._is_folder

    _is_there = exists

    def _entries(self, folder: RemoteFile) -> list[RemoteFile]:
        return [path for path in self._below.get(folder, []) if path != folder]  # a bucket is its own parent

    def is_dir(self, path: RemoteFile) -> bool:
        if path.parts[: len(self._top.parts)] == self._top.parts:
            return self._is_folder.get(path, False)
        try:
            return Listing.of(path, recursive=False).is_folder.get(path, False)
        except Refused:  # rights may begin at the folder of the log
            return False

    def _has_snapshots(self, folder: RemoteFile) -> bool:
        return any(path.name.endswith(".metadata.json") for path in Listing.of(folder, recursive=False).is_folder)

    def _in_order(self, found: Iterable[RemoteFile]) -> list[RemoteFile]:
        return sorted(found)

    def _identity(self, path: RemoteFile) -> object:
        return path

    def _is_link(self, path: RemoteFile) -> bool:
        return False

    def _require_readable(self, path: RemoteFile) -> None:
        """Checks nothing: only reading a file of a store tells whether it may be read."""


def is_magic(part: str) -> bool:
    """Tells whether a part of a path is a glob."""
    return any(sign in part for sign in "*?[")


def fixed_parts(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the parts of a pattern before the first one with a sign of a glob."""
    return parts[: next((place for place, part in enumerate(parts) if is_magic(part)), len(parts))]
