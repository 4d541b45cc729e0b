"""Puts in the place of a file what is no regular file: opening a pipe blocks for ever, and a device has no end.

@pytest.mark.parametrize("kind", special_files.KINDS)
def test_what_is_no_record(kind, tmp_path):
    special_files.put(kind, tmp_path / "record")
"""

from __future__ import annotations

import os
from pathlib import Path

KINDS = ("pipe", "device", "folder", "dangling", "circle")


def put(kind: str, path: Path) -> None:
    """Makes something of this kind at `path`, and removes the file that is there, if any."""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "dangling":
            path.symlink_to(path.with_name("nowhere"))
        case "circle":
            path.symlink_to(path)
        case _:
            raise ValueError(kind)
