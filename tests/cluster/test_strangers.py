"""Jobs on two hosts, beside another host whose people and programs have no business there.

No host's own name is known to anybody, and the second one's network card has another name than the first one's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import host_lab
from tests.support.host_lab import Host
from tests.support.overlays import render
from tests.support.patience import PATIENCE
from tests.support.programs import missing
from tests.support.repository import ROOT

SECRET = f"planted-{secrets.token_hex(8)}"
OPEN_FILES = 256
FLAGS = (
    *host_lab.SMALL_JOB,
    "--global_batch_size=64",
    "--epochs=100000",
    "--noxla",
    "--metrics_host=0.0.0.0",
    "--log_every_steps=1",
)

# As another user of the machine: every command line and every readable environment there is, to the end of stdin.
WATCHER = """
import pathlib, select, sys
seen = set()
while not select.select([sys.stdin], [], [], 0)[0]:
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                text = (entry / name).read_bytes()
            except OSError:
                continue
            if text and (name, text) not in seen:
                seen.add((name, text))
                print(name, text, flush=True)
"""

# Besets each ADDRESS PORT of stdin, in every way at once, until stdin ends.
ATTACKER = r"""
import contextlib, os, pickle, socket, struct, sys, threading, time
trap, held = sys.argv[1], []
class Trap:
    def __reduce__(self):
        return os.mkdir, (trap,)
pickled = pickle.dumps(Trap())
def connect(place):
    link = socket.create_connection(place, timeout=5)
    held.append(link)
    return link
def send(place, *pieces, pause=0.0):
    with contextlib.suppress(OSError):
        link = connect(place)
        for piece in pieces:
            link.sendall(piece)
            time.sleep(pause)
def put(path, body):
    return b"PUT %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(body), body)
def beset(place):
    import base64
    for path in ("/worker_addresses/%s:0" % place[0], "/worker_addresses/localhost:0", "/global/0", "/global/1"):
        for body in (pickled, base64.b64encode(pickled)):
            send(place, put(path, body))
    send(place, bytes(32) + struct.pack("i", len(pickled)) + pickled)
    send(place, b"PUT /global/0 HTTP/1.1\r\nContent-Length: 100000000000\r\n\r\n", *[bytes(1 << 20)] * 64)
    send(place, b'{"token": "x", "host": "h", "local_rank": 0, "rank": 0}\n' + b"[" * 100_000)
    for _ in range(4):
        threading.Thread(target=send, args=(place, *[b"x"] * 600), kwargs={"pause": 0.5}, daemon=True).start()
    for _ in range(300):
        with contextlib.suppress(OSError):
            connect(place)
for line in sys.stdin:
    address, port = line.split()
    threading.Thread(target=beset, args=((address, int(port)),), daemon=True).start()
