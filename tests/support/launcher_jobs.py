"""Starts jobs of two workers by launch/train.sh, on the small job of `commands`.

with subprocess.Popen(launcher(tmp_path), env=environment(), stderr=subprocess.PIPE, text=True) as job:
    wait_for(job, "step 10 of ")
    os.kill(worker_of(1, tmp_path), signal.SIGKILL)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support.commands import command
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT


def launcher(folder: Path, *flags: str) -> list[str]:
    """Returns the words that start launch/train.sh with two workers on this machine."""
    words = command("train", folder, *flags)
    return [str(ROOT / "launch" / "train.sh"), "--num_workers=2", *words[words.index("din_dist.cli.train") + 1 :]]


def environment() -> dict[str, str]:
    """Returns the variables under which a launcher uses the Python of these tests, without a GPU."""
    return {**os.environ, "DIN_DIST_VENV": str(Path(sys.executable).parents[1]), "DIN_DIST_DEVICE": "cpu"}


def launch(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs `launcher(...)` to its end, whatever its exit code."""
    return subprocess.run(
        launcher(folder, *flags), env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def start_elastic(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """Starts an elastic job of two workers, each on a "host" of its own: two names of this machine.

    The job reads its hosts from `folder`/hosts, which a test may rewrite.
    """
    hosts = folder / "hosts"
    hosts.write_text("localhost:1\n127.0.0.1:1  # the same\n")
    program, *words = launcher(folder, *flags)
    return subprocess.Popen(
        [program, "--elastic", f"--hosts_file={hosts}", *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(job: subprocess.Popen[str], words: str) -> list[str]:
    """Reads stderr of `job` until a line contains `words`; returns the lines read, that one included."""
    assert job.stderr
    lines = []
    for line in job.stderr:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError("".join(lines))


def worker_of(rank: int, folder: Path) -> int:
    """Returns the process id of a rank of the job in `folder`, found in /proc as an operator would find it."""
    for _ in range(100):
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            mine = f"--output_dir={folder / 'run'}".encode() in words and b"python" in words[0]
            if mine and b"din_dist.cli.train" in words and f"HOROVOD_RANK={rank}".encode() in variables:
                return int(entry.name)
        time.sleep(0.1)
    raise AssertionError(f"no worker {rank}")
