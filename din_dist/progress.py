"""Records what this process does with disks, to notice a disk that does not answer.

Code that reads or writes does so in `with at("saving a checkpoint"):` and calls `note()` after each part. A `Watch` in
another thread notices when nothing happens there. Code that waits for other ranks does not record that, because it is
the others who are stuck.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

Value = TypeVar("Value")

PATIENCE_SECONDS = 60.0  # for a disk to answer, unless a launcher sets another time
_STUCK_AFTER_STOP_SECONDS = 10.0  # platforms kill about 30 s after their signal, and other ranks must save before
_QUIET_AFTER_STOP_SECONDS = 20.0
_OVERSLEPT_SECONDS = 5.0  # between two looks: the whole process was paused, for example with its container
_BUSY = 0.1  # cores; a process that computes is not stuck, and threads that only wait use about 0.01

_places: dict[int, at] = {}  # thread -> its innermost block
_noted = time.monotonic()
polling_threads: set[int] = set()  # threads that are busy while they wait
_TICKS = os.sysconf("SC_CLK_TCK")


class at:
    """Names what this thread does with a disk, or with data from it, in a `with` block.

    Args:
        what: completes "rank 0 was ...", for example "saving a checkpoint".
        essential: training waits for the block. If a block that is not essential is stuck, that is only logged.
    """

    __slots__ = ("_before", "_thread", "essential", "since", "what")

    def __init__(self, what: str, *, essential: bool = True) -> None:
        self.what, self.essential = what, essential

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        self.since = time.monotonic()
        self._before = _places.get(self._thread)
        _places[self._thread] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        note()
        if self._before is None:
            del _places[self._thread]
        else:
            self._before.since = time.monotonic()
            _places[self._thread] = self._before


def note() -> None:
    """Notes progress: an update, a batch or a part of a file is done."""
    global _noted
    _noted = time.monotonic()
    if place := _places.get(threading.get_ident()):
        place.since = _noted


def each(values: Iterable[Value], what: str) -> Iterator[Value]:
    """Yields the values of an iterable; this thread is `at(what)` while it waits for the next."""
    values = iter(values)
    while True:
        with at(what):
            try:
                value = next(values)
            except StopIteration:
                return
        yield value


@contextlib.contextmanager
def pollers() -> Iterator[None]:
    """Marks the threads that the block starts as busy while they wait: their CPU time is no sign of life."""
    before = _threads()
    yield
    polling_threads.update(_threads() - before)


@dataclasses.dataclass(frozen=True)
class Stuck:
    """A block without progress; `what` is empty when the process waits for something unknown."""

    what: str
    seconds: float
    essential: bool


class Watch:
    """Finds stuck blocks; meant to be asked about once a second."""

    def __init__(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._patience_seconds = patience_seconds
        self._stopping_since: float | None = None
        self._looked, self._seen = time.monotonic(), signs_of_life()
        self._alive = self._looked  # when a disk or a core was last seen at work
        self._woke = self._looked

    def stop(self) -> None:
        """Notes that the process was asked to end, which shortens the time that a block may take."""
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()

    def stuck(self) -> list[Stuck]:
        """Returns the blocks that are stuck for too long, essential ones first."""
        now, signs = time.monotonic(), signs_of_life()
        busy = signs.cpu_seconds - self._seen.cpu_seconds > _BUSY * (now - self._looked)
        if busy or signs.reads != self._seen.reads:
            self._alive = now
        if now - self._looked > _OVERSLEPT_SECONDS:
            self._alive = self._woke = now
        self._looked, self._seen = now, signs
        stopping_since, patience = self._stopping_since, self._patience_seconds
        found = []
        for place in list(_places.values()):
            last = max(place.since, _noted, self._alive) if place.essential else max(place.since, self._woke)
            seconds = now - last
            asked = None if stopping_since is None else now - max(last, stopping_since)
            if seconds >= patience or (asked is not None and asked >= min(patience, _STUCK_AFTER_STOP_SECONDS)):
                found.append(Stuck(place.what, seconds, place.essential))
        if stopping_since is not None and now - max(_noted, stopping_since) >= _QUIET_AFTER_STOP_SECONDS:
            found.append(Stuck("", now - _noted, essential=True))
        return sorted(found, key=lambda stuck: not stuck.essential)


@dataclasses.dataclass(frozen=True)
class SignsOfLife:
    """The resources that the process has used so far; only one that works uses more."""

    cpu_seconds: float
    reads: int  # from disks: pages of mapped files plus blocks


def signs_of_life() -> SignsOfLife:
    """Returns the signs of life of this process, without the CPU time of `polling_threads`."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    polling = 0.0
    for thread in list(polling_threads):
        try:
            fields = Path(f"/proc/self/task/{thread}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            polling += (int(fields[11]) + int(fields[12])) / _TICKS
        except OSError:  # it has ended; from now on its time counts with that of the others
            polling_threads.discard(thread)
    return SignsOfLife(used.ru_utime + used.ru_stime - polling, used.ru_majflt + used.ru_inblock)


def _threads() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}
