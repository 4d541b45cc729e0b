"""Limits of memory, processes and threads, as a container or a user has them."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from din_dist import machine
from din_dist.errors import InputError
from din_dist.machine import free_memory_bytes, memory_bytes, require_threads, threads_left

Limit = Callable[..., Path]


@pytest.fixture
def limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Writes files of the control groups, of which this process is in the one called `job`."""
    (tmp_path / "job").mkdir()
    monkeypatch.setattr(
        machine, "read_text", lambda path: "0::/job\n" if str(path).startswith("/proc") else path.read_text()
    )

    def write(**files: str) -> Path:
        for name, text in files.items():
            group, _, file = name.partition("_")
            (tmp_path / ("" if group == "root" else group) / file.replace("_", ".")).write_text(f"{text}\n")
        return tmp_path

    return write


def test_free_memory(limit: Limit) -> None:
    """What the kernel keeps of files counts as free, since it gives that up."""
    folder = limit(job_memory_max="3000", job_memory_current="2500", job_memory_stat="anon 1\ninactive_file 400")
    assert free_memory_bytes(folder) == 900
    assert free_memory_bytes(limit(job_memory_max="max")) > 3000


def test_memory(limit: Limit) -> None:
    whole = psutil.virtual_memory().total
    assert memory_bytes(limit()) == whole
    assert memory_bytes(limit(job_memory_max="max")) == whole
    assert memory_bytes(limit(root_memory_max="123456")) == 123_456
    assert memory_bytes(limit(job_memory_max="99999")) == 99_999


@pytest.mark.parametrize("group", ["root", "job"])
def test_processes_of_a_container(limit: Limit, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    assert threads_left(limit()) is None
    assert threads_left(limit(**{f"{group}_pids_max": "max", f"{group}_pids_current": "7"})) is None
    folder = limit(**{f"{group}_pids_max": "100", f"{group}_pids_current": "60"})
    assert threads_left(folder) == 40
    require_threads(1, folder)
    with pytest.raises(InputError) as refused:
        require_threads(2, folder)
    assert str(refused.value) == (
        "2 process(es) with TensorFlow need 48 threads or more. Received: room for 40. Raise the limit "
        "on processes (ulimit -u, --pids-limit of a container, pids of a pod), or end others."
    )


def test_processes_of_a_user(limit: Limit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (50, 50) if kind == resource.RLIMIT_NPROC else (1, 1))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    left = threads_left(limit())
    assert left is not None and left < 50  # this process has threads of its own
    with pytest.raises(InputError, match="Received: room for"):
        require_threads(1, limit())
