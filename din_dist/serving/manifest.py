"""What an export says of itself. Nothing here needs TensorFlow."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from din_dist.errors import InputError

MANIFEST = Path("assets.extra") / "manifest.json"  # where TensorFlow keeps what is not its own
FORMAT_VERSION = 1


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


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the export in `folder`; its files are not looked at.

    Raises:
        InputError: there is no export, or one of another version.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        fields = json.loads(content)
        version = fields["format_version"]
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: must be an export. Received: a folder without {MANIFEST}. "
            "Make one by python -m din_dist.cli.export."
            if folder.is_dir()
            else f"{folder}: must be an export. Received: no such folder. Make one by python -m din_dist.cli.export."
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: must be as it was published. Received: {_reason(error)}. {_AGAIN}") from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: must be an export of version {FORMAT_VERSION}. Received: version {version!r}. {_AGAIN}"
        )
    try:
        return Manifest(**fields, digest=hashlib.sha256(content).hexdigest())
    except TypeError as error:
        raise InputError(f"{path}: must be as it was published. Received: {_reason(error)}. {_AGAIN}") from error


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares the files of an export with what was published.

    Raises:
        InputError: one is missing or has changed.
    """
    for name, digest in manifest.files.items():
        path = folder / name
        try:
            found = digest_of_file(path)
        except OSError as error:
            raise InputError(f"{path}: must be as it was published. Received: {_reason(error)}. {_AGAIN}") from error
        if found != digest:
            raise InputError(f"{path}: must be as it was published. Received: other content. {_AGAIN}")


def digest_of_file(path: Path) -> str:
    """SHA-256, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_AGAIN = "Copy or export it again."


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
