"""Chooses the export to serve among several versions, and finds newer ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from din_dist.errors import InputError
from din_dist.serving.http.served import Served
from din_dist.serving.manifest import MANIFEST, read_manifest
from din_dist.tables.storage import File, Listing, RemoteFile, file_of

_Files = tuple[Any, ...]  # changes when an export does; empty: there is none


@dataclasses.dataclass(frozen=True)
class Version:
    """An export, on this machine or in a store, and its number, if its folder has one."""

    folder: File
    number: int | None

    @property
    def source(self) -> str:
        """The path or the URI of the folder."""
        return self.folder.uri if isinstance(self.folder, RemoteFile) else str(self.folder)


class RefusedVersion(Exception):
    """A version cannot be served. The text says which and why."""


def found_versions(source: str) -> list[Version]:
    """Returns the exports among the numbered folders in a folder, the highest number first.

    Without any, or if the folder itself is an export, it returns that folder alone.

    Args:
        source: the path or the URI of the folder.

    Raises:
        InputError: the store does not answer or refuses.
    """
    folder = file_of(source)
    if not _is_export(folder):
        numbered = [place for place in _inside(folder) if place.name.isdecimal() and _is_export(place)]
        if numbered:
            found = [Version(place, int(place.name)) for place in numbered]
            return sorted(found, key=lambda version: version.number or 0, reverse=True)
    name = folder.name if isinstance(folder, RemoteFile) else folder.resolve().name
    return [Version(folder, int(name) if name.isdecimal() else None)]


def _inside(folder: File) -> list[File]:
    if isinstance(folder, RemoteFile):
        is_folder = Listing.of(folder, recursive=False).is_folder
        return [place for place in is_folder if is_folder[place] and place != folder]
    return list(folder.glob("*"))


def _is_export(folder: File) -> bool:
    return _manifest(folder).is_file()


def _manifest(folder: File) -> File:
    return folder.below(MANIFEST.as_posix()) if isinstance(folder, RemoteFile) else folder / MANIFEST


class NewerVersions:
    """Finds the version to serve in place of the one that is served.

    - A version is opened when its files are the same at two looks, so that a copy which is still being written is left
      alone. One that cannot be opened is tried again when its files change.
    - The highest version that can be opened is served. A lower one follows only if the served one is removed.
    - If the folder of the served version gets another export (or is a link that moves), that is served.

    Args:
        source: the path or the URI of an export, or of a folder with a numbered folder for each version.
        open_version: loads a version.
        first: the version to begin with.
    """

    def __init__(self, source: str, open_version: Callable[[Version], Served], first: Version) -> None:
        self._source, self._open = source, open_version
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
        for version in found_versions(self._source):
            files = _files(version.folder)
            if not files:
                continue
            self._known[version.folder] = files
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


def _files(folder: File) -> _Files:
    """Returns what changes when the export in `folder` does; empty if there is none.

    Of a store the manifest is enough, because it is written last.
    """
    if isinstance(folder, RemoteFile):
        manifest = _manifest(folder)
        assert isinstance(manifest, RemoteFile)
        return (manifest.stat(),) if manifest.is_file() else ()
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        found = [(path, path.stat()) for path in paths]
    except OSError:  # one disappears meanwhile
        return ()
    if folder / MANIFEST not in paths:
        return ()
    return tuple((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found)


def _digest(folder: File) -> str:
    """Returns the digest of an export; of one that is in a store, or damaged, an empty text."""
    try:
        return "" if isinstance(folder, RemoteFile) else read_manifest(folder).digest
    except InputError:
        return ""
