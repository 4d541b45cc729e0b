"""Machines that lack what most have: a name that somebody knows, a network card for themselves, or shared memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from din_dist.errors import EXIT_INPUT_ERROR
from tests.support.launcher_jobs import environment, launcher
from tests.support.patience import PATIENCE
from tests.support.programs import missing

_NAMELESS = """
hostname nowhere-abc
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/resolv.conf /etc/resolv.conf
ip link set lo up
"""
_NO_SHARED_MEMORY = "mount -t tmpfs -o ro tmpfs /dev/shm"


def launch_on(machine: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Starts two workers in namespaces of their own, after the commands that make the machine what it is."""
    if os.geteuid():
        missing("namespaces take root")
    for tool in ("unshare", "ip"):
        if not shutil.which(tool):
            missing(f"{tool} is not installed: apt-get install util-linux iproute2")
    (folder / "hosts").write_text("")
    (folder / "resolv.conf").write_text("nameserver 192.0.2.1\noptions timeout:1 attempts:1\n")
    return subprocess.run(
        ["unshare", "--mount", "--uts", "--net", "sh", "-ec", f'{machine}\nexec "$@"', "sh", *launcher(folder, *flags)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.thorough(unless=lambda case: case["machine"] == _NAMELESS)
@pytest.mark.parametrize("machine", [_NAMELESS, f"ip link set lo up\n{_NO_SHARED_MEMORY}"])
def test_two_workers_train(machine: str, tmp_path: Path) -> None:
    done = launch_on(machine.format(folder=tmp_path), tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["world_size"] == 2
    assert "Traceback" not in done.stderr


def test_without_loopback_it_is_one_line(tmp_path: Path) -> None:
    done = launch_on("", tmp_path)
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.sh: Workers on one machine meet at 127.0.0.1. Received: no network card with ")
    assert done.returncode == EXIT_INPUT_ERROR
