"""The hosts of a job: reads the user's list of them and finds which ones answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import re
import socket
import subprocess
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar, Self

from din_dist.cluster.addresses import addresses_of, is_own
from din_dist.cluster.slurm import hosts_of_slurm
from din_dist.errors import InputError
from din_dist.files import read_text, write_text
from din_dist.place import SlurmJob

_NAME = r"([A-Za-z0-9][A-Za-z0-9._-]*)"
_SHORT = re.compile(_NAME + r"(?::([1-9][0-9]*))?")
_LONG = re.compile(_NAME + r"\s+slots\s*=\s*([1-9][0-9]*)(?:\s+max_slots\s*=\s*[0-9]+)?")  # as in MPI
PROBE_SECONDS = 3.0
_LOOK_SECONDS = 0.01  # between two checks of a name lookup
NOTED_SECONDS = 3.0  # after which Horovod has noticed that a worker ended


@dataclasses.dataclass(frozen=True)
class HostSlots:
    """A host and the number of workers that it may run."""

    name: str
    slots: int = 1

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"

    @classmethod
    def parse(cls, text: str, default_slots: int = 1) -> Self | None:
        """Parses HOST, HOST:SLOTS or HOST slots=SLOTS; returns None for any other text."""
        match = _SHORT.fullmatch(text) or _LONG.fullmatch(text)
        return cls(match[1], int(match[2] or default_slots)) if match else None


def parse_hosts(text: str, default_slots: int = 1) -> list[HostSlots]:
    """Parses the value of `--hosts`: HOST:SLOTS,HOST:SLOTS,... or slurm.

    Raises:
        InputError: the text has another form.
    """
    if text == "slurm":
        return [HostSlots(name, slots) for name, slots in hosts_of_slurm(SlurmJob.from_environment(), default_slots)]
    found = [HostSlots.parse(part.strip(), default_slots) for part in text.split(",")]
    if None in found:
        raise InputError(
            f"--hosts: must be HOST or HOST:SLOTS, comma-separated, or slurm. Received: {text!r}. Correct it."
        )
    return [host for host in found if host]


def read_hosts_file(path: str, default_slots: int = 1) -> list[HostSlots]:
    """Reads a `--hosts_file`: a line HOST, HOST:SLOTS or HOST slots=SLOTS for each host; # begins a comment.

    Raises:
        InputError: the file cannot be read, names no host, or has a line of another form.
    """
    try:
        lines = read_text(Path(path)).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--hosts_file: must be a file with a line HOST:SLOTS for each host. Received: {path!r}, which cannot be "
            "read. Correct the path."
        ) from error
    found = []
    for number, line in enumerate(lines, start=1):
        if text := line.partition("#")[0].strip():
            host = HostSlots.parse(text, default_slots)
            if host is None:
                raise InputError(
                    f"--hosts_file: must have a line HOST or HOST:SLOTS for each host. Received: {path}, line "
                    f"{number}: {text}. Correct it."
                )
            found.append(host)
    if not found:
        raise InputError(
            f"--hosts_file: must have a line HOST or HOST:SLOTS for each host. Received: {path}, which names none. "
            "Add one."
        )
    return found


def is_local(name: str) -> bool:
    """Returns True for a host that is this machine: Horovod starts workers there without ssh."""
    try:
        return _is_local(name)
    except OSError:
        return False  # not cached, because a container may learn its own name late


@functools.cache
def _is_local(name: str) -> bool:
    # RFC 6761 reserves this name, so no name server is asked.
    return name == "localhost" or is_own(socket.gethostbyname(name))


class _Lookup:
    """Looks up a host name in a thread, because a name server may not answer."""

    _pending: ClassVar[dict[str, _Lookup]] = {}  # one for each name, however long the name server takes

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_done = self._is_local = False
        self._addresses: list[str] = []
        threading.Thread(target=self._run, daemon=True).start()  # the process may end before it

    def _run(self) -> None:
        self._is_local = is_local(self._name)
        if not self._is_local:
            self._addresses = addresses_of(self._name)
        self._is_done = True

    @staticmethod
    async def of(name: str) -> tuple[bool, list[str]]:
        """Returns True for this machine, or False and the addresses that were found in time."""
        lookup = _Lookup._pending.get(name) or _Lookup(name)
        _Lookup._pending[name] = lookup
        until = time.monotonic() + PROBE_SECONDS
        while not lookup._is_done and time.monotonic() < until:
            await asyncio.sleep(_LOOK_SECONDS)
        if lookup._is_done:
            _Lookup._pending.pop(name, None)
        return lookup._is_local, lookup._addresses


async def wait_for_ssh(names: Sequence[str], port: int, seconds: float) -> list[str]:
    """Returns the hosts on other machines whose ssh server does not answer within `seconds`."""
    until = time.monotonic() + seconds
    silent = list(names)
    while True:
        answered = await asyncio.gather(*(_is_ready(name, port) for name in silent))
        silent = [name for name, answer in zip(silent, answered, strict=True) if not answer]
        if not silent or time.monotonic() >= until:
            return silent
        await asyncio.sleep(1)


async def _is_ready(name: str, port: int) -> bool:
    """Returns True when workers can be started on a host now. The event loop continues meanwhile."""
    here, addresses = await _Lookup.of(name)
    return here or any(await asyncio.gather(*(_answers(address, port) for address in addresses)))


async def _answers(address: str, port: int) -> bool:
    """Returns True when an ssh server sends its greeting. A proxy may accept a connection before there is a server."""
    with contextlib.suppress(OSError, EOFError, TimeoutError):
        async with asyncio.timeout(PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                return await reader.readexactly(4) == b"SSH-"
            finally:
                writer.close()
    return False


class HostList:
    """The hosts that an elastic job may use now: those in the file or the cluster that answer.

    Horovod assumes that every listed host works. The whole job waits while Horovod tries to reach one that does not.

    Args:
        discover: a command that prints all hosts.
        path: the file from which Horovod reads the hosts.
        ssh_port: the port of the hosts' ssh servers.
        patience_seconds: a host that answered within this time still counts as working.
        default_slots: the slots of a host that is named without.
    """

    def __init__(
        self, discover: Sequence[str], path: Path, ssh_port: int, patience_seconds: float, default_slots: int = 1
    ) -> None:
        self._discover, self._path, self._ssh_port, self._default_slots = discover, path, ssh_port, default_slots
        self.patience_seconds = patience_seconds
        self._answered: dict[str, float] = {}  # host -> last time
        self._had_workers: dict[str, float] = {}  # host -> last time
        self._told: set[str] = set()
        self.silent: set[str] = set()
        self.refused: set[str] = set()  # left out until the job ends; others add to it

    async def refresh(self, at_work: Collection[str], with_workers: Collection[str] = ()) -> None:
        """Finds which hosts answer and writes them to Horovod's file.

        Args:
            at_work: hosts of workers whose heartbeat arrived just now.
            with_workers: hosts of workers for which Horovod still waits.

        Raises:
            InputError: the command printed no hosts. The list stays as it was.
        """
        now = time.monotonic()
        listed = await self._listed()
        await asyncio.gather(*(self._probe(host.name, now) for host in listed if host.name not in at_work))
        for name in at_work:
            self._answered[name] = now
        # A host that answered a moment ago may be busy. Taking it from the list would end its workers.
        recent = {name for name, when in self._answered.items() if now - when < self.patience_seconds}
        self.silent = {host.name for host in listed} - recent
        # When a host comes back, Horovod would take the end of its old workers for the end of the new ones, and the job
        # for done. So the host is listed only after its old workers have ended and Horovod has noticed.
        self._had_workers |= dict.fromkeys({*at_work, *with_workers}, now)
        lingering = {name for name, when in self._had_workers.items() if now - when < NOTED_SECONDS} - self._told
        told = [host for host in listed if host.name in recent - self.refused - lingering]
        self._told = {host.name for host in told}
        write_text(self._path, "".join(f"{host}\n" for host in told), durable=False)

    async def _listed(self) -> list[HostSlots]:
        process = await asyncio.create_subprocess_exec(*self._discover, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = await process.communicate()
        if process.returncode:
            said = errors.decode(errors="replace").strip().rpartition("\n")[2] or f"exit code {process.returncode}"
            raise InputError(f"{self._discover[0]} must print the hosts. Received: {said}. Correct that.")
        lines = output.decode(errors="replace").splitlines()
        parsed = [HostSlots.parse(line.strip(), self._default_slots) for line in lines]
        return [host for host in parsed if host]  # a half-written line must not end the job

    async def _probe(self, name: str, now: float) -> None:
        if await _is_ready(name, self._ssh_port):
            self._answered[name] = now
