"""An elastic job on real hosts, and faults for it: what dies, hangs, is cut off or full, and how it comes back.

    with Laboratory(folder, data, seed) as laboratory:
        with laboratory.job("first") as job:
            FAULTS["killed worker"](job)
            summary = job.finish()

Hosts are network namespaces with sshd (`tests/support/host_lab.py`): one for the launcher, another for each worker.
`--output_dir` is a small file system that can be filled and frozen. Each worker reads the data from a disk of its own,
which sticks or fails by order (`tests/support/faulty_disk.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil

from tests.support import host_lab
from tests.support.faulty_disk import FaultyDisk
from tests.support.host_lab import Host
from tests.support.launcher_jobs import environment
from tests.support.programs import program
from tests.support.repository import ROOT

NUM_WORKERS = 3
DISK_BYTES = 192 << 20
_FREEZE, _THAW = 0xC0045877, 0xC0045878  # FIFREEZE, FITHAW of linux/fs.h
EPOCHS = 14  # the faults take half of them or more: the job must not end before the last one has passed
TRAINER_FLAGS = (
    "--dataset=event_log",
    "--split=leave_two_out",
    "--embedding_dim=16",
    "--attention_hidden_units=32,16",
    "--optimizer=lazy_adam",
    "--global_batch_size=1024",
    "--checkpoint_every_steps=50",
    "--log_every_steps=1",
    "--histograms_every_steps=0",
    "--noxla",  # a new worker would compile for long
    "--projector_items=0",
    "--rejoin_timeout_seconds=120",
)


class FaultError(AssertionError):
    """A job did not do what it should after a fault."""


class Laboratory:
    """Hosts, a small disk, and how an undisturbed job ends."""

    def __init__(
        self,
        folder: Path,
        log: Path,
        seed: int,
        epochs: int = EPOCHS,
        stall_timeout_seconds: float = 20,
        disturbance_seconds: float = 10,
    ) -> None:
        """`disturbance_seconds`: how long a bad cable stays bad."""
        self.folder = folder
        self.stall_timeout_seconds, self.disturbance_seconds = stall_timeout_seconds, disturbance_seconds
        self.random = random.Random(seed)
        self.trainer_flags = [*TRAINER_FLAGS, f"--data_path={log}", f"--data_dir={folder / 'data'}"]
        self.trainer_flags.append(f"--epochs={epochs}")
        self.disk = folder / "disk"
        self.num_steps = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # Before the hosts: each has its own view of the mounts, as of its beginning.
            self._mount_disk(stack)
            data = self.folder / "data"
            disks = [
                stack.enter_context(FaultyDisk(data, self.folder / f"data-of-{number}"))
                for number in range(NUM_WORKERS)
            ]
            self.launcher, *self.workers = stack.enter_context(host_lab.hosts(1 + NUM_WORKERS, our_cables=True))
            self.data_disks = {host.address: disk for host, disk in zip(self.workers, disks, strict=True)}
            for host in self.workers:
                there = ["nsenter", f"--target={_sshd_of(host)}", "--mount"]
                subprocess.run([*there, "mount", "--bind", self.data_disks[host.address].path, data], check=True)
            self._stack = stack.pop_all()
        return self

    def _mount_disk(self, stack: contextlib.ExitStack) -> None:
        """Mounts `disk`: of a kind that can be frozen, in a file in memory."""
        memory = self.folder / "memory"
        for folder in (self.disk, memory):
            folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", memory], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", memory], check=False)
        with (memory / "image").open("wb") as file:
            file.truncate(DISK_BYTES)
        subprocess.run([program("mkfs.ext4"), "-q", "-m", "0", memory / "image"], check=True)
        subprocess.run(["mount", "-o", "loop", memory / "image", self.disk], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", self.disk], check=False)

    @contextlib.contextmanager
    def frozen_disk(self) -> Iterator[None]:
        """A block in which nobody can write to `disk`: who tries waits, and cannot be killed."""
        descriptor = os.open(self.disk, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _FREEZE, 0)
            try:
                yield
            finally:
                fcntl.ioctl(descriptor, _THAW, 0)
        finally:
            os.close(descriptor)

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def undisturbed(self) -> dict[str, Any]:
        """The summary of the same job in one process that nothing happens to."""
        words = [*self.trainer_flags, f"--output_dir={self.folder / 'undisturbed'}"]
        for command in ("prepare_data", "train"):
            done = subprocess.run(
                [sys.executable, "-m", f"din_dist.cli.{command}", *words], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise FaultError(done.stderr)
        summary = json.loads(done.stdout.splitlines()[-1])
        self.num_steps = summary["steps"]
        return summary

    @contextlib.contextmanager
    def job(self, name: str) -> Iterator[Job]:
        for old in self.disk.iterdir():
            if old.name != "lost+found":
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        job = Job(self, self.disk / name)
        try:
            job.start()
            yield job
        finally:
            job.end()


class Job:
    """One elastic job; after a fault of its launcher it is started again."""

    def __init__(self, laboratory: Laboratory, output: Path) -> None:
        self.laboratory, self.output = laboratory, output
        self.random = laboratory.random
        self._hosts_file = laboratory.folder / "hosts"
        self.list_hosts(laboratory.workers)
        self.log: list[str] = []

    def list_hosts(self, hosts: list[Host]) -> None:
        aside = self._hosts_file.with_suffix(".new")
        aside.write_text("".join(f"{host.address}:1\n" for host in hosts))
        aside.replace(self._hosts_file)

    def start(self) -> None:
        command = [
            str(ROOT / "launch" / "elastic.sh"),
            f"--hosts_file={self._hosts_file}",
            f"--num_workers={NUM_WORKERS}",
            "--network_interface=eth0",
            "--host_cooldown_seconds=1",
            f"--stall_timeout_seconds={self.laboratory.stall_timeout_seconds:g}",
            *self.laboratory.trainer_flags,
            f"--output_dir={self.output}",
        ]
        self.process = subprocess.Popen(
            self.laboratory.launcher.command(command),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._out: list[str] = []
        self._readers = [
            threading.Thread(target=self._out.extend, args=(self.process.stdout,), daemon=True),
            threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def end(self) -> None:
        """Whatever state it is in."""
        self.process.kill()
        for worker in self.trainers():
            worker.signal(signal.SIGKILL)
        self.process.wait()
        for host in self.laboratory.workers:
            host.plug_in()
            host.disturb()

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.output / "metrics.jsonl").read_text().splitlines()
            return [record for line in lines if line.endswith("}") and (record := json.loads(line))["kind"] == kind]
        return []

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def step(self) -> int:
        """Of the last update."""
        made = self.records("train")
        return made[-1]["step"] if made else 0

    def world_size(self) -> int:
        return max(self.records("elastic") + self.records("start"), key=lambda record: record["time"])["world_size"]

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = 150) -> None:
        """Until it holds, or the job has ended well."""
        deadline = time.monotonic() + seconds
        while not holds():
            if not self.running:
                if self.process.returncode == 0:
                    return
                raise FaultError(f"exit code {self.process.returncode} while waiting for {what}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise FaultError(f"waited {seconds:g} s for {what}:\n{self.tail()}")
            time.sleep(0.2)

    def tail(self) -> str:
        return "".join(line for line in self.log if not line.startswith(("step ", "[")))[-4000:]

    def wait_for_updates(self, updates: int = 5) -> None:
        """By all workers."""
        self.wait("all workers to be at work", self._complete)
        before = self.step()
        self.wait("updates", lambda: self._complete() and self.step() >= before + updates)

    def _complete(self) -> bool:
        return bool(self.records("train")) and self.world_size() == NUM_WORKERS

    def trainers(self) -> list[Trainer]:
        """Those of the job that live."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"din_dist.cli.train" in words and f"--output_dir={self.output}".encode() in words:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    (host,) = (value[17:].decode() for value in variables if value.startswith(b"HOROVOD_HOSTNAME="))
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    found.append(Trainer(int(entry.name), parent, host))
        return sorted(found, key=lambda trainer: trainer.host)

    def chief(self) -> Trainer:
        """Who holds the lock of the output directory."""
        inode = (self.output / ".lock").stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
                for trainer in self.trainers():
                    if trainer.pid == int(fields[4]):
                        return trainer
        raise FaultError("no trainer holds the output directory")

    def follower(self) -> Trainer:
        chief = self.chief()
        return self.random.choice([trainer for trainer in self.trainers() if trainer != chief])

    def any_trainer(self) -> Trainer:
        return self.random.choice(self.trainers())

    def host_of(self, trainer: Trainer) -> Host:
        (host,) = (host for host in self.laboratory.workers if host.address == trainer.host)
        return host

    def finish(self, seconds: float = 600) -> dict[str, Any]:
        """Waits for its good end; the summary."""
        code = self.process.wait(timeout=seconds)
        for reader in self._readers:
            reader.join()
        if code:
            raise FaultError(f"exit code {code}:\n{self.tail()}")
        return json.loads(self._out[-1])


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A trainer process."""

    pid: int
    agent: int
    host: str

    def signal(self, number: int, *, agent_too: bool = False) -> None:
        for pid in [self.agent, self.pid] if agent_too else [self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def wrong_epochs(summary: dict[str, Any], undisturbed: dict[str, Any]) -> list[dict[str, Any]]:
    """The epochs in which the history that survived has lost or doubled an example."""
    names = ("examples", "example_checksum")
    return [
        record
        for record, expected in zip(summary["epoch_records"], undisturbed["epoch_records"], strict=True)
        if [record[name] for name in names] != [expected[name] for name in names]
    ]


def check(summary: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """A job went as if nothing had happened.

    Raises:
        FaultError: examples were lost or doubled, or it learned something else.
    """
    wrong = wrong_epochs(summary, undisturbed)
    difference = abs(summary["test_gauc"] - undisturbed["test_gauc"])
    if wrong or difference > 0.003 or summary["steps"] != undisturbed["steps"]:
        raise FaultError(
            f"epochs with lost or doubled examples: {wrong}; steps {summary['steps']} of {undisturbed['steps']}; GAUC "
            f"differs by {difference:.4f}"
        )


def _lose(job: Job, trainer: Trainer, how: Callable[[], None]) -> None:
    """A worker goes; the others go on without it, and it comes back."""
    resets = len(job.records("elastic"))
    how()
    job.wait(
        f"the others to go on without {trainer.host}",
        lambda: any(record["world_size"] < NUM_WORKERS for record in job.records("elastic")[resets:]),
    )


def kill_worker(job: Job) -> None:
    trainer = job.follower()
    _lose(job, trainer, lambda: trainer.signal(signal.SIGKILL))


def kill_chief(job: Job) -> None:
    trainer = job.chief()
    _lose(job, trainer, lambda: trainer.signal(signal.SIGKILL))


def evict(job: Job) -> None:
    trainer = job.any_trainer()
    steps = len(job.records("train"))
    _lose(job, trainer, lambda: trainer.signal(signal.SIGTERM))
    made = [record["step"] for record in job.records("train")[steps - 1 :]]
    if made != sorted(set(made)):
        raise FaultError(f"an eviction must not undo updates. Received: {made}")


def stop_worker(job: Job) -> None:
    """SIGSTOP of the trainer alone: its agent lives."""
    trainer = job.any_trainer()
    _lose(job, trainer, lambda: trainer.signal(signal.SIGSTOP))


def freeze_host(job: Job) -> None:
    """Everything of a worker stops, as on a machine that hangs: nobody there can tell."""
    trainer = job.any_trainer()
    _lose(job, trainer, lambda: trainer.signal(signal.SIGSTOP, agent_too=True))
    trainer.signal(signal.SIGCONT, agent_too=True)  # the machine goes on at last: what is left over must end by itself


def reset_host(job: Job) -> None:
    """Everything on it is gone without a word, and it answers again soon: but of old connections it knows nothing."""
    trainer = job.any_trainer()
    host = job.host_of(trainer)

    def reset() -> None:
        forget = "echo 1 >/proc/sys/net/ipv4/tcp_orphan_retries"  # connections go with their processes, as on a reset
        subprocess.run(host.command(["sh", "-c", forget]), check=True)
        host.unplug()
        for pid in _pids_in(host):
            with contextlib.suppress(OSError):
                if not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sshd: /usr/sbin/sshd"):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(job.laboratory.stall_timeout_seconds / 2)
        host.plug_in()

    _lose(job, trainer, reset)


def cut_cable(job: Job) -> None:
    """For longer than `--stall_timeout_seconds`."""
    trainer = job.any_trainer()
    host = job.host_of(trainer)
    _lose(job, trainer, host.unplug)
    time.sleep(job.random.uniform(0, 5))
    host.plug_in()


def cut_cable_briefly(job: Job) -> None:
    host = job.host_of(job.any_trainer())
    host.unplug()
    time.sleep(job.random.uniform(0.5, 4))
    host.plug_in()


def lose_packets(job: Job) -> None:
    host = job.host_of(job.any_trainer())
    host.disturb(loss=0.05)
    time.sleep(job.laboratory.disturbance_seconds)
    host.disturb()


def delay_packets(job: Job) -> None:
    host = job.host_of(job.any_trainer())
    host.disturb(delay_ms=50)
    time.sleep(job.laboratory.disturbance_seconds)
    host.disturb()


def change_bytes(job: Job) -> None:
    """Until a worker was lost by it, as by a broken link: by the time that TCP does not notice, all others do."""
    host = job.host_of(job.any_trainer())
    resets, before = len(job.records("elastic")), host.disturb(changed=0.02)
    job.wait("the workers to part", lambda: len(job.records("elastic")) > resets)
    if host.disturb() == before:
        raise FaultError("no byte has changed")


def take_host_and_add_it(job: Job) -> None:
    """The list of hosts shrinks and grows: an orderly change."""
    trainer = job.any_trainer()
    left = [host for host in job.laboratory.workers if host.address != trainer.host]
    _lose(job, trainer, lambda: job.list_hosts(left))
    job.list_hosts(job.laboratory.workers)


def fill_disk(job: Job) -> None:
    """Until a checkpoint has failed."""

    def failed_checkpoints() -> int:
        return sum("a checkpoint must fit" in line and "No space left" in line for line in job.log)

    before = failed_checkpoints()
    filler = job.laboratory.disk / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    try:
        job.wait("a checkpoint that fails", lambda: failed_checkpoints() > before)
    finally:
        filler.unlink()


def stick_output(job: Job) -> None:
    """Until a checkpoint was given up and updates have gone on, and the next one was saved."""
    said = len(job.log)

    def words() -> str:
        return "".join(job.log[said:])

    def updates() -> int:
        return len(re.findall(r"^(?:\[\d+\])? ?step ", words(), re.MULTILINE))  # the chief may be any rank by now

    with job.laboratory.frozen_disk():
        job.wait("a checkpoint that is given up", lambda: "must be written before the next" in words())
        lines = updates()
        job.wait("updates without a disk", lambda: updates() > lines + 5)
    saved = len(job.records("checkpoint"))
    job.wait("a checkpoint on the disk that answers again", lambda: len(job.records("checkpoint")) > saved)


def stick_data(job: Job) -> None:
    """Of one host, whose worker may not even be killed before the disk answers."""
    trainer, said = job.any_trainer(), len(job.log)
    disk = job.laboratory.data_disks[trainer.host]
    try:
        _lose(job, trainer, lambda: disk.stick(killable=job.random.random() < 0.5))
    finally:
        disk.release()
    if not any("a disk must answer" in line and "reading data in" in line for line in job.log[said:]):
        raise FaultError(f"a worker must say that it waits for its data:\n{job.tail()}")


def fail_data(job: Job) -> None:
    """Of one host, which is left out for good: it comes back with the next start of the job."""
    trainer, said = job.any_trainer(), len(job.log)
    disk = job.laboratory.data_disks[trainer.host]
    try:
        _lose(job, trainer, lambda: disk.fail(".npy"))
        job.wait("the host to be left out", lambda: any("is left out for good" in line for line in job.log[said:]))
    finally:
        disk.heal()
    if not any("Received: an input/output error at byte " in line for line in job.log[said:]):
        raise FaultError(f"a worker must say what it could not read:\n{job.tail()}")
    stop_job(job)


def _restart(job: Job) -> None:
    deadline = time.monotonic() + job.laboratory.stall_timeout_seconds + 45
    while job.running or job.trainers():
        if time.monotonic() > deadline:
            raise FaultError(f"still there: launcher {job.running}, trainers {job.trainers()}")
        time.sleep(0.2)
    job.start()


def kill_driver(job: Job) -> None:
    """Horovod's."""
    driver = _descendant(job.process.pid, "horovodrun")
    os.kill(driver, signal.SIGKILL)
    code = job.process.wait(timeout=90)
    if code != 75:
        raise FaultError(f"without its driver a job must end with code 75. Received: {code}\n{job.tail()}")
    _restart(job)


