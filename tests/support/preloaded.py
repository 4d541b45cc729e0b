"""Runs our commands without the seconds that each spends on imports: as forks of one process that has imported all.

    with preloaded(tmp_path / "printed") as commands:
        done = commands.run("train", "--epochs=1", ...)

As a program, this module reads one command a line as JSON, forks, and answers with the process id. It answers again
when that process has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.repository import ROOT

_LONGEST = 900.0  # seconds; a busy machine with two cores takes minutes for what takes seconds alone


class Running:
    """A command that was started."""

    def __init__(self, pid: int, folder: Path, ends: dict[int, int]) -> None:
        self.pid, self._folder, self._ends = pid, folder, ends

    @property
    def stderr(self) -> str:
        """The text that it has printed on stderr so far."""
        return (self._folder / "stderr").read_text()

    def wait(self, timeout: float = _LONGEST) -> subprocess.CompletedProcess[str]:
        """Waits for its end; returns its exit code and what it printed."""
        until = time.monotonic() + timeout
        while self.pid not in self._ends:
            assert time.monotonic() < until, self.stderr
            time.sleep(0.01)
        done = self.ended()
        assert done
        return done

    def ended(self) -> subprocess.CompletedProcess[str] | None:
        """Returns what `wait` does, or None while it runs."""
        if self.pid not in self._ends:
            return None
        code = os.waitstatus_to_exitcode(self._ends[self.pid])
        return subprocess.CompletedProcess([], code, (self._folder / "stdout").read_text(), self.stderr)


class Preloaded:
    """Starts commands; what each prints goes to a file under `folder`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder
        self._count = 0
        self._started: list[int] = []
        self._ends: dict[int, int] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            answer = json.loads(line)
            if "started" in answer:
                self._started.append(answer["started"])
            else:
                self._ends[answer["ended"]] = answer["status"]

    def start(self, module: str, *words: str, environment: Mapping[str, str] | None = None) -> Running:
        """Starts a command.

        Args:
            module: the command's name, without `din_dist.cli`.
            words: its arguments.
            environment: variables beside those of this process.
        """
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        order = {"module": f"din_dist.cli.{module}", "words": words, "folder": str(folder), "set": environment or {}}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        until = time.monotonic() + _LONGEST
        while len(self._started) < self._count:
            assert self._process.poll() is None, self._process.returncode
            assert time.monotonic() < until, "the process that forks has not answered"
            time.sleep(0.01)
        return Running(self._started[-1], folder, self._ends)

    def run(self, module: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, whatever its exit code."""
        return self.start(module, *words).wait()


@contextlib.contextmanager
def preloaded(folder: Path) -> Iterator[Preloaded]:
    """Starts the process that forks, for a block; makes `folder`."""
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.preloaded"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Preloaded(process, folder)
        finally:
            process.kill()


def _serve() -> None:
    from din_dist.cli import entry

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    entry.import_tensorflow()
    import din_dist.assembly
    import din_dist.data.prepared  # noqa: F401

    lock = threading.Lock()

    def say(**answer: Any) -> None:
        with lock:
            print(json.dumps(answer), flush=True)

    def tell_end(pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        say(ended=pid, status=status)

    for line in sys.stdin:
        order = json.loads(line)
        with lock:  # else the child could find it taken
            pid = os.fork()
        if not pid:
            _become(order["module"], order["words"], Path(order["folder"]), order["set"])
        say(started=pid)
        threading.Thread(target=tell_end, args=(pid,), daemon=True).start()


def _become(module: str, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
    import runpy

    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [module, *words]
    code: Any = 1
    try:
        runpy.run_module(module, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
