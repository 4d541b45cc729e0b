"""Goes on when workers come and go. What must be the same on all of them then is the business of who is run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from din_dist.distributed.runtime import Runtime

Result = TypeVar("Result")


class WorkersChanged(Exception):
    """Raised by every rank that stays, at the same place: ranks are to be taken in or let go."""


def run_elastic(
    runtime: Runtime,
    body: Callable[[], Result],
    say: Callable[[str], None],
    give_up: Callable[[], None],
    patience_seconds: float,
) -> Result:
    """What `body` returns, which is called again with the new ranks whenever the set of them changes.

    It begins by agreeing on where the job stands. Where the set cannot change, it is called once.

    Args:
        give_up: ends this process when there are not enough ranks for `patience_seconds`; called in another thread,
            while this one waits for them.
    """
    while True:
        try:
            return body()
        except Exception as error:
            lost = runtime.lost_a_peer(error)
            if not runtime.elastic or not (lost or isinstance(error, WorkersChanged)):
                raise
        say("a worker was lost: going on without it" if lost else "workers come or go")
        waiting = threading.Timer(patience_seconds, give_up)
        waiting.daemon = True
        waiting.start()
        try:
            runtime.reset()
        finally:
            waiting.cancel()
