"""Chooses the export to serve among several versions."""

from __future__ import annotations

from pathlib import Path

from din_dist.files import is_remote
from din_dist.serving.manifest import MANIFEST
from din_dist.serving.store_exports import local_export
from din_dist.tables.storage import Listing, RemoteFile


def find_export(source: str, expect_digest: str = "") -> tuple[Path, int | None]:
    """Returns the export to serve, on this machine, and its number, if it has one.

    Args:
        source: the path or the URI of an export, or of a folder with numbered ones, of which the highest is taken.
        expect_digest: the SHA-256 that the manifest of an export in a store must have; empty: any.

    Raises:
        InputError: see `local_export`.
    """
    if is_remote(source):
        found = _highest(RemoteFile.of(source))
        return local_export(found.uri, expect_digest), int(found.name) if found.name.isdecimal() else None
    folder = Path(source)
    if not (folder / MANIFEST).is_file():
        numbered = [path for path in folder.glob("*") if path.name.isdecimal() and (path / MANIFEST).is_file()]
        if numbered:
            folder = max(numbered, key=lambda path: int(path.name))
    name = folder.resolve().name
    return folder, int(name) if name.isdecimal() else None


def _highest(folder: RemoteFile) -> RemoteFile:
    """Returns the export in a folder of a store, or the highest numbered one inside it; otherwise the folder."""
    manifest = MANIFEST.as_posix()
    if folder.below(manifest).is_file():
        return folder
    inside = Listing.of(folder, recursive=False).is_folder
    numbered = [
        place for place, is_folder in inside.items() if is_folder and place.name.isdecimal() and place != folder
    ]
    for place in sorted(numbered, key=lambda place: int(place.name), reverse=True):
        if place.below(manifest).is_file():
            return place
    return folder
