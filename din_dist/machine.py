"""Finds how much memory and how many threads this machine, or the container of this process, allows."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from din_dist.errors import InputError
from din_dist.files import read_text

_CGROUPS = Path("/sys/fs/cgroup")
_MANY_THREADS = 1 << 14
_THREADS, _THREADS_PER_CORE = 16, 4  # an estimate for training, which starts 22 threads on 2 cores


def memory_bytes(cgroups: Path = _CGROUPS) -> int:
    """Returns the most memory that this process may have, in bytes."""
    limits = [psutil.virtual_memory().total]
    for folder in _own_groups(cgroups):
        limits += _number(folder / "memory.max") + _number(folder / "memory.limit_in_bytes")
    return min(limits)


def free_memory_bytes(cgroups: Path = _CGROUPS) -> int:
    """Returns how much more memory this process may take now, in bytes. The kernel's inactive caches count as free."""
    free = [psutil.virtual_memory().available]
    for folder in _own_groups(cgroups):
        for most, now in zip(_number(folder / "memory.max"), _number(folder / "memory.current"), strict=False):
            free.append(most - now + _inactive_file_bytes(folder))
    return min(free)


def address_space_left() -> int:
    """Returns how many bytes the limits on this process (ulimit -v, ulimit -d) leave to it."""
    left = []
    used = psutil.Process().memory_info()
    for kind, now in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, used.data)):
        soft, _ = resource.getrlimit(kind)
        left.append(sys.maxsize if soft == resource.RLIM_INFINITY else max(0, soft - now))
    return min(left)


def threads_left(cgroups: Path = _CGROUPS) -> int | None:
    """Returns how many more threads this process may start; None where there is no limit."""
    left = []
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft < _MANY_THREADS and os.geteuid():  # counting takes a while, and the limit does not hold for root
        left.append(soft - _threads_of_user(os.getuid()))
    for folder in _own_groups(cgroups):
        for most, now in zip(_number(folder / "pids.max"), _number(folder / "pids.current"), strict=False):
            left.append(most - now)
    return min(left, default=None)


def require_threads(num_processes: int = 1, cgroups: Path = _CGROUPS) -> None:
    """Checks that `num_processes` processes with TensorFlow can run here.

    Raises:
        InputError: there is no room for their threads.
    """
    each = _THREADS + _THREADS_PER_CORE * len(os.sched_getaffinity(0)) // max(1, num_processes)
    left, wanted = threads_left(cgroups), num_processes * each
    if left is not None and left < wanted:
        raise InputError(
            f"{num_processes} process(es) with TensorFlow need {wanted} threads or more. Received: room for {left}. "
            "Raise the limit on processes (ulimit -u, --pids-limit of a container, pids of a pod), or end others."
        )


def _own_groups(cgroups: Path) -> Iterator[Path]:
    """Yields the control groups of this process and their parents, in both versions of the kernel's interface."""
    yield cgroups
    with contextlib.suppress(OSError):
        for line in read_text(Path("/proc/self/cgroup")).splitlines():
            _, controllers, path = line.split(":", 2)
            parts = Path(path.lstrip("/")).parts
            for depth in range(1, len(parts) + 1):
                yield Path(cgroups, *(controllers.split(",")[:1] if controllers else []), *parts[:depth])


def _number(path: Path) -> list[int]:
    """Returns the number in a file as a list of one; the list is empty for `max` or no file."""
    with contextlib.suppress(OSError, ValueError):
        return [int(read_text(path))]
    return []


def _inactive_file_bytes(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in read_text(folder / "memory.stat").splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0


def _threads_of_user(user: int) -> int:
    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().real == user:
                count += process.num_threads()
    return count
