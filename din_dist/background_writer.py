"""Writes to a disk in the background, so that training does not wait."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable

from din_dist import progress

_LOOK_EVERY_SECONDS = 0.2


class Writer:
    """A thread that runs jobs one after the other. Few jobs may wait, because a disk may never answer.

    Args:
        name: the thread's name.
        capacity: the most jobs at a time, including the one that runs.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self._name, self._capacity = name, capacity
        self._jobs: collections.deque[tuple[str, Callable[[], None]]] = collections.deque()
        self._changed = threading.Condition()
        self._place: progress.at | None = None
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def offer(self, what: str, job: Callable[[], None]) -> bool:
        """Takes a job and returns True, or returns False when there is no room.

        Args:
            what: what the thread does then, for `progress.at`.
            job: handles the errors that it expects. The next call of `offer` or `wait` raises any other.
        """
        self._raise_error()
        with self._changed:
            if len(self._jobs) >= self._capacity:
                return False
            self._jobs.append((what, job))
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        return True

    def wait(self, patience_seconds: float) -> bool:
        """Waits until all jobs are done and returns True, or False after `patience_seconds` without progress."""
        while True:
            self._raise_error()
            with self._changed:
                if not self._jobs:
                    return True
                self._changed.wait(_LOOK_EVERY_SECONDS)
            place = self._place
            if place and time.monotonic() - place.since > patience_seconds:
                return False

    @property
    def num_waiting(self) -> int:
        """The number of jobs that are not done, including the one that runs."""
        return len(self._jobs)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    self._changed.wait()
                what, job = self._jobs[0]
            try:
                with progress.at(what, essential=False) as self._place:
                    job()
            except Exception as error:  # raised later in the thread that offered the job
                self._error = error
            with self._changed:
                self._place = None
                self._jobs.popleft()
                self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error:
            error, self._error = self._error, None
            raise error
