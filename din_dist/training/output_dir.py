"""The folder that a job writes to."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TextIO

from din_dist import progress
from din_dist.errors import InputError
from din_dist.files import make_folder, take_lock


class OutputDirLock:
    """Keeps other jobs out of a folder for as long as this process is chief."""

    def __init__(self, folder: Path, job_id: str = "") -> None:
        self._folder, self._job_id = folder, job_id
        self._lock: TextIO | None = None

    def hold(self, is_chief: bool) -> None:
        """Claims the folder, or lets it go to another chief.

        Raises:
            InputError: as `claim_output_dir`.
        """
        if not is_chief:
            self.release()
        elif self._lock is None:
            with progress.at(f"locking {self._folder}"):
                self._lock = claim_output_dir(self._folder, self._job_id)

    def hold_if_free(self) -> bool:
        """Claims the folder unless another process is chief, even one of the same job. Tells whether it is ours."""
        if self._lock is None:
            with contextlib.suppress(InputError):
                self._lock = claim_output_dir(self._folder)
        return self._lock is not None

    def release(self) -> None:
        if self._lock:
            self._lock.close()
        self._lock = None


def claim_output_dir(folder: Path, job_id: str = "", name: str = ".lock", flag: str = "--output_dir") -> TextIO:
    """Makes the folder and keeps other jobs out of it for as long as the result is open: this process' life at most.

    Args:
        job_id: of a job with several processes: from another of them the folder is taken over. That one was chief
            before and is lost, but may live on, as on a host that hangs.
        flag: what `folder` was given by.

    Raises:
        InputError: another job is at work in it, or it cannot be written.
    """
    try:
        make_folder(folder)
        return take_lock(folder / name, job_id)
    except BlockingIOError as error:
        raise InputError(
            f"{flag}: one job at a time. Received: {folder}, where another one is at work. "
            "Wait for its end, stop it, or name another folder."
        ) from error
    except OSError as error:
        raise InputError(
            f"{flag}: must be a folder that can be written. Received: {folder}, {error.strerror}. Name another one."
        ) from error
