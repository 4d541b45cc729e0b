"""Replaces the served version by a newer one while requests are answered."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator

from din_dist.serving.http.metrics import ServingMetrics
from din_dist.serving.http.served import Served
from din_dist.serving.http.versions import NewerVersions, RefusedVersion
from din_dist.text import printable_line

_SWITCH_SECONDS = 0.001  # how long the thread that opens a version may keep the event loop waiting
_LEFT_SECONDS = 0.05  # between two looks for requests to the version before
_MOST_LOGGED = 1000  # characters of why a version is refused

Replace = Callable[[Served], weakref.ref[Served]]


class Reloader:
    """A thread that looks for newer versions, opens them, and has them served.

    The thread is a daemon: while TensorFlow loads an export, nothing can end it.

    Args:
        newer: finds and opens them.
        interval_seconds: between two looks; 0: never.
        metrics: to update.
        say: logs a line for operators.
    """

    def __init__(
        self, newer: NewerVersions, interval_seconds: float, metrics: ServingMetrics, say: Callable[[str], None]
    ) -> None:
        self._newer, self._interval, self._metrics, self._say = newer, interval_seconds, metrics, say
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, replace: Replace) -> None:
        """Begins to look.

        Args:
            replace: serves a version; called in the running event loop.
        """
        if self._interval:
            words = (asyncio.get_running_loop(), replace)
            self._thread = threading.Thread(target=self._run, args=words, name="reload", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Asks the thread to end."""
        self._stop.set()

    def has_ended(self) -> bool:
        """Tells whether the thread has ended; it does so at once, unless it opens a version."""
        if self._thread:
            self._thread.join(1.0)
        return not (self._thread and self._thread.is_alive())

    def _run(self, loop: asyncio.AbstractEventLoop, replace: Replace) -> None:
        failure = ""
        while not self._stop.wait(self._interval):
            try:
                with _short_turns():
                    served = self._newer.look()
            except RefusedVersion as refusal:
                self._metrics.reloads.labels("refused").inc()
                self._log(str(refusal))
                continue
            except Exception as error:
                text = f"looking for versions failed: {type(error).__name__}: {error}"
                if text != failure:  # once, not at every look
                    self._log(text)
                failure = text
                continue
            failure = ""
            if served is None or self._stop.is_set():
                continue
            version = served.version
            former = _in_loop(loop, replace, served)
            del served
            if former is None:
                return
            self._metrics.reloads.labels("served").inc()
            self._say(f"version {version} is served")
            self._free(former)

    def _log(self, text: str) -> None:
        self._say(printable_line(text)[:_MOST_LOGGED])

    def _free(self, former: weakref.ref[Served]) -> None:
        """Waits until no request has the version before, and frees its memory, so that at most two are held."""
        while former() is not None and not self._stop.wait(_LEFT_SECONDS):
            pass
        gc.collect()  # TensorFlow's objects refer to each other


def _in_loop(loop: asyncio.AbstractEventLoop, replace: Replace, served: Served) -> weakref.ref[Served] | None:
    """Calls `replace` in the event loop; returns None if that has ended."""
    done = threading.Event()
    found: list[weakref.ref[Served]] = []

    def call() -> None:
        found.append(replace(served))
        done.set()

    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
        while not done.wait(_LEFT_SECONDS):
            if loop.is_closed():
                return None
        return found[0]
    return None


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """Lets other threads have the interpreter more often: loading keeps it for as long as it may."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
