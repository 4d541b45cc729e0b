"""Explains the end of a process whose mapped file gives a disk error or is truncated.

The kernel then raises SIGBUS, which ends a process without a message. `kernels/mapped_files.cc` prints one line and
ends the process with code 2. Without our kernels the kernel's behaviour stays.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from din_dist.errors import InputError

_OFFSET, _TIME = "@the offset@", "@the time@"  # placeholders in a line for numbers that only the handler knows
_IN_LINE = {_OFFSET: b"\x01", _TIME: b"\x02"}  # placeholders in the handler's line

ErrorLine = Callable[[str], str]
_format: ErrorLine = "error: {}".format
_agent = -1


def set_end(line_of: ErrorLine, agent: int = -1) -> None:
    """Sets the form of the last line of this process, and where its exit code goes.

    Args:
        line_of: formats the line that gives the reason.
        agent: the descriptor over which the process' agent gets the exit code; -1 without an agent.
    """
    global _format, _agent
    _format, _agent = line_of, agent


def watch(mapped: np.memmap, path: Path, remedy: str) -> None:
    """Lets the process end with an explanation when a page of an array cannot be read.

    Args:
        mapped: the array that `np.load` has mapped.
        path: the array's file.
        remedy: what the user can do about a damaged file.
    """
    if not (library := _library()) or mapped._mmap is None:  # type: ignore[attr-defined]
        return
    unreadable = f"{path}: must be readable. Received: an input/output error at byte {_OFFSET}. {remedy}."
    cut = f"{path}: must stay as it is while it is in use. Received: a file that ends before byte {_OFFSET}. {remedy}."
    # The array's first byte may lie in the middle of a page of the file.
    begin = mapped.ctypes.data
    place = library.din_dist_watch_file(
        ctypes.c_void_p(begin - mapped.offset % _page_bytes()),
        ctypes.c_uint64(mapped.nbytes + mapped.offset % _page_bytes()),
        ctypes.c_int64(mapped.offset - mapped.offset % _page_bytes()),
        os.fsencode(path),
        _line(unreadable),
        _line(cut),
        _agent,
    )
    if place >= 0:
        weakref.finalize(mapped._mmap, library.din_dist_forget_file, place)  # type: ignore[attr-defined]


def _line(text: str) -> bytes:
    """Formats a line and puts the handler's placeholders into it."""
    line = re.sub(r'("time": )[0-9.]+', rf"\g<1>{_TIME}", _format(text))
    encoded = line.encode(errors="backslashreplace")
    for name, mark in _IN_LINE.items():
        encoded = encoded.replace(name.encode(), mark)
    return encoded


@functools.cache
def _library() -> Any:
    kernels = importlib.import_module("din_dist.kernels")  # late, because it imports TensorFlow
    if not kernels.PATH.exists():
        return None
    try:
        kernels.library()  # loads TensorFlow, which the library is linked to
    except InputError:  # who trains with the kernels is told so
        return None
    return ctypes.CDLL(str(kernels.PATH))


@functools.cache
def _page_bytes() -> int:
    return os.sysconf("SC_PAGESIZE")
