"""What this process is at, so that somebody notices when a disk does not answer.

Who reads or writes says so: `with at("saving a checkpoint"):`, and `note()` for each part that is done. A `Watch` in
another thread finds out when nothing goes on there. What waits for other ranks says nothing: it is they who are stuck.
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

PATIENCE_SECONDS = 60.0  # with a disk, where no launcher names another
_STUCK_AFTER_STOP_SECONDS = 10.0  # platforms kill some 30 s after their signal: the others may still save
_QUIET_AFTER_STOP_SECONDS = 20.0
_OVERSLEPT_SECONDS = 5.0  # between two looks: the whole process was stopped, as in a paused container
_BUSY = 0.1  # of a core: who computes is not stuck; threads that only wait take a hundredth

_places: dict[int, at] = {}  # by thread
_noted = time.monotonic()
_pollers: set[int] = set()  # threads that are busy while they wait
_TICKS = os.sysconf("SC_CLK_TCK")


class at:
    """Says for a block what this thread is at, with a disk or what comes from it.

    Args:
        what: completes "it is stuck ...".
        essential: training waits for it. Without, a stuck one is only told.
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
    """Notes that something was done: an update, a batch, a part of a file."""
    global _noted
    _noted = time.monotonic()
    if place := _places.get(threading.get_ident()):
        place.since = _noted


def each(values: Iterable[Value], what: str) -> Iterator[Value]:
    """Yields what an iterable gives; this thread is at `what` while it waits for the next."""
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
    """Takes the threads that the block starts for ones that are busy while they wait: their work is no sign of life."""
    before = _threads()
    yield
    _pollers.update(_threads() - before)


@dataclasses.dataclass(frozen=True)
class Stuck:
    """Something that does not go on; `what` is empty where it is not known what the process waits for."""

    what: str
    seconds: float
    essential: bool


class Watch:
    """Looks each second or so at what the process is at."""

    def __init__(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._patience_seconds = patience_seconds
        self._stopping_since: float | None = None
        self._looked, self._seen = time.monotonic(), _signs()
        self._alive = self._looked  # when the disk or a core was last seen at work
        self._woke = self._looked

    def stop(self) -> None:
        """Notes that the process was asked to end: from now on it has less time."""
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()

    def stuck(self) -> list[Stuck]:
        """Returns what is stuck for too long; what is essential comes first."""
        now, signs = time.monotonic(), _signs()
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
class _Signs:
    cpu_seconds: float
    reads: int  # from disks: pages of mapped files, and blocks


def _signs() -> _Signs:
    used = resource.getrusage(resource.RUSAGE_SELF)
    polling = 0.0
    for thread in list(_pollers):
        try:
            fields = Path(f"/proc/self/task/{thread}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            polling += (int(fields[11]) + int(fields[12])) / _TICKS
        except OSError:  # it has ended, and what it took counts for the others from now on
            _pollers.discard(thread)
    return _Signs(used.ru_utime + used.ru_stime - polling, used.ru_majflt + used.ru_inblock)


def _threads() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}
