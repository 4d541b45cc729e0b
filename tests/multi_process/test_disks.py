"""Disks that do not answer, under jobs as users start them. With several hosts: tests/cluster/."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.support.commands import assert_one_line, command
from tests.support.faulty_disk import FaultyDisk, NoFaultyDisk
from tests.support.launcher_jobs import environment, launcher
from tests.support.patience import PATIENCE
from tests.support.programs import missing
from tests.support.repository import ROOT

ENDLESS = "--epochs=100000"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    try:
        with FaultyDisk(tmp_path / "disk") as found:
            yield found
    except NoFaultyDisk as error:
        missing(str(error))


class Job:
    """A command at work. Its output goes to a file: a process that cannot be ended holds a pipe open."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self._log = folder / "job.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=log, stderr=log)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, words: str) -> None:
        self.wait(lambda: words in self.said)

    def wait(self, holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
        until = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < until, self.said
            time.sleep(0.05)

    def end(self) -> int:
        """Waits for its end, in a bounded time; the exit code."""
        try:
            return self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.said) from None

    def last_words(self) -> list[str]:
        """The lines that are not of an update or an epoch."""
        known = ("step ", "epoch ")
        return [line for line in self.said.splitlines() if not line.startswith(known)]


def on(disk: FaultyDisk, words: Sequence[str]) -> list[str]:
    """A command whose data lie there."""
    return [*words, f"--data_dir={disk.path / 'prepared'}"]


def with_workers(folder: Path, count: int, *flags: str) -> list[str]:
    words = [word for word in launcher(folder, *flags) if not word.startswith("--num_workers=")]
    return [*words, f"--num_workers={count}"]


def test_data_that_do_not_come(tmp_path: Path, disk: FaultyDisk) -> None:
    """The worker that waits for them is ended, not one that waits for that worker."""
    job = Job(tmp_path, on(disk, with_workers(tmp_path, 2, ENDLESS, "--stall_timeout_seconds=20")))
    job.wait_for("step 20 of ")
    disk.stick(killable=True)
    assert job.end() == 80, job.said
    (line,) = [line for line in job.last_words() if "error: a disk must answer" in line][:1]
    assert "Received: nothing for " in line
    assert f" was reading data in {disk.path / 'prepared'}" in line


@pytest.mark.thorough(unless=lambda case: not case["killable"])
@pytest.mark.parametrize("killable", [True, False])
def test_a_request_to_stop_that_waits_for_data(tmp_path: Path, disk: FaultyDisk, killable: bool) -> None:
    """Without a launcher, and with one; long before `--stall_timeout_seconds`, though no signal may end the process."""
    words = command("train", tmp_path, ENDLESS)
    if killable:
        assert subprocess.run(on(disk, command("prepare_data", tmp_path)), cwd=ROOT, check=False).returncode == 0
    else:
        words = with_workers(tmp_path, 1, ENDLESS, "--stall_timeout_seconds=1000")
    job = Job(tmp_path, on(disk, words))
    job.wait_for("step 20 of ")
    disk.stick(killable=killable)
    time.sleep(1)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 75, job.said
    assert "error: a disk must answer. Received: nothing for " in job.said
    assert ("cannot be ended before its disk answers" in job.said) == (not killable)


def test_a_request_to_stop_when_the_main_thread_waits_for_data(tmp_path: Path, disk: FaultyDisk) -> None:
    """The kernel picks that thread for the signal, and it cannot take one: another has to look."""
    file = disk.path / "values"
    file.write_bytes(b"x" * 4096)
    program = f"""
import ctypes, mmap, time
from din_dist import progress
from din_dist.cli import entry

def read():
    entry.Signals()
    with open({str(file)!r}, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    print("ready", flush=True)
    while True:  # the disk soon sticks; memmove lets other threads run
        with progress.at("reading data"):
            ctypes.memmove(ctypes.create_string_buffer(1), first, 1)
        time.sleep(0.01)

entry.run(read)
"""
    job = Job(tmp_path, [sys.executable, "-c", program])
    job.wait_for("ready")
    disk.stick()
    job.wait(lambda: disk.num_waiting() > 0)
    job.process.send_signal(signal.SIGTERM)
    job.wait_for("stopping after this step and a checkpoint")
    job.wait_for("while rank 0 was reading data. This process ends;")
    disk.release()
    assert job.end() == 75, job.said


