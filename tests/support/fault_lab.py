"""Runs an elastic job on several hosts, and injects faults: processes, hosts, cables and disks that fail or hang.

    with Laboratory(folder, data, seed) as laboratory:
        with laboratory.job("first") as job:
            FAULTS["SIGKILL of a worker"](job)
            summary = job.finish()

Hosts are network namespaces with sshd (`tests/support/host_lab.py`): one for the launcher, one for each worker.
`--output_dir` is a small file system that can be filled and frozen. Each worker reads its data from a disk of its own,
which sticks or fails when ordered (`tests/support/faulty_disk.py`).
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
from tests.support.patience import PATIENCE
from tests.support.programs import program
from tests.support.repository import ROOT

NUM_WORKERS = 3
ENDLESS = 1000  # epochs
DISK_BYTES = 192 << 20
_FREEZE, _THAW = 0xC0045877, 0xC0045878  # FIFREEZE, FITHAW of linux/fs.h
_LISTENING = re.compile(rb"sshd: \S*/sshd ")  # how the sshd that waits for connections calls itself
_METRICS = re.compile(r"http://\S+?/metrics")
_PARTINGS = ("a worker was lost: going on without it\n", "workers come or go\n")
_OF_AN_UPDATE = re.compile(r"(\[\d+\])? ?step ")  # the chief may be any rank
TRAINER_FLAGS = (
    "--dataset=event_log",
    "--split=leave_two_out",
    "--embedding_dim=16",
    "--attention_hidden_units=32,16",
    "--optimizer=lazy_adam",
    "--global_batch_size=1024",
    "--checkpoint_every_steps=20",
    "--log_every_steps=1",
    "--histograms_every_steps=0",
    "--noxla",  # a new worker would compile for long
    "--projector_items=0",
    "--rejoin_timeout_seconds=120",
)


class FaultError(AssertionError):
    """A job did not recover from a fault as it should."""


class Laboratory:
    """The hosts and disks that jobs run on, and the result of an undisturbed job."""

    def __init__(
        self,
        folder: Path,
        log: Path,
        seed: int,
        stall_timeout_seconds: float = 20,
        disturbance_seconds: float = 10,
        delay_ms: float = 0,
    ) -> None:
        """
        Args:
            folder: for data, disks and outputs.
            log: the log to train on.
            seed: decides which workers the faults strike.
            disturbance_seconds: how long a bad cable stays bad.
            delay_ms: one way between two hosts. It slows updates down and leaves the cores to workers that start.
        """
        self.folder, self.delay_ms = folder, delay_ms
        self.stall_timeout_seconds, self.disturbance_seconds = stall_timeout_seconds, disturbance_seconds
        self.random = random.Random(seed)
        self.trainer_flags = [*TRAINER_FLAGS, f"--data_path={log}", f"--data_dir={folder / 'data'}"]
        self.disk = folder / "disk"
        self.num_steps = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # Before the hosts, because each host has its own view of the mounts, as they were when it began.
            self._mount_disk(stack)
            data = self.folder / "data"
            disks = [
                stack.enter_context(FaultyDisk(data, self.folder / f"data-of-{number}"))
                for number in range(NUM_WORKERS)
            ]
            self.launcher, *self.workers = stack.enter_context(
                host_lab.hosts(1 + NUM_WORKERS, our_cables=True, delay_ms=self.delay_ms)
            )
            self.data_disks = {host.address: disk for host, disk in zip(self.workers, disks, strict=True)}
            for host in self.workers:
                there = ["nsenter", f"--target={_sshd_of(host)}", "--mount"]
                subprocess.run([*there, "mount", "--bind", self.data_disks[host.address].path, data], check=True)
            self._stack = stack.pop_all()
        return self

    def _mount_disk(self, stack: contextlib.ExitStack) -> None:
        """Mounts `disk`, a file system that can be frozen, in a file in memory."""
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
        """Freezes `disk` for a block: processes that write to it wait and cannot be killed."""
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

    def undisturbed(self, epochs: int) -> dict[str, Any]:
        """Runs the same job in one process, without faults, and returns its summary.

        Its `last_gauc` is that of the last weights: a job whose disk takes nothing when the best are there tests those.
        """
        output = f"--output_dir={self.folder / 'undisturbed'}"
        words = [*self.trainer_flags, f"--epochs={epochs}", output]
        _run("prepare_data", *words)
        summary = _run("train", *words)
        self.num_steps = summary["steps"]
        last = _run("evaluate", output, f"--checkpoint_step={self.num_steps}", "--rank_against=none")
        return summary | {"last_gauc": last["gauc"]}

    @contextlib.contextmanager
    def job(self, name: str, epochs: int = ENDLESS) -> Iterator[Job]:
        """Runs a job for a block, on an empty disk."""
        for old in self.disk.iterdir():
            if old.name != "lost+found":
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        job = Job(self, self.disk / name, epochs)
        try:
            job.start()
            yield job
        finally:
            job.end()


def _run(command: str, *words: str) -> Any:
    """Runs a command, which must succeed, and returns the JSON of the last line that it prints, if there is one."""
    line = [sys.executable, "-m", f"din_dist.cli.{command}", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FaultError(done.stderr)
    last = done.stdout.splitlines()[-1]
    return json.loads(last) if last.startswith("{") else None


class Job:
    """An elastic job. Faults that end its launcher start it again."""

    def __init__(self, laboratory: Laboratory, output: Path, epochs: int) -> None:
        self.laboratory, self.output, self.epochs = laboratory, output, epochs
        self.random = laboratory.random
        self._hosts_file = laboratory.folder / "hosts"
        self.list_hosts(laboratory.workers)
        self.log: list[str] = []

    def list_hosts(self, hosts: list[Host]) -> None:
        """Replaces the hosts file that the job reads."""
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
            f"--epochs={self.epochs}",
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
        """Kills all processes of the job and repairs the hosts, whatever state they are in."""
        self.process.kill()
        for worker in self.trainers():
            worker.signal(signal.SIGKILL)
        self.process.wait()
        for host in self.laboratory.workers:
            host.plug_in()
            host.disturb()

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Returns the records of one kind from metrics.jsonl."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.output / "metrics.jsonl").read_text().splitlines()
            return [record for line in lines if line.endswith("}") and (record := json.loads(line))["kind"] == kind]
        return []

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def partings(self) -> int:
        """Counts how often the workers have said that one is lost, or that they meet anew."""
        return sum(line.endswith(_PARTINGS) for line in self.log)

    def step(self) -> int:
        """Returns the step of the last recorded update, 0 before the first."""
        made = self.records("train")
        return made[-1]["step"] if made else 0

    def world_size(self) -> int:
        """Returns the number of workers at the last start or change."""
        return max(self.records("elastic") + self.records("start"), key=lambda record: record["time"])["world_size"]

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Waits until `holds` returns True or the job has completed.

        Raises:
            FaultError: the job failed, or `what` did not happen in time.
        """
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
        """Returns the end of the job's log, without its lines about updates."""
        return "".join(line for line in self.log if not _OF_AN_UPDATE.match(line))[-6000:]

    def wait_for_updates(self, updates: int = 5) -> None:
        """Waits until all workers have made so many updates together."""
        self.wait("all workers to be at work", self._complete)
        before = self.step()
        self.wait("updates", lambda: self._complete() and self.step() >= before + updates)

    def _complete(self) -> bool:
        return bool(self.records("train")) and self.world_size() == NUM_WORKERS

    def trainers(self) -> list[Trainer]:
        """Returns the trainer processes of the job that are alive, by host."""
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
        """Returns the trainer that holds the lock of the output directory."""
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

    def counter(self, name: str) -> float:
        """Returns the value of a metric that the chief exports."""
        host = self.host_of(self.chief())
        (*_, addresses) = (line for line in self.log if _METRICS.search(line))
        for address in _METRICS.findall(addresses):
            code = f"import urllib.request; print(urllib.request.urlopen({address!r}).read().decode())"
            done = subprocess.run(host.command([sys.executable, "-c", code]), capture_output=True, text=True)
            if found := re.search(rf"^{name} (\S+)$", done.stdout, re.MULTILINE):
                return float(found[1])
        raise FaultError(f"no {name} at {addresses}")

    @property
    def lost_best_weights(self) -> bool:
        """True if the best weights could not be saved, so that the last ones are tested."""
        return any("could not be saved: testing the last ones" in line for line in self.log)

    def any_trainer(self) -> Trainer:
        return self.random.choice(self.trainers())

    def host_of(self, trainer: Trainer) -> Host:
        (host,) = (host for host in self.laboratory.workers if host.address == trainer.host)
        return host

    def finish(self, seconds: float = PATIENCE) -> dict[str, Any]:
        """Waits until the job has completed, and returns its summary."""
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
    """Returns the epochs in whose surviving updates an example was lost or repeated."""
    names = ("examples", "example_checksum")
    return [
        record
        for record, expected in zip(summary["epoch_records"], undisturbed["epoch_records"], strict=True)
        if [record[name] for name in names] != [expected[name] for name in names]
    ]


