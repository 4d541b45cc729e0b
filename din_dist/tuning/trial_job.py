"""The job of a trial: a process, and the validations that it writes to metrics.jsonl."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from din_dist.cluster.processes import exit_code, stop_with_parent
from din_dist.files import is_locked
from din_dist.text import parse_json, printable_line

LOG = "tune.log"
_LOCK = ".lock"  # of a training job, in its folder
_LOOK_SECONDS = 0.1
_MOST_SHOWN = 400  # characters of a line


class TrialProcess(Protocol):
    """A job that was started."""

    def poll(self) -> int | None:
        """Returns the exit code, or None while the job runs."""

    def stop(self) -> None:
        """Asks the job to save and to end with 75."""


class LaunchedProcess:
    """A job in a process of its own, which stops when this process ends.

    Args:
        command: starts it.
        log: the file that what it prints is added to.
        cores: on which it runs; empty: all.
        gpus: the value of CUDA_VISIBLE_DEVICES; empty: as it is.
    """

    def __init__(self, command: Sequence[str], log: Path, cores: Sequence[int] = (), gpus: str = "") -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})},
                start_new_session=True,  # Ctrl-C reaches it by `stop` alone
                preexec_fn=stop_with_parent,
            )
        if cores:
            os.sched_setaffinity(self._process.pid, cores)

    def poll(self) -> int | None:
        code = self._process.poll()
        return None if code is None else exit_code(code)

    def stop(self) -> None:
        self._process.terminate()


class Validations:
    """Reads the validations of a job while it runs.

    Args:
        folder: of the job.
        metric: the name of the value that is wanted.
    """

    def __init__(self, folder: Path, metric: str) -> None:
        self._path, self._metric = folder / "metrics.jsonl", metric
        self._read = 0  # bytes

    def new(self) -> Iterator[tuple[int, float | None]]:
        """Yields step and value of each validation since the last call; None for a value that is not defined."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return
        for text in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
            self._read += len(text)
            try:
                line = parse_json(text)
            except ValueError:
                continue  # a line that was cut when the job was killed
            if isinstance(line, dict) and line.get("kind") == "validation":
                value = line.get(self._metric)
                if not isinstance(value, (int, float)) or not math.isfinite(value):
                    value = None
                yield int(line["step"]), value


def wait_for_earlier(folder: Path, patience_seconds: float) -> bool:
    """Waits until the job that an earlier study left in a folder has saved and ended; tells whether it has."""
    until = time.monotonic() + patience_seconds
    while is_locked(folder / _LOCK):
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def last_words(log: Path, begin: int) -> str:
    """Returns the line by which a job that failed says why.

    Args:
        log: what it has printed.
        begin: the size of the log when the job was started, in bytes.
    """
    lines = [line for line in _text(log, begin).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error: ", "train.sh: "))]
    return printable_line((errors or lines or ["no reason"])[-1].removeprefix("error: "))[:_MOST_SHOWN]


def _text(path: Path, begin: int) -> str:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read().decode("utf-8", errors="replace")
