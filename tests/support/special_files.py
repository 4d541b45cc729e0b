"""What may stand in the place of a file: opening a pipe waits for ever, and a device has no end."""

from __future__ import annotations

import os
from pathlib import Path

KINDS = ("pipe", "device", "folder", "dangling", "circle")


def put(kind: str, path: Path) -> None:
    """Puts something that is no regular file in the place of the file at `path`, if there is one."""
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