def gauc_difference(job: Job, summary: dict[str, Any], undisturbed: dict[str, Any]) -> float:
    """Returns how far a job's test GAUC is from the undisturbed one's with the same weights, its best or its last."""
    return abs(summary["test_gauc"] - undisturbed["last_gauc" if job.lost_best_weights else "test_gauc"])


def check(job: Job, summary: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """Checks that a job ended as an undisturbed one does.

    Raises:
        FaultError: examples were lost or repeated, or the model learned something else.
    """
    wrong = wrong_epochs(summary, undisturbed)
    difference = gauc_difference(job, summary, undisturbed)
    if wrong or difference > 0.003 or summary["steps"] != undisturbed["steps"]:
        raise FaultError(
            f"epochs with lost or doubled examples: {wrong}; steps {summary['steps']} of {undisturbed['steps']}; GAUC "
            f"differs by {difference:.4f}"
        )


def _lose(job: Job, trainer: Trainer, how: Callable[[], None]) -> None:
    """Takes a worker away by `how`, and waits until the others continue without it."""
    resets = len(job.records("elastic"))
    how()
    job.wait(
        f"the others to go on without {trainer.host}",
        lambda: any(record["world_size"] < NUM_WORKERS for record in job.records("elastic")[resets:]),
    )


def kill_worker(job: Job) -> None:
    """Kills a worker that is not the chief."""
    trainer = job.follower()
    _lose(job, trainer, lambda: trainer.signal(signal.SIGKILL))


def kill_chief(job: Job) -> None:
    """Kills the chief."""
    trainer = job.chief()
    _lose(job, trainer, lambda: trainer.signal(signal.SIGKILL))


def evict(job: Job) -> None:
    """Sends SIGTERM to a worker; no update may be undone by it."""
    trainer = job.any_trainer()
    steps = len(job.records("train"))
    _lose(job, trainer, lambda: trainer.signal(signal.SIGTERM))
    made = [record["step"] for record in job.records("train")[steps - 1 :]]
    if made != sorted(set(made)):
        raise FaultError(f"an eviction must not undo updates. Received: {made}")


def stop_worker(job: Job) -> None:
    """Sends SIGSTOP to a trainer alone, while its agent lives."""
    trainer = job.any_trainer()
    _lose(job, trainer, lambda: trainer.signal(signal.SIGSTOP))


def freeze_host(job: Job) -> None:
    """Stops the trainer and the agent of a worker, as on a machine that hangs: nobody there can report it."""
    trainer = job.any_trainer()
    _lose(job, trainer, lambda: trainer.signal(signal.SIGSTOP, agent_too=True))
    trainer.signal(signal.SIGCONT, agent_too=True)  # the machine continues at last: leftover processes must end unaided


def reset_host(job: Job) -> None:
    """Kills everything on a host without notice; it answers again soon, but knows nothing of old connections."""
    trainer = job.any_trainer()
    host = job.host_of(trainer)

    def reset() -> None:
        forget = "echo 1 >/proc/sys/net/ipv4/tcp_orphan_retries"  # connections go with their processes, as on a reset
        subprocess.run(host.command(["sh", "-c", forget]), check=True)
        host.unplug()
        for pid in _pids_in(host):
            with contextlib.suppress(OSError):
                if not _LISTENING.match(Path(f"/proc/{pid}/cmdline").read_bytes()):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(job.laboratory.stall_timeout_seconds / 2)
        host.plug_in()

    _lose(job, trainer, reset)


def cut_cable(job: Job) -> None:
    """Unplugs a host for longer than `--stall_timeout_seconds`."""
    trainer = job.any_trainer()
    host = job.host_of(trainer)
    _lose(job, trainer, host.unplug)
    time.sleep(job.random.uniform(0, 5))
    host.plug_in()


def cut_cable_briefly(job: Job) -> None:
    """Unplugs a host for 0.5 to 4 seconds."""
    host = job.host_of(job.any_trainer())
    host.unplug()
    time.sleep(job.random.uniform(0.5, 4))
    host.plug_in()


def lose_packets(job: Job) -> None:
    """Loses 5 % of the packets of a host for a while."""
    host = job.host_of(job.any_trainer())
    host.disturb(loss=0.05)
    time.sleep(job.laboratory.disturbance_seconds)
    host.disturb()


def delay_packets(job: Job) -> None:
    """Delays the packets of a host by 50 ms for a while."""
    host = job.host_of(job.any_trainer())
    host.disturb(delay_ms=50)
    time.sleep(job.laboratory.disturbance_seconds)
    host.disturb()


def change_bytes(job: Job) -> None:
    """Changes bytes so that TCP does not notice, until the workers notice and part.

    They say so before they meet again, which no cable that changes bytes need allow.
    """
    host = job.host_of(job.any_trainer())
    partings, before = job.partings(), host.disturb(changed=0.02)
    job.wait("the workers to part", lambda: job.partings() > partings)
    if host.disturb() == before:
        raise FaultError("no byte has changed")


def take_host_and_add_it(job: Job) -> None:
    """Takes a host from the list of hosts and adds it again: an orderly change."""
    trainer = job.any_trainer()
    left = [host for host in job.laboratory.workers if host.address != trainer.host]
    _lose(job, trainer, lambda: job.list_hosts(left))
    job.list_hosts(job.laboratory.workers)


def fill_disk(job: Job) -> None:
    """Fills the output disk until a checkpoint has failed."""

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
    """Freezes the output disk until a checkpoint is given up and updates continue, then waits for the next one."""
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
    """Makes the data disk of a host stick; its worker may not even be killable before the disk answers."""
    trainer, said = job.any_trainer(), len(job.log)
    disk = job.laboratory.data_disks[trainer.host]
    try:
        _lose(job, trainer, lambda: disk.stick(killable=job.random.random() < 0.5))
    finally:
        disk.release()
    data = str(job.laboratory.folder / "data")
    if not any("a disk must answer" in line and data in line for line in job.log[said:]):
        raise FaultError(f"a worker must say that it waits for its data:\n{job.tail()}")


def fail_data(job: Job) -> None:
    """Makes reads of a host's data fail. The host is left out until the job is started again."""
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
    deadline = time.monotonic() + PATIENCE
    while job.running or job.trainers():
        if time.monotonic() > deadline:
            raise FaultError(f"still there: launcher {job.running}, trainers {job.trainers()}")
        time.sleep(0.2)
    job.start()


def kill_driver(job: Job) -> None:
    """Kills the driver of Horovod."""
    driver = _descendant(job.process.pid, "horovodrun")
    os.kill(driver, signal.SIGKILL)
    code = job.process.wait(timeout=PATIENCE)
    if code != 75:
        raise FaultError(f"without its driver a job must end with code 75. Received: {code}\n{job.tail()}")
    _restart(job)


def kill_launcher(job: Job) -> None:
    """Kills all processes on the launcher's host."""
    for pid in _pids_in(job.laboratory.launcher):
        name = Path(f"/proc/{pid}/comm")
        with contextlib.suppress(OSError):
            if "sshd" not in name.read_text():
                os.kill(pid, signal.SIGKILL)
    job.process.wait()
    _restart(job)


def stop_job(job: Job) -> None:
    """Sends SIGTERM to the launcher."""
    _stop(job)
    _restart(job)


def end_after_this_epoch(job: Job) -> None:
    """Stops the job, and starts it again so that it ends with the epoch it has begun."""
    _stop(job)
    job.epochs = 1 + max((record["epoch"] for record in job.records("epoch")), default=0)
    _restart(job)


def _stop(job: Job) -> None:
    before = job.step()
    job.process.terminate()
    code = job.process.wait(timeout=PATIENCE)
    if code != 75:
        raise FaultError(f"a stopped job must end with code 75. Received: {code}\n{job.tail()}")
    saved = max(int(path.name.removeprefix("step-")) for path in (job.output / "checkpoints").glob("step-*"))
    if saved < before:
        raise FaultError(f"a stopped job must save where it stands. Received: step {saved} after step {before}")


def _cut_off_launcher(job: Job, direction: str) -> None:
    """Cuts the launcher off for longer than `--stall_timeout_seconds`; the workers save and stop by themselves."""
    before, said = job.step(), len(job.log)
    job.laboratory.launcher.disturb(cut=direction)
    code = job.process.wait(timeout=job.laboratory.stall_timeout_seconds + PATIENCE)
    job.laboratory.launcher.disturb()
    words = "".join(job.log[said:])
    if code != 75 or "Traceback" in words:
        raise FaultError(f"a launcher that is cut off must end with code 75 and a line. Received: {code}\n{words}")
    _restart(job)
    saved = max(int(path.name.removeprefix("step-")) for path in (job.output / "checkpoints").glob("step-*"))
    if saved < before:
        raise FaultError(f"the workers must save where they stand. Received: step {saved} after step {before}")


def do_not_hear_launcher(job: Job) -> None:
    """Loses what the launcher sends."""
    _cut_off_launcher(job, "from")


def do_not_let_launcher_hear(job: Job) -> None:
    """Loses what is sent to the launcher."""
    _cut_off_launcher(job, "to")


def kill_all_workers(job: Job) -> None:
    """Kills all trainers, as a power cut of all hosts but the launcher's would."""
    for trainer in job.trainers():
        trainer.signal(signal.SIGKILL)
    job.process.wait(timeout=PATIENCE)
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
    """Returns the seconds from a fault at `since` to the first update of the workers that were left or restarted.

    If no worker was lost, returns the longest time without an update.
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
