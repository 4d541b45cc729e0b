"""Makes manifests for tests, and checks that an export is refused whose manifest was changed.

assert_refused({**fields_of(export), "step": -1}, tmp_path, "step of -1")
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from din_dist.errors import InputError
from din_dist.serving.manifest import MANIFEST, Manifest, read_manifest


def fields_of(export: Path) -> dict[str, Any]:
    """Returns the fields of an export's manifest."""
    return json.loads((export / MANIFEST).read_text())


def assert_refused(fields: Mapping[str, Any], folder: Path, words: str) -> None:
    """Writes `fields` as the manifest of an export in `folder`, which must be refused with `words`."""
    (folder / MANIFEST).parent.mkdir()
    (folder / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(InputError, match="must be as it was published") as caught:
        read_manifest(folder)
    assert words in str(caught.value)


def write_manifest(folder: Path, **changes: Any) -> None:
    """Writes the manifest of an export whose files lie in `folder`, with `changes`."""
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST]
    fields: dict[str, Any] = {
        "item_id_type": "string",
        "item_features": {"category_id": "string"},
        "feature_inputs": {"category_id": "category_id"},
        "max_history_length": 10,
        "num_items": 2,
        "embedding_width": 1,
        "step": 7,
        "flags": "",
        "settings": {},
        "data_fingerprint": "",
        "summary": None,
        "compared_split": "test",
        "num_compared": 1,
        "max_difference": 0,
        "versions": {},
        "files": {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "format_version": 1,
    }
    (folder / MANIFEST).parent.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(fields | changes))


def manifest(**fields: Any) -> Manifest:
    """Returns a manifest with nothing in it but `fields`."""
    nothing: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Manifest)), "")
    empty: dict[str, Any] = {"calibration": None, "tasks": (), "retriever": None, "index": None, "finds_items": False}
    return Manifest(**(nothing | empty | fields))
