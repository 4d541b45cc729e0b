"""What an export says of itself. Nothing here needs TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from din_dist.config import require
from din_dist.errors import InputError
from din_dist.files import open_regular, read_bounded
from din_dist.text import is_count, parse_json, reason, shown

MANIFEST = Path("assets.extra") / "manifest.json"  # where TensorFlow keeps what is not its own
FORMAT_VERSION = 1
DIGEST_HELP = (
    "SHA-256 of the export's assets.extra/manifest.json: the digest that cli.export prints. Any other export is "
    "refused before it is loaded. Default: none, every export is taken."
)
_MOST_BYTES = 4 << 20  # of a manifest
_FOLDERS = ("variables", "assets", "debug")  # of a SavedModel
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("item_features", "feature_inputs", "settings", "versions", "files"), dict),
    **dict.fromkeys(("item_id_type", "flags", "data_fingerprint", "compared_split"), str),
    **dict.fromkeys(("max_history_length", "num_items", "embedding_width", "step", "num_compared"), int),
    "max_difference": (int, float),
    "summary": (dict, NoneType),
}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Beside a SavedModel; written as JSON.

    Attributes:
        item_id_type: "string" or "integer", as in the log; `item_features`: name -> type of its values, likewise.
        feature_inputs: name of an item feature -> what stands for it in the names of inputs, as in `history_NAME`.
        embedding_width: H, of `embed_items`.
        step: the update whose weights these are.
        flags: the job's settings as a flagfile; `settings`: all of them.
        summary: the job's `summary.json`; None where it was not finished.
        compared_split, num_compared, max_difference: with what the export was compared with the trainer's own logits
            before it was published, on how many examples, and the largest difference found.
        versions: what it was exported with.
        files: path -> SHA-256 of each file of the export but this one.
        digest: SHA-256 of this file, and so of all; empty until it is written.
    """

    item_id_type: str
    item_features: Mapping[str, str]
    feature_inputs: Mapping[str, str]
    max_history_length: int
    num_items: int
    embedding_width: int
    step: int
    flags: str
    settings: Mapping[str, Any]
    data_fingerprint: str
    summary: Mapping[str, Any] | None
    compared_split: str
    num_compared: int
    max_difference: float
    versions: Mapping[str, str]
    files: Mapping[str, str]
    format_version: int = FORMAT_VERSION
    digest: str = ""

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        del fields["digest"]
        return fields


def check_digest(digest: str) -> None:
    """Checks a digest that was given, before it is compared with anything.

    Raises:
        InputError: it is none.
    """
    require(
        not digest or re.fullmatch("[0-9a-fA-F]{64}", digest) is not None,
        "must be the SHA-256 of a manifest, 64 hexadecimal digits",
        "expect_digest",
        digest,
        "cli.export prints it; so does sha256sum EXPORT_DIR/assets.extra/manifest.json.",
    )


def read_manifest(folder: Path, expect_digest: str = "") -> Manifest:
    """Returns the manifest of the export in `folder`; its files are not looked at.

    Args:
        expect_digest: the manifest must have this SHA-256, if any.

    Raises:
        InputError: there is no export, or one of another version, or it is another one.
    """
    check_digest(expect_digest)
    path = folder / MANIFEST
    try:
        content = read_bounded(path, _MOST_BYTES)
        digest = hashlib.sha256(content).hexdigest()
        if expect_digest and digest != expect_digest.lower():
            raise InputError(
                f"--expect_digest: must be the SHA-256 of {path}. Received: {expect_digest}, and a manifest with "
                f"{digest}. Name the export that is meant, or its digest."
            )
        fields = parse_json(content)
        version = fields["format_version"]
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: must be an export. Received: a folder without {MANIFEST}. "
            "Make one by python -m din_dist.cli.export."
            if folder.is_dir()
            else f"{folder}: must be an export. Received: no such folder. Make one by python -m din_dist.cli.export."
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _changed(path, reason(error)) from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: must be an export of version {FORMAT_VERSION}. Received: version {shown(version)}. {_AGAIN}"
        )
    try:
        manifest = Manifest(**fields, digest=digest)
    except TypeError as error:
        raise _changed(path, reason(error)) from error
    if wrong := _wrong(manifest):
        raise _changed(path, wrong)
    return manifest


def _wrong(manifest: Manifest) -> str:
    """Returns what in a manifest cannot be; nothing where all can."""
    for name, kinds in _KINDS.items():
        if not isinstance(getattr(manifest, name), kinds):
            return f"another kind of {name}"
    for name in ("max_history_length", "num_items", "embedding_width", "step", "num_compared"):
        if not is_count(getattr(manifest, name)):
            return f"a {name} of {shown(getattr(manifest, name))}"
    for kind in (manifest.item_id_type, *manifest.item_features.values()):
        if kind not in ("string", "integer"):
            return f"ids of type {shown(kind)}"
    if manifest.feature_inputs.keys() != manifest.item_features.keys():
        return "other features among feature_inputs than among item_features"
    for name, digest in manifest.files.items():
        path = PurePosixPath(name)
        leads_out = path.is_absolute() or ".." in path.parts or name != path.as_posix() or name == "."
        if leads_out or not name.isprintable():
            return f"a file named {shown(name)}"
        if not isinstance(digest, str):
            return f"no digest of {name}"
    return ""


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares the files of an export with what was published, all that TensorFlow may read.

    Raises:
        InputError: one is missing, has changed, or was added.
    """
    for name, digest in manifest.files.items():
        path = folder / name
        try:
            found = digest_of_file(path)
        except OSError as error:
            raise _changed(path, reason(error)) from error
        if found != digest:
            raise _changed(path, "other content")
    try:
        added = next(_unlisted(folder, manifest), None)
    except OSError as error:
        raise _changed(folder, reason(error)) from error
    if added:
        raise InputError(
            f"{folder}: must have no files for TensorFlow but those that its manifest names. "
            f"Received: {shown(added)}. Remove it, or copy the export again."
        )


def _unlisted(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yields what stands beside the manifest's files where TensorFlow looks: files, and folders without any of its."""
    files = {PurePosixPath(name) for name in manifest.files}
    folders = {parent for file in files for parent in file.parents} | {PurePosixPath(name) for name in _FOLDERS}
    for inside in sorted(folders):
        if inside.parts[:1] == MANIFEST.parts[:1]:
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / inside) as entries:
            for entry in entries:
                path = inside / entry.name
                if path not in files and path not in folders and (inside.parts or _is_read(entry.name)):
                    yield str(path)


def _is_read(name: str) -> bool:
    """Tells whether TensorFlow or Keras would read a file beside the folders."""
    return name.startswith("saved_model.") or name in ("fingerprint.pb", "keras_metadata.pb")


def digest_of_file(path: Path) -> str:
    """Returns the SHA-256 of a regular file, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_AGAIN = "Copy or export it again."


def _changed(path: Path, received: str) -> InputError:
    return InputError(f"{path}: must be as it was published. Received: {received}. {_AGAIN}")
