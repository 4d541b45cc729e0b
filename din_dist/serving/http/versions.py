"""Chooses the export to serve among several versions, and finds newer ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from din_dist.errors import InputError
from din_dist.serving.http.served import Served
from din_dist.serving.manifest import MANIFEST, read_manifest

_Files = tuple[tuple[str, int, int, int], ...]  # path, bytes, time of the last change in nanoseconds, inode


@dataclasses.dataclass(frozen=True)
class Version:
    """An export and its number, if its folder has one."""

    folder: Path
    number: int | None


class RefusedVersion(Exception):
    """A version cannot be served. The text says which and why."""


def found_versions(folder: Path) -> list[Version]:
    """Returns the exports among the numbered folders in `folder`, the highest number first.

    Without any, or if `folder` itself is an export, it returns `folder` alone.
    """
    if not (folder / MANIFEST).is_file():
        numbered = [path for path in folder.glob("*") if path.name.isdecimal() and (path / MANIFEST).is_file()]
        if numbered:
            found = [Version(path, int(path.name)) for path in numbered]
            return sorted(found, key=lambda version: version.number or 0, reverse=True)
    name = folder.resolve().name
    return [Version(folder, int(name) if name.isdecimal() else None)]


class NewerVersions:
    """Finds the version to serve in place of the one that is served.

    - A version is opened when its files are the same at two looks, so that a copy which is still being written is left
      alone. One that cannot be opened is tried again when its files change.
    - The highest version that can be opened is served. A lower one follows only if the served one is removed.
    - If the folder of the served version gets another export (or is a link that moves), that is served.

    Args:
        folder: an export, or a folder with a numbered folder for each version.
        open_version: loads a version.
        first: the version to begin with.
    """

    def __init__(self, folder: Path, open_version: Callable[[Version], Served], first: Version) -> None:
        self._folder, self._open = folder, open_version
        self._served, self._digest = first, ""
        self._known = {first.folder: _files(first.folder)}  # of the versions at the last look
        self._opened = dict(self._known)  # of the versions that were opened, or refused

    def open_first(self) -> Served:
        """Opens the version to begin with.

        Raises:
            InputError: it cannot be opened.
        """
        served = self._open(self._served)
        self._digest = served.description["digest"]
        return served

    def look(self) -> Served | None:
        """Looks once, and opens the version to serve from now on; None: the one that is served stays.

        Raises:
            RefusedVersion: a version cannot be opened. The next look goes on with the others.
        """
        known, self._known = self._known, {}
        for version in found_versions(self._folder):
            if not (version.folder / MANIFEST).is_file():
                continue
            files = self._known[version.folder] = _files(version.folder)
            is_served = version.folder == self._served.folder
            if self._opened.get(version.folder) != files and known.get(version.folder) == files:
                self._opened[version.folder] = files
                if not (is_served and _digest(version.folder) == self._digest):
                    return self._open_now(version)
            if is_served:
                return None
        return None

    def _open_now(self, version: Version) -> Served:
        try:
            served = self._open(version)
        except Exception as error:  # of any kind: what is served goes on
            text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise RefusedVersion(f"{version.folder} is not served: {text}") from error
        if version.folder != self._served.folder:
            del self._opened[self._served.folder]  # so that it follows if this one is removed
        self._served, self._digest = version, served.description["digest"]
        return served


def _files(folder: Path) -> _Files:
    """Returns what changes when a file in `folder` does; empty if a file disappears meanwhile."""
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        found = [(path, path.stat()) for path in paths]
    except OSError:
        return ()
    return tuple((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found)


def _digest(folder: Path) -> str:
    try:
        return read_manifest(folder).digest
    except InputError:
        return ""
