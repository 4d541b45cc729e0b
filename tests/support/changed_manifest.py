"""Makes manifests for tests, and checks that an export is refused whose manifest was changed.

assert_refused({**fields_of(export), "step": -1}, tmp_path, "step of -1")
"""

from __future__ import annotations

import dataclasses
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


def manifest(**fields: Any) -> Manifest:
    """Returns a manifest with nothing in it but `fields`."""
    nothing: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Manifest)), "")
    empty: dict[str, Any] = {"calibration": None, "tasks": (), "retriever": None, "index": None, "finds_items": False}
    return Manifest(**(nothing | empty | fields))
