"""Launchers that may not start enough processes: one line, at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE
from tests.support.programs import missing
from tests.support.repository import ROOT

OTHER_USER = 54321  # has no process, which are counted by user
LAUNCHERS = [
    *(
        "horovod/build_horovod.sh",
        "build_kernels.sh",
        "daily.sh",
        "elastic.sh",
        "horovodrun.sh",
        "k8s.sh",
        "lint.sh",
        "pin.sh",
        "release_check.sh",
    ),
    *("setup.sh", "test.sh", "train.sh"),
]


@pytest.fixture(scope="module")
def launch() -> Iterator[Path]:
    """A copy that another user may read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(shutil.copytree(ROOT / "launch", Path(folder) / "launch"))


def start(launcher: Path, limit: int, *flags: str) -> subprocess.CompletedProcess[str]:
    as_user = []
    if os.geteuid() == 0:  # whom no limit holds
        as_user = ["setpriv", f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups"]
    command = [*as_user, "bash", "-c", 'ulimit -u "$1" && shift && exec "$@"', "", str(limit), launcher, *flags]
    variables = {name: value for name, value in os.environ.items() if name != "HOME"}
    return subprocess.run(command, cwd="/", env=variables, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_user_who_may_start_too_few(launch: Path, name: str) -> None:
    if os.geteuid() != 0:
        missing("only root can be a user of whom no process runs")
    done = start(launch / name, 20)
    assert (done.returncode, done.stdout) == (2, "")
    name = "train.sh" if name in ("elastic.sh", "horovodrun.sh") else Path(name).name  # which these begin with
    assert done.stderr == (
        f"{name}: this user must be allowed 32 more processes. "
        "Received: a limit of 20 (ulimit -u), 1 in use. Raise it.\n"
    )


def test_a_user_who_may_start_enough_goes_on_without_a_home(launch: Path) -> None:
    done = start(launch / "setup.sh", 4000, "--no_such_flag")
    assert (
        done.stderr == "setup.sh: unknown flag --no_such_flag. Usage: launch/setup.sh [--gpu] [--test] [--wheels=DIR]\n"
    )


@contextlib.contextmanager
def group_of_processes(limit: int) -> Iterator[Path]:
    """A control group within this one that may have so many processes."""
    parents = [Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")]
    parent = next((path for path in parents if (path / "cgroup.procs").exists()), None)
    group = (parent or Path("/none")) / f"din_dist_test_{os.getpid()}"
    try:
        group.mkdir()
        (group / "pids.max").write_text(str(limit))
    except OSError as error:
        missing(f"no control group can be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def test_a_container_that_may_start_too_few(launch: Path) -> None:
    with group_of_processes(limit=25) as group:
        words = ["bash", "-c", 'echo $$ >"$1/cgroup.procs" && exec "$2"', "", group, launch / "train.sh"]
        done = subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "train.sh: this container or service must be allowed 32 more processes. Received: a limit of 25 "
        f"({group}/pids.max), 1 in use. Raise it.\n"
    )