def kill_launcher(job: Job) -> None:
    """All that runs on the launcher's host."""
    for pid in _pids_in(job.laboratory.launcher):
        name = Path(f"/proc/{pid}/comm")
        with contextlib.suppress(OSError):
            if "sshd" not in name.read_text():
                os.kill(pid, signal.SIGKILL)
    job.process.wait()
    _restart(job)


def stop_job(job: Job) -> None:
    """SIGTERM to the launcher."""
    before = job.step()
    job.process.terminate()
    code = job.process.wait(timeout=90)
    if code != 75:
        raise FaultError(f"a stopped job must end with code 75. Received: {code}\n{job.tail()}")
    saved = max(int(path.name.removeprefix("step-")) for path in (job.output / "checkpoints").glob("step-*"))
    if saved < before:
        raise FaultError(f"a stopped job must save where it stands. Received: step {saved} after step {before}")
    _restart(job)


def _cut_off_launcher(job: Job, direction: str) -> None:
    """For longer than `--stall_timeout_seconds`: the workers save and stop by themselves."""
    before, said = job.step(), len(job.log)
    job.laboratory.launcher.disturb(cut=direction)
    code = job.process.wait(timeout=job.laboratory.stall_timeout_seconds + 90)
    job.laboratory.launcher.disturb()
    words = "".join(job.log[said:])
    if code != 75 or "Traceback" in words:
        raise FaultError(f"a launcher that is cut off must end with code 75 and a line. Received: {code}\n{words}")
    _restart(job)
    saved = max(int(path.name.removeprefix("step-")) for path in (job.output / "checkpoints").glob("step-*"))
    if saved < before:
        raise FaultError(f"the workers must save where they stand. Received: step {saved} after step {before}")


