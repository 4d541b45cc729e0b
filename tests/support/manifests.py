"""Writes the manifest of something that looks like an export."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from din_dist.serving.manifest import MANIFEST


def write_manifest(folder: Path, **changes: Any) -> None:
    """Describes all files of `folder`; `changes` are fields of the manifest."""
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
