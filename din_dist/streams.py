"""Makes standard input, output and error usable when they are closed, full, or read by nobody."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO, cast

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # the reader went away, or the terminal hung up


def open_standard_streams() -> None:
    """Makes the three streams usable. Must be called first, before other files get the streams' descriptors.

    A closed stream reads nothing and writes nowhere. Text that standard output or error does not take is dropped: a log
    that nobody reads is no reason to stop. Standard output, which is for programs, is UTF-8.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, TolerantStream):
            if isinstance(stream, io.TextIOWrapper):  # in a test it may be another class
                # Whole lines, also under PYTHONUNBUFFERED: a line of another thread, or of a process that ends, would
                # otherwise come between a line and its end.
                stream.reconfigure(line_buffering=True, write_through=False)
                if name == "stdout":
                    stream.reconfigure(encoding="utf-8", errors="backslashreplace")
            setattr(sys, name, TolerantStream(stream))


def unwritten() -> OSError | None:
    """Returns why a part of standard output is lost; None when it is complete or nobody reads it."""
    stream = sys.stdout
    if not isinstance(stream, TolerantStream):
        return None
    stream.flush()
    if stream.problem:
        stream.drop_the_rest()
    return None if stream.problem is None or stream.problem.errno in _GONE else stream.problem


class TolerantStream:
    """A text stream that notes failures to write instead of raising them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.problem: OSError | None = None  # the last failure

    def write(self, text: str) -> int:
        """Writes `text` or drops it; returns its length in both cases."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, or notes why that failed."""
        self._attempt(self._stream.flush)

    def drop_the_rest(self) -> None:
        """Redirects the stream to /dev/null, so that the interpreter's final flush does not fail."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def _attempt(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            self.problem = error
            if error.errno in _GONE:
                self.drop_the_rest()
        except ValueError:  # the stream is closed
            self.problem = OSError(errno.EBADF, os.strerror(errno.EBADF))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tolerant(stream: TextIO) -> TextIO:
    """Wraps `stream` in one that drops text that it cannot write."""
    return cast(TextIO, TolerantStream(stream))
