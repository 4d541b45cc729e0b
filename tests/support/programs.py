"""Finds and runs programs that tests need and Python's package index does not have, such as promtool.

It imports optional packages too.

with running([program("prometheus"), ...], tmp_path / "log", ready_url=f"{url}/-/ready"):
    ...
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from tests.support.patience import PATIENCE

DEBIAN_PACKAGES = {"promtool": "prometheus", "mkfs.ext4": "e2fsprogs"}  # where the name is another


def program(name: str) -> str:
    """Returns the path of a program; without it the test ends as in `missing`."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return shutil.which(name, path=path) or missing(
        f"{name} is not installed: apt-get install {DEBIAN_PACKAGES.get(name, name)}"
    )


def missing(reason: str) -> NoReturn:
    """Ends a test that lacks something: it fails in continuous integration and is skipped elsewhere."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def imported(name: str, package: str) -> ModuleType:
    """Returns a module of an optional package; without it the test ends as in `missing`."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing(f"{package} is not installed: launch/setup.sh --test")


def free_port() -> int:
    """Returns a port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: Sequence[str | Path], log: Path, ready_url: str) -> Iterator[None]:
    """Runs a server for a block, which begins when the server answers at `ready_url`; its output goes to `log`."""
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            until = time.monotonic() + PATIENCE
            while True:
                try:
                    urllib.request.urlopen(ready_url, timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < until, log.read_text()
                    time.sleep(0.1)
            yield
        finally:
            process.kill()
