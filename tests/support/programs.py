"""Programs that tests need and Python's package index does not have."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

DEBIAN_PACKAGES = {"promtool": "prometheus", "mkfs.ext4": "e2fsprogs"}  # where the name is another


def program(name: str) -> str:
    """Its path. Without it, see `missing`."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return shutil.which(name, path=path) or missing(
        f"{name} is not installed: apt-get install {DEBIAN_PACKAGES.get(name, name)}"
    )


def missing(reason: str) -> NoReturn:
    """Ends a test for want of something: continuous integration fails, elsewhere the test is skipped."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: Sequence[str | Path], log: Path, ready_url: str) -> Iterator[None]:
    """A server, from when it answers at `ready_url` to the end of the block."""
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            until = time.monotonic() + 60
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
