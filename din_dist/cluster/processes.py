"""Helpers for the child processes of the launcher and its agents."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here, because little is safe between fork and exec


def die_with_parent() -> None:
    """Lets the kernel kill this child when the thread that started it ends; for `preexec_fn`."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_with_parent() -> None:
    """Lets the kernel send this child SIGTERM when the thread that started it ends; for `preexec_fn`."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def exit_code(returncode: int) -> int:
    """Converts `Popen.returncode` to a shell's exit code: 128 plus the number of the signal that ended the process."""
    return returncode if returncode >= 0 else 128 - returncode
