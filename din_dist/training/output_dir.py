"""The folder that a job writes to."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from din_dist.errors import InputError


class OutputDirLock:
    """Keeps other jobs out of a folder for as long as this process is chief."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: TextIO | None = None

    def hold(self, is_chief: bool, patience_seconds: float = 0.0) -> None:
        """Claims the folder, or lets it go to another chief.

        Args:
            patience_seconds: how long another process, that was chief before, may take to let it go.

        Raises:
            InputError: as `claim_output_dir`.
        """
        if not is_chief:
            self.release()
        until = time.monotonic() + patience_seconds
        while is_chief and self._lock is None:
            try:
                self._lock = claim_output_dir(self._folder)
            except InputError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.1)

    def release(self) -> None:
        if self._lock:
            self._lock.close()
        self._lock = None


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


def to_json(values: dict[str, Any]) -> str:
    """One line of JSON, which knows no NaN: what is not finite becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(values), allow_nan=False)


def write_text_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)
