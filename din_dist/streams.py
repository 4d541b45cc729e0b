"""Standard input, output and error, as commands find them: closed, full, or with nobody who reads them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO, cast

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # a reader that went away, a terminal that hung up


def open_standard_streams() -> None:
    """Makes the three streams usable; to be called first, before other files get their descriptors.

    A closed one reads nothing and writes nowhere. What cannot be written to standard output or error is dropped: a log
    that nobody reads is no reason to stop. Text is UTF-8 on standard output, which is for programs.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, TolerantStream):
            if name == "stdout" and isinstance(stream, io.TextIOWrapper):  # a test's may be another
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
            setattr(sys, name, TolerantStream(stream))


def unwritten() -> OSError | None:
    """Returns why standard output could not take all that was printed; None where it did, or nobody wanted it."""
    stream = sys.stdout
    if not isinstance(stream, TolerantStream):
        return None
    stream.flush()
    if stream.problem:
        stream.drop_the_rest()
    return None if stream.problem is None or stream.problem.errno in _GONE else stream.problem


class TolerantStream:
    """A text stream whose failures to write are noted, not raised."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.problem: OSError | None = None  # the last one

    def write(self, text: str) -> int:
        """Writes `text`, or drops it; always says that all of it was written."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Hands over what was written so far."""
        self._attempt(self._stream.flush)

    def drop_the_rest(self) -> None:
        """Leads the stream to nowhere, so that the interpreter's own flush at the end does not fail."""
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
        except ValueError:  # it was closed
            self.problem = OSError(errno.EBADF, os.strerror(errno.EBADF))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tolerant(stream: TextIO) -> TextIO:
    """Returns `stream` as one that drops what it cannot write."""
    return cast(TextIO, TolerantStream(stream))
