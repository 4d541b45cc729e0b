"""Chooses the export to serve among several versions."""

from __future__ import annotations

from pathlib import Path

from din_dist.serving.manifest import MANIFEST


def find_export(folder: Path) -> tuple[Path, int | None]:
    """Returns the export in `folder`, or the one with the highest number inside it, and its number, if it has one."""
    if not (folder / MANIFEST).is_file():
        numbered = [path for path in folder.glob("*") if path.name.isdecimal() and (path / MANIFEST).is_file()]
        if numbered:
            folder = max(numbered, key=lambda path: int(path.name))
    name = folder.resolve().name
    return folder, int(name) if name.isdecimal() else None
