"""Goes on when workers come and go. What must be the same on all of them then is the business of who is run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from din_dist.distributed.runtime import Runtime, raise_lost_peer
from din_dist.errors import Left, LostPeer

Result = TypeVar("Result")

_LOOK_EVERY_SECONDS = 0.5
_MOST_FAILURES_IN_A_ROW = 10  # each within `_AT_ONCE_SECONDS` of joining: these workers do not fit together
_AT_ONCE_SECONDS = 2.0


class WorkersChanged(Exception):
    """Raised by every rank that stays, at the same place: ranks are to be taken in or let go."""


class Waiting(Protocol):
    """The work of another thread while this rank waits for the others."""

    patience_seconds: float

    def stop_requested(self) -> bool:
        """Tells whether somebody wants the job to stop. The waiting thread gets no signals."""

    def give_up(self, waited_seconds: float) -> None:
        """Keeps what was learned and ends this process."""

    def keep(self) -> str | None:
        """Keeps what was learned if no chief is left to do so; returns what to tell of it."""


def run_elastic(runtime: Runtime, body: Callable[[], Result], say: Callable[[str], None], waiting: Waiting) -> Result:
    """Returns what `body` returns. `body` is called again whenever the set of ranks changes.

    It begins by agreeing on where the job stands. Where the set cannot change, it is called once.
    """
    failures_in_a_row = 0
    while True:
        started = time.monotonic()
        try:
            with raise_lost_peer():
                return body()
        except (LostPeer, WorkersChanged) as error:
            failures_in_a_row = failures_in_a_row + 1 if time.monotonic() - started < _AT_ONCE_SECONDS else 0
            if not runtime.elastic or failures_in_a_row > _MOST_FAILURES_IN_A_ROW:
                raise
            say("a worker was lost: going on without it" if isinstance(error, LostPeer) else "workers come or go")
        joined = threading.Event()
        watch = threading.Thread(target=_watch, args=(joined, waiting), daemon=True)
        watch.start()
        try:
            runtime.reset()
        except Left as left:
            # The others may all be lost: then only this rank knows what was learned since the last checkpoint.
            kept = waiting.keep()
            raise Left(str(left), kept) if kept else left from None
        finally:
            joined.set()
            watch.join()


def _watch(joined: threading.Event, waiting: Waiting) -> None:
    started = time.monotonic()
    while not joined.wait(_LOOK_EVERY_SECONDS):
        waited = time.monotonic() - started
        if waited >= waiting.patience_seconds or waiting.stop_requested():
            waiting.give_up(waited)
