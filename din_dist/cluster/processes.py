"""What the launcher and its agents both need of child processes."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # opened here: little is safe between fork and exec


def die_with_parent() -> None:
    """For `preexec_fn`: the child is killed when the thread that started it ends, for whatever reason."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def exit_code(returncode: int) -> int:
    """Of `Popen.returncode`, as shells have it: 128 and the number of the signal that ended the process."""
    return returncode if returncode >= 0 else 128 - returncode
