"""The folder that a job writes to."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TextIO

from din_dist.errors import InputError


def claim_output_dir(folder: Path) -> TextIO:
    """Makes the folder and keeps other jobs out of it for as long as the result is open: this process' life at most.

    Raises:
        InputError: another job is at work in it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise InputError(
            f"--output_dir: must be a folder that can be written. Received: {folder}, {error.strerror}. "
            "Name another one."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise InputError(
            f"--output_dir: one job at a time. Received: {folder}, where another one is at work. "
            "Wait for its end, stop it, or name another folder."
        ) from error
    return lock