os._exit(0)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[list[Host]]:
    try:
        with host_lab.hosts(3, own_names=False) as hosts:
            hosts[1].rename_card("eth0", "wan0")
            yield hosts
    except host_lab.LabError as error:
        missing(str(error))


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """What another user of the machine gets to see meanwhile."""
    if not (setpriv := shutil.which("setpriv")):
        missing("setpriv is not installed: apt-get install util-linux")
    nobody = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/env", "-i"]
    seen: list[str] = []
    with subprocess.Popen(
        [*nobody, python_for_nobody(), "-c", WATCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as watcher:
        reader = threading.Thread(target=seen.extend, args=(watcher.stdout,))
        reader.start()
        yield seen
        assert watcher.stdin
        watcher.stdin.close()
        reader.join()
    assert watcher.returncode == 0


def python_for_nobody() -> str:
    """One that every user may run: this one may lie in root's home."""
    found = shutil.which("python3", path="/usr/bin:/bin")
    if not found:
        missing("python3 is not installed: apt-get install python3")
    return found


@dataclasses.dataclass
class Job:
    """A job that runs; `said` is its stderr so far."""

    process: subprocess.Popen[str]
    said: list[str]
    output: Path

    def records(self, kind: str) -> list[dict]:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.output / "metrics.jsonl").read_text().splitlines()
            return [record for line in lines if line.endswith("}") and (record := json.loads(line))["kind"] == kind]
        return []

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, (what, self.process.returncode, self.tail())
            assert time.monotonic() < deadline, (what, self.tail())
            time.sleep(0.1)

    def tail(self) -> str:
        return "".join(line for line in self.said if not line.startswith("step "))[-3000:]

    def wait_for_steps(self, more: int = 20) -> None:
        def step() -> int:
            records = self.records("train")
            return records[-1]["step"] if records else 0

        self.wait("a first step", lambda: step() > 0)
        before = step()
        self.wait("steps", lambda: step() >= before + more)

    def stop(self) -> None:
        """As an operator does."""
        self.process.terminate()
        assert self.process.wait(timeout=PATIENCE) == 75, self.tail()

    def processes(self) -> list[int]:
        """The launcher's, Horovod's, and those of the workers, on all hosts."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"--output_dir={self.output}".encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found


@contextlib.contextmanager
def running(launcher: Host, folder: Path, *flags: str, **variables: str) -> Iterator[Job]:
    output = folder / "run"
    limited = ["prlimit", f"--nofile={OPEN_FILES}:{OPEN_FILES}", str(ROOT / "launch" / "train.sh")]
    command = [*limited, f"--data_dir={folder}/data", f"--output_dir={output}", *flags, *FLAGS]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("DIN_DIST_", "HOROVOD_"))},
        **{"DIN_DIST_VENV": str(Path(sys.executable).parents[1]), "DIN_DIST_DEVICE": "cpu"},
        **{"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "somewhere", **variables},
    }
    said: list[str] = []
    with subprocess.Popen(
        launcher.command(command), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        reader = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
        reader.start()
        job = Job(process, said, output)
        try:
            yield job
        finally:
            process.kill()
            for pid in job.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def listeners(host: Host) -> set[tuple[str, int]]:
    """What is listened to on a host, but for sshd."""
    listed = subprocess.run(host.command(["ss", "-Hltn"]), capture_output=True, text=True, check=True).stdout
    found = (line.split()[3].rpartition(":") for line in listed.splitlines())
    return {(address, int(port)) for address, _, port in found if port != "22"}


@contextlib.contextmanager
def beset(stranger: Host, hosts: Sequence[Host], trap: Path) -> Iterator[set[tuple[str, int]]]:
    """Has the stranger at every port of the hosts, also at those that open only for a moment; gives those so far."""
    found: set[tuple[str, int]] = set()
    done = threading.Event()

    def tell(attacker: subprocess.Popen[str]) -> None:
        assert attacker.stdin
        while not done.is_set():
            for host in hosts:
                for _, port in listeners(host):
                    if (host.address, port) not in found:
                        found.add((host.address, port))
                        attacker.stdin.write(f"{host.address} {port}\n")
                        attacker.stdin.flush()

    command = [sys.executable, "-c", ATTACKER, str(trap)]
    with subprocess.Popen(stranger.command(command), stdin=subprocess.PIPE, text=True) as attacker:
        teller = threading.Thread(target=tell, args=(attacker,))
        teller.start()
        yield found
        done.set()
        teller.join()
        attacker.kill()


def variables_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def agents(job: Job) -> list[dict[str, str]]:
    """The environments of the workers' agents, by rank."""
    found = []
    for pid in job.processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"din_dist.cluster.agent" in words and b"python" in words[0] and "HOROVOD_RANK" in variables_of(pid):
                found.append(variables_of(pid))
    return sorted(found, key=lambda variables: variables["HOROVOD_RANK"])


def check_that_nobody_saw(seen: list[str], key: str, job: Job) -> None:
    """Neither secrets nor any variable, though the watcher saw all that runs."""
    of_job = [line for line in seen if line.startswith("cmdline") and str(job.output) in line]
    assert any("din_dist.cluster.agent" in line for line in of_job)
    assert any("horovodrun" in line for line in of_job)
    assert any("sh -s" in line for line in seen)
    for hidden in (SECRET, key):
        assert not [line for line in seen if hidden in line]
    assert not [line for line in of_job if "HOROVOD_" in line or "somewhere" in line]


def test_a_static_job_shows_nothing_and_lets_nobody_in(lab: list[Host], tmp_path: Path, watched: list[str]) -> None:
    first, second, stranger = lab
    hosts = f"--hosts={first.address}:1,{second.address}:1"
    flags = (hosts, "--stall_timeout_seconds=20", "--pass_environment=AWS_REGION")
    with beset(stranger, [first, second], tmp_path / "sprung") as found, running(first, tmp_path, *flags) as job:
        job.wait_for_steps(40)  # with the stranger at each port from its first moment on
        here, there = agents(job)
        assert len(found) >= 4, "the launcher's link, the store, and the metrics of two ranks"
        own = {(address, port) for host in (first, second) for address, port in listeners(host)}
        outside = {port for address, port in own if address in ("0.0.0.0", "*", "[::]")}
        metrics = {int(line.split(":")[-1]) for line in targets(job)}
        assert outside == metrics, "which --metrics_host=0.0.0.0 asks for"
        assert all(any(low <= port <= high for low, high in let_through()) for _, port in found)
        job.stop()
    assert not (tmp_path / "sprung").exists()
    key = here["HOROVOD_SECRET_KEY"]
    assert there["HOROVOD_SECRET_KEY"] == key
    assert len(key) == 64
    assert here["AWS_SECRET_ACCESS_KEY"] == SECRET, "a worker on this host is the user's own"
    assert "AWS_SECRET_ACCESS_KEY" not in there
    assert there["AWS_REGION"] == "somewhere", "it was named"
    check_that_nobody_saw(watched, key, job)


def let_through() -> list[tuple[int, int]]:
    """The ports at which Kubernetes' pods of a job reach each other, by their NetworkPolicy."""
    (policy,) = (each for each in render("smoke-cpu") if each["kind"] == "NetworkPolicy")
    ports = policy["spec"]["ingress"][0]["ports"]
    return [(port["port"], port.get("endPort", port["port"])) for port in ports]


def targets(job: Job) -> list[str]:
    return [target for group in json.loads((job.output / "targets.json").read_text()) for target in group["targets"]]


@pytest.mark.thorough
def test_an_elastic_job_goes_on_among_strangers(lab: list[Host], tmp_path: Path, watched: list[str]) -> None:
    first, second, stranger = lab
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{first.address}:1\n{second.address}:1\n")
    flags = ("--elastic", f"--hosts_file={hosts}", "--stall_timeout_seconds=20", "--host_cooldown_seconds=1")
    with running(first, tmp_path, *flags) as job:
        job.wait_for_steps(5)
        key = agents(job)[0]["HOROVOD_SECRET_KEY"]
        with beset(stranger, [first, second], tmp_path / "sprung") as found, measured(job) as most:
            job.wait_for_steps(60)
            before = len(job.records("elastic"))
            os.kill(trainer_on(job, second), signal.SIGKILL)
            job.wait("one worker to go on", lambda: worlds(job)[before:][:1] == [1])
            job.wait("the other to come back", lambda: 2 in worlds(job)[before:])
            job.wait_for_steps(20)
        assert len(found) > 4, "also those that ranks open to meet"
        job.stop()
    assert not (tmp_path / "sprung").exists()
    check_that_nobody_saw(watched, key, job)
    assert most.files < OPEN_FILES - 20
    assert most.threads_gained < 150
    assert most.megabytes_gained < 300


def worlds(job: Job) -> list[int]:
    return [record["world_size"] for record in job.records("elastic")]


def trainer_on(job: Job, host: Host) -> int:
    for pid in job.processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"din_dist.cli.train" in words and variables_of(pid).get("HOROVOD_HOSTNAME") == host.address:
                return pid
    raise AssertionError(f"no trainer on {host.address}")


@dataclasses.dataclass
class Most:
    """The most of any one process of a job, and beyond what it had at first."""

    files: int = 0
    threads_gained: int = 0
    megabytes_gained: float = 0.0


@contextlib.contextmanager
def measured(job: Job) -> Iterator[Most]:
    """Looks at the processes that there are at the start."""
    most, done = Most(), threading.Event()

    def usage(pid: int) -> tuple[int, int, float]:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return files, int(status["Threads"]), int(status["VmRSS"].split()[0]) / 1024

    def watch(before: dict[int, tuple[int, int, float]]) -> None:
        while not done.wait(0.2):
            for pid, (_, threads, megabytes) in before.items():
                with contextlib.suppress(OSError, KeyError):  # it has ended
                    files, threads_now, megabytes_now = usage(pid)
                    most.files = max(most.files, files)
                    most.threads_gained = max(most.threads_gained, threads_now - threads)
                    most.megabytes_gained = max(most.megabytes_gained, megabytes_now - megabytes)

    watcher = threading.Thread(target=watch, args=({pid: usage(pid) for pid in job.processes()},))
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


@pytest.mark.thorough  # test_addresses.py has such machines too
def test_a_machine_whose_name_nobody_knows(lab: list[Host], tmp_path: Path) -> None:
    """With the flags of anybody. (The elastic job above took a worker in on such hosts.)"""
    with running(lab[0], tmp_path, "--num_workers=2") as job:
        job.wait_for_steps(5)
        job.stop()