def do_not_hear_launcher(job: Job) -> None:
    _cut_off_launcher(job, "from")


def do_not_let_launcher_hear(job: Job) -> None:
    _cut_off_launcher(job, "to")


def kill_all_workers(job: Job) -> None:
    """A power cut of all hosts but the launcher's."""
    for trainer in job.trainers():
        trainer.signal(signal.SIGKILL)
    job.process.wait(timeout=150)
    _restart(job)


FAULTS_OF_WORKERS: dict[str, Callable[[Job], None]] = {
    "SIGKILL of a worker": kill_worker,
    "SIGKILL of the chief": kill_chief,
    "SIGTERM of a worker": evict,
    "SIGSTOP of a worker": stop_worker,
    "a host freezes": freeze_host,
    "a host is reset": reset_host,
    "a host is cut off, and back": cut_cable,
    "a cable is out for seconds": cut_cable_briefly,
    "packet loss 5 %": lose_packets,
    "delay 50 ms": delay_packets,
    "bytes change on a cable": change_bytes,
    "a host is taken and added": take_host_and_add_it,
    "the output disk sticks": stick_output,
    "a host's data disk sticks": stick_data,
    "disk full": fill_disk,
}
FAULTS_OF_JOBS: dict[str, Callable[[Job], None]] = {  # after which the job has to be started again
    "SIGTERM of the launcher": stop_job,
    "SIGKILL of the driver": kill_driver,
    "SIGKILL of the launcher": kill_launcher,
    "SIGKILL of all workers": kill_all_workers,
    "the launcher is not heard": do_not_hear_launcher,
    "the launcher does not hear": do_not_let_launcher_hear,
    "a host's data cannot be read": fail_data,
}
FAULTS = FAULTS_OF_JOBS | FAULTS_OF_WORKERS


def seconds_to_go_on(job: Job, since: float) -> float:
    """From a fault at `since` to the first update of the workers that were left, or that were started again.

    Where none was lost: the longest time without an update.
    """
    updates = [record["time"] for record in job.records("train") if record["time"] > since]
    changes = [record["time"] for kind in ("elastic", "start") for record in job.records(kind)]
    for change in sorted(changes):
        for update in updates:
            if since < change < update:
                return update - since
    return max((later - earlier for earlier, later in itertools.pairwise([since, *updates])), default=0.0)


def _sshd_of(host: Host) -> int:
    for pid in _pids_in(host):
        if Path(f"/proc/{pid}/comm").read_text() == "sshd\n":
            return pid
    raise FaultError(f"no sshd on {host.address}")


def _descendant(pid: int, name: str) -> int:
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(word.endswith(f"bin/{name}") for word in process.cmdline()):
                return process.pid
    raise FaultError(f"no {name}")


def _pids_in(host: Host) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=True)
    return [int(pid) for pid in listed.stdout.split()]
