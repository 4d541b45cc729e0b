"""Exports in an object store: published by their manifest, and copied to this machine before they are opened.

A store has no rename of a folder. The manifest is therefore written last, and what has none is no export. Before the
first file, the names of all files are written to `UNFINISHED`, by which the next export knows what a killed one left.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from din_dist.errors import InputError
from din_dist.files import cache_folder, is_remote, locked_in_turn, make_folder, published_folder
from din_dist.serving.manifest import (
    MANIFEST,
    MOST_BYTES,
    Manifest,
    check_digest,
    check_files,
    digest_of_file,
    parse_manifest,
    read_manifest,
)
from din_dist.tables.storage import Listing, RemoteFile, delete, download, read_all, write
from din_dist.text import parse_json

UNFINISHED = "unfinished.json"
_MANIFEST = MANIFEST.as_posix()


def check_free(folder: RemoteFile, overwrite: bool) -> None:
    """Checks that an export may be written to `folder`: nothing is there, or what a killed export left.

    Raises:
        InputError: the place is in use and may not be replaced, or the store does not answer or refuses.
    """
    names = _names(folder)
    if _MANIFEST in names and not overwrite:
        raise InputError(
            f"--export_dir: must be a new folder, or an export with --overwrite. Received: {folder}, which holds an "
            "export. Add --overwrite to replace it, or name another one."
        )
    if names and not names & {_MANIFEST, UNFINISHED}:
        raise InputError(
            f"--export_dir: must be a new folder, or an export with --overwrite. Received: {folder}, which exists "
            "and is no export. Name another one."
        )


def upload(export: Path, folder: RemoteFile) -> None:
    """Publishes a finished export in a store. What an earlier export wrote there is replaced.

    Args:
        export: the folder of the export on this machine.
        folder: its place in the store.

    Raises:
        InputError: the store does not answer or refuses. There is no export then, or still the old one.
    """
    names = sorted(path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file())
    there = _names(folder)
    old = there & {*_files_in(folder, UNFINISHED, there), *_files_in(folder, _MANIFEST, there), _MANIFEST}
    write(folder / UNFINISHED, json.dumps({"files": sorted({*names, *old})}).encode())
    if _MANIFEST in there:
        delete([folder.below(_MANIFEST)])  # before its files change
    delete(folder.below(name) for name in sorted(old - {*names, _MANIFEST}))
    for name in [*(name for name in names if name != _MANIFEST), _MANIFEST]:
        write(folder.below(name), export / name)
    with contextlib.suppress(InputError):  # beside a manifest it has no meaning
        delete([folder / UNFINISHED])


def _names(folder: RemoteFile) -> set[str]:
    """Returns the names of all files below a folder; of a file, its own."""
    found = Listing.of(folder).is_folder
    return {file.relative_to(folder).as_posix() for file, is_folder in found.items() if not is_folder}


def _files_in(folder: RemoteFile, name: str, there: set[str]) -> set[str]:
    """Returns the files that a manifest or `UNFINISHED` lists; nothing if it is not there, or damaged."""
    if name not in there:
        return set()
    try:
        return set(parse_json(read_all(folder.below(name), MOST_BYTES))["files"])
    except (ValueError, TypeError, KeyError):
        return set()


def local_export(source: str, expect_digest: str = "") -> Path:
    """Returns the folder of an export on this machine; one of a store is copied to the user's cache folder first.

    A copy is kept under its digest, and used again for as long as it is whole.

    Args:
        source: the path or the URI of the export.
        expect_digest: the SHA-256 that the manifest must have; empty: any. That of a local export is not checked here.

    Raises:
        InputError: the store has no such export, does not answer or refuses, or a file is not the published one.
    """
    if not is_remote(source):
        return Path(source)
    check_digest(expect_digest)
    folder = RemoteFile.of(source)
    path = folder.below(_MANIFEST)
    if not path.is_file():
        raise InputError(
            f"{folder}: must be an export. Received: no {MANIFEST} there. Make one by python -m din_dist.cli.export."
        )
    content = read_all(path, MOST_BYTES)
    manifest = parse_manifest(content, path, expect_digest)
    try:
        copy = cache_folder() / "exports" / manifest.digest
    except RuntimeError as error:
        raise InputError(
            f"{folder}: an export of a store is copied to the user's cache folder. Received: no home folder. Set "
            "XDG_CACHE_HOME, or HOME."
        ) from error
    with _writing(copy):
        make_folder(copy.parent)
        with locked_in_turn(copy.with_name(f"{copy.name}.lock")):  # one process of a machine copies
            if not _is_whole(copy, manifest):
                _copy(folder, manifest, content, copy)
    return copy


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    try:
        check_files(folder, read_manifest(folder, manifest.digest))
    except InputError:
        return False
    return True


def _copy(folder: RemoteFile, manifest: Manifest, content: bytes, copy: Path) -> None:
    """Copies an export, whole or not at all.

    Args:
        folder: in the store.
        manifest: of the export.
        content: of the manifest's file.
        copy: the folder on this machine.
    """
    with published_folder(copy) as new:
        for name, digest in manifest.files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            download(folder.below(name), path)
            if digest_of_file(path) != digest:
                raise InputError(
                    f"{folder.below(name)}: must be as it was published. Received: other content. Export it again."
                )
        (new / MANIFEST).parent.mkdir(exist_ok=True)
        (new / MANIFEST).write_bytes(content)


@contextlib.contextmanager
def _writing(copy: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{copy}: an export of a store is copied to this folder. Received: {error.strerror or error}. Make room or "
            "give rights there, or set XDG_CACHE_HOME."
        ) from error
