"""Shared by the commands that compare din_dist with other projects: environments, processes, and where they ran.

Importing it defines the flags that both have.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from din_dist.cli import entry
from din_dist.config import require
from din_dist.errors import InputError
from tests.support.repository import ROOT

flags.DEFINE_integer("threads", 2, "Cores that each system may use.")
flags.DEFINE_string("peer_python", "python3.11", "Interpreter of the peers' environments: DeepCTR needs 3.11 at most.")
flags.DEFINE_string("peers_dir", "", "For environments, exported data and logs. Default: in the user's cache folder.")
FLAGS = flags.FLAGS


def check_flags() -> None:
    """Checks the flags of this module."""
    cores = len(os.sched_getaffinity(0))
    rule, remedy = f"must be at least 1, and there are {cores} cores", "Give a number up to that."
    require(1 <= FLAGS.threads <= cores, rule, "threads", FLAGS.threads, remedy)
    found = shutil.which(FLAGS.peer_python)
    require(found is not None, "must be an interpreter", "peer_python", FLAGS.peer_python, "Give the path of one.")


def own_folder() -> Path:
    """Returns the folder of all environments, and makes it."""
    if FLAGS.peers_dir:
        found = Path(FLAGS.peers_dir).expanduser().absolute()
    else:
        found = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "din_dist", "peers")
    found.mkdir(parents=True, exist_ok=True)
    return found


def environment(name: str, wanted: Path) -> Path:
    """Returns the Python of an environment, made first unless one with the same versions is there.

    Args:
        name: of the project, for messages.
        wanted: PEER.txt, the whole environment.
    """
    place, log = own_folder() / f"{wanted.stem}-env", own_folder() / f"{wanted.stem}-install.log"
    made_of, python = place / wanted.name, place / "bin" / "python"
    if made_of.is_file() and made_of.read_text() == wanted.read_text():
        return python
    entry.say(f"installing {name} (log: {log})")
    shutil.rmtree(place, ignore_errors=True)
    with log.open("w") as output:
        for command in (
            [FLAGS.peer_python, "-m", "venv", str(place)],
            [str(python), "-m", "pip", "install", "-r", str(wanted)],
        ):
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode:
                raise InputError(
                    f"{name} must install from {wanted.name}. Received: an error, see {log}. "
                    "It needs Python 3.11 (--peer_python) and the package registry."
                )
    shutil.copy(wanted, made_of)
    return python


def read(command: Sequence[str], answer: Callable[[dict[str, Any]], str] = lambda _: "") -> list[dict[str, Any]]:
    """Returns the JSON lines on the stdout of a command; `answer` gives what it is told after each, if anything."""
    log = own_folder() / "last-run.log"
    variables = {**os.environ, "OMP_NUM_THREADS": str(FLAGS.threads)}
    paths = [str(Path(__file__).parent)]  # of `stopwatch`; else the peers' environments are their own
    if command[0] == sys.executable:
        paths.append(str(ROOT))
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    found = []
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
        ) as process,
    ):
        assert process.stdin and process.stdout
        for line in process.stdout:
            found.append(json.loads(line))
            if text := answer(found[-1]):
                print(text, file=process.stdin, flush=True)
    if process.returncode:
        text = log.read_text().strip()
        if process.returncode == 2 and text.startswith("error: "):  # one of our commands found the input wrong
            raise InputError(text.removeprefix("error: "))
        raise RuntimeError(f"{' '.join(command[:2])} ended with {process.returncode}:\n{text[-3000:]}")
    return found


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