@pytest.mark.thorough  # as test_faults.py does
def test_an_output_folder_that_takes_nothing_for_a_while(tmp_path: Path, disk: FaultyDisk) -> None:
    """Updates go on, and it is told; then so do checkpoints and records, and no example is lost or doubled."""
    output = disk.path / "run"
    flags = (ENDLESS, "--checkpoint_every_steps=20", "--stall_timeout_seconds=20", f"--output_dir={output}")
    job = Job(tmp_path, with_workers(tmp_path, 2, *flags))
    job.wait_for("step 50 of ")
    disk.stick()
    job.wait_for(f" while rank 0 was writing records to {output}. Training goes on without it.")
    before = job.said.count("\nepoch ")
    job.wait(lambda: job.said.count("\nepoch ") > before + 1)
    assert "a checkpoint must be written before the next. Received: step " in job.said
    disk.release()
    job.wait_for("the disk has answered: ")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 75, job.said
    *_, saved = sorted((output / "checkpoints").glob("step-*"))
    assert f"stopped: on request, after the checkpoint of step {int(saved.name.removeprefix('step-'))}." in job.said
    epochs = json.loads((saved / "manifest.json").read_text())["state"]["epoch_records"]
    assert len(epochs) > before + 1
    assert len({(record["examples"], record["example_checksum"]) for record in epochs}) == 1


def test_an_output_folder_that_takes_nothing_any_more(tmp_path: Path, disk: FaultyDisk) -> None:
    """A request to stop cannot write its checkpoint: the job ends without."""
    output = disk.path / "run"
    flags = (ENDLESS, "--checkpoint_every_steps=20", f"--output_dir={output}")
    job = Job(tmp_path, with_workers(tmp_path, 1, *flags))
    job.wait_for("step 50 of ")
    disk.stick()
    job.wait_for("a checkpoint must be written before the next")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 75, job.said
    assert f" while rank 0 was waiting for a checkpoint in {output / 'checkpoints'}" in job.said


def test_data_that_cannot_be_read(tmp_path: Path, disk: FaultyDisk) -> None:
    """They are mapped into memory: the kernel has only a signal to say so."""
    job = Job(tmp_path, on(disk, with_workers(tmp_path, 1, ENDLESS)))
    job.wait_for("step 20 of ")
    disk.fail("packed/item_ids.npy")
    assert job.end() == 2, job.said
    (line,) = [line for line in job.last_words() if "error" in line]
    (file,) = (disk.path / "prepared").glob("event_log/*/1.0.0/packed/item_ids.npy")
    assert line.startswith(f"error: {file}: must be readable. Received: an input/output error at byte ")
    assert line.endswith("prepare_data --overwrite_prepared, and start the command again.")
    again = subprocess.run(  # where it is found by reading
        on(disk, command("train", tmp_path)), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert_one_line(again, f"{file}: cannot be read (Input/output error)")


def test_a_request_to_stop_while_data_are_prepared(tmp_path: Path, disk: FaultyDisk) -> None:
    disk.stick()
    job = Job(tmp_path, on(disk, with_workers(tmp_path, 1)))

    def waits_for_disk() -> bool:
        found = psutil.Process(job.process.pid).children(recursive=True)
        stacks = [stack.read_text() for child in found for stack in Path(f"/proc/{child.pid}/task").glob("*/stack")]
        # A request that the disk has not yet taken would still let its process be killed.
        return any("fuse_" in stack for stack in stacks) and disk.num_waiting() > 0

    job.wait(waits_for_disk)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 75, job.said
    assert "train.sh: prepare_data did not end within 10 s: it is killed" in job.said


def test_data_that_are_prepared_without_a_launcher(tmp_path: Path, disk: FaultyDisk) -> None:
    """The command waits, says once for what, and goes on when the disk answers."""
    impatient = "import runpy; from din_dist import progress; progress.PATIENCE_SECONDS = 2; "
    as_module = "runpy.run_module('din_dist.cli.prepare_data', run_name='__main__', alter_sys=True)"
    python, _, _, *flags = on(disk, command("prepare_data", tmp_path))
    disk.stick()
    job = Job(tmp_path, [python, "-c", impatient + as_module, *flags])
    job.wait_for(f"s while rank 0 was preparing data in {disk.path / 'prepared'}. It waits; Ctrl-C ends it.")
    disk.release()
    assert job.end() == 0, job.said
    assert job.said.count("warning: a disk must answer. Received: nothing for ") == 1
