"""The folder that a job writes to."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TextIO

from din_dist import progress
from din_dist.errors import InputError
from din_dist.files import make_folder


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
    path = folder / name
    try:
        make_folder(folder)
        while True:
            lock = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read()
                lock.close()
                if not job_id or holder != job_id:
                    raise
                return _take_over(path, job_id)
            if _is_at(lock, path):
                return _note_holder(lock, job_id)
            lock.close()  # another one took it over meanwhile: what this one has locked is no longer there
    except BlockingIOError as error:
        raise InputError(
            f"{flag}: one job at a time. Received: {folder}, where another one is at work. "
            "Wait for its end, stop it, or name another folder."
        ) from error
    except OSError as error:
        raise InputError(
            f"{flag}: must be a folder that can be written. Received: {folder}, {error.strerror}. Name another one."
        ) from error


def _take_over(path: Path, job_id: str) -> TextIO:
    """Another file in the place of the one that is locked."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    lock = aside.open("a+", encoding="utf-8")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    aside.replace(path)
    return _note_holder(lock, job_id)


def _note_holder(lock: TextIO, job_id: str) -> TextIO:
    with contextlib.suppress(OSError):  # a full disk: then nobody can take it over
        lock.truncate(0)
        lock.write(job_id)
        lock.flush()
    return lock


def _is_at(lock: TextIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    return False
