"""Runs a job's workers, under Horovod's driver or a single one without, and finds the job's exit code.

Each worker has an agent (`agent.py`) with a link to the supervisor. A stop reaches every host over the links, and exit
codes come back. The supervisor ends a worker that falls silent, for which Horovod itself would wait forever.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import BinaryIO

import psutil

from din_dist import environment
from din_dist.cluster.hosts import HostList
from din_dist.cluster.link import BEAT_SECONDS, LONGEST_LINE, Seal, new_nonce
from din_dist.cluster.processes import die_with_parent, exit_code
from din_dist.errors import EXIT_GAVE_UP, EXIT_HUNG, EXIT_INPUT_ERROR, EXIT_RETRY, InputError
from din_dist.place import LauncherAddress, Place, program, variables_of_agents, wants_horovods_log
from din_dist.text import printable, printable_line

_GIVING_UP_SECONDS = 5.0  # within which the other workers give up too
_ENDING_SECONDS = 30.0  # for agents to stop their trainers when Horovod's driver is gone
_LEFT_OVER_SECONDS = 25.0  # within which an agent without a link stops its trainer
_LAST_WORDS_SECONDS = 5.0  # within which the last message of an agent arrives after its end
_HELLO_SECONDS = 10.0
_MOST_STRANGERS = 64  # connections that have not introduced themselves; the oldest makes room for a new one
_ACCEPTED_AT_ONCE = 16
_LOOPBACK = "127.0.0.1"
_NOISE = b"Horovod background loop uncaught exception"
_PREFIX = re.compile(rb"\[(\d+)\]<(stdout|stderr)>:(.*)", re.DOTALL)


@dataclasses.dataclass(eq=False)
class _Worker:
    """A worker whose agent has introduced itself."""

    host: str
    local_rank: int
    rank: int
    writer: asyncio.StreamWriter
    seal: Seal
    heard: float
    has_ended: bool = False  # its agent has sent its exit code

    def tell(self, message: dict[str, int | bool]) -> None:
        """Sends a message to the worker's agent."""
        with contextlib.suppress(OSError, RuntimeError):  # the reader finds out that it is gone
            self.writer.write(self.seal.encode(message))


class Supervisor:
    """One job, from its start to its exit code.

    Args:
        command: starts the agents: `horovodrun ...`, or a single agent where `horovod` is False.
        horovod: the command is Horovod's driver.
        address: the address of this machine at which all agents reach it. Nobody else needs to.
        stall_timeout_seconds: a worker that is silent for longer is treated as lost.
        hosts: the hosts of an elastic job, refreshed while it runs; None for any other job.
        log_dir: the folder for a file of each rank's output; only with `horovod`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        horovod: bool,
        address: str,
        stall_timeout_seconds: float,
        hosts: HostList | None = None,
        log_dir: Path | None = None,
    ) -> None:
        self._command, self._horovod, self._address = command, horovod, address
        self._stall_timeout_seconds, self._hosts = stall_timeout_seconds, hosts
        self._elastic = hosts is not None
        self._log_dir = log_dir
        self._key = secrets.token_hex(32)
        self._strangers: collections.OrderedDict[asyncio.StreamWriter, None] = collections.OrderedDict()
        self._chores: set[asyncio.Task[None]] = set()
        self._workers: set[_Worker] = set()
        self._out_of_reach = False  # all workers left without saying why
        self._failures: list[tuple[int, int]] = []  # rank and exit code, in order of arrival
        self._stop_level = 0
        self._gave_up = self._killed = self._done = False
        self._silent: set[str] = set()
        self._horovodrun_said: list[bytes] = []

    def run(self) -> int:
        """Runs the job; returns its exit code."""
        return asyncio.run(self._run())

    async def _run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in environment.ending_signals():
            loop.add_signal_handler(number, self._stop, number)
        listener = socket.create_server((self._address, 0))
        # Asyncio accepts a whole backlog before it serves any, so its backlog stays far below the limit of open files.
        server = await asyncio.start_server(self._serve, sock=listener, backlog=_ACCEPTED_AT_ONCE, limit=LONGEST_LINE)
        listener.listen(1024)
        address = LauncherAddress(self._address, listener.getsockname()[1], self._stall_timeout_seconds)
        if self._hosts:
            await self._refresh_hosts(self._hosts, set())
        self._process = subprocess.Popen(
            self._command,
            env={**os.environ, **variables_of_agents(address, self._key, job=secrets.token_hex(8))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if self._horovod else None,
            stderr=subprocess.PIPE if self._horovod else None,
            start_new_session=True,  # so that Ctrl-C does not reach it before `_stop` runs
            # Without the supervisor it would wait for hosts forever. Its children still end their workers gently.
            preexec_fn=die_with_parent if self._horovod else None,
        )
        pumps = self._start_pumps()
        self._begin(self._beat())
        if self._hosts:
            self._begin(self._keep_hosts(self._hosts))
        code = exit_code(await asyncio.to_thread(self._process.wait))
        if not self._killed:
            # The end of a process may be noticed before its last message arrives over the link.
            await self._wait_for_workers(_LAST_WORDS_SECONDS)
            if self._workers and not self._done:
                await self._end_orphans()
        for chore in list(self._chores):
            chore.cancel()
        for pump in pumps:
            await asyncio.to_thread(pump.join, 10)
        server.close()
        return self._verdict(code)

    def _begin(self, chore: Coroutine[None, None, None]) -> None:
        """Starts a background task that ends with the job at the latest."""
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one agent until its link ends."""
        worker: _Worker | None = None
        try:
            worker = await self._meet(reader, writer)
            self._workers.add(worker)
            self._out_of_reach = False
            worker.tell({"stop": self._stop_level} if self._stop_level else {})
            while line := await reader.readline():
                message = worker.seal.decode(line)
                worker.heard = time.monotonic()
                if "ended" in message:
                    self._note_end(worker, message["ended"])
                if "parted" in message:
                    self._note_silence(worker)
        except (OSError, ValueError, KeyError, TypeError, TimeoutError, asyncio.CancelledError):
            pass  # the link broke, it was a stranger's, or the job has ended
        finally:
            if worker:
                self._workers.discard(worker)
                if not worker.has_ended and self._process.poll() is None:
                    self._begin(self._end_left_over(worker))
            writer.close()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Worker:
        """Waits until an agent has introduced itself.

        Raises:
            OSError, ValueError, KeyError, TypeError, TimeoutError: it is a stranger, or took too long.
        """
        self._strangers[writer] = None
        if len(self._strangers) > _MOST_STRANGERS:
            oldest, _ = self._strangers.popitem(last=False)
            oldest.transport.abort()
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                challenge = new_nonce()
                writer.write(challenge + b"\n")
                seal = Seal("launcher", self._key, challenge, (await reader.readline()).strip())
                hello = seal.decode(await reader.readline())
        finally:
            self._strangers.pop(writer, None)
        return _Worker(hello["host"], hello["local_rank"], hello["rank"], writer, seal, time.monotonic())

    def _note_silence(self, worker: _Worker) -> None:
        """Notes that messages no longer pass between a worker and this launcher; its agent stops the trainer."""
        self._workers.discard(worker)
        self._out_of_reach = not self._workers and self._address != _LOOPBACK

    def _note_end(self, worker: _Worker, code: int) -> None:
        worker.has_ended = True
        self._out_of_reach = False
        if code:
            self._failures.append((worker.rank, code))
        else:
            self._done = True  # a worker succeeds only when the whole job has
        if code == EXIT_INPUT_ERROR and self._hosts and worker.host and len({w.host for w in self._workers}) > 1:
            _say(f"{worker.host} is left out for good: its input is wrong, which trying again does not change")
            self._hosts.refused.add(worker.host)
        if code == EXIT_GAVE_UP and not self._gave_up:
            # It has saved because too few workers are left. Horovod would wait for others forever.
            self._gave_up = True
            asyncio.get_running_loop().call_later(_GIVING_UP_SECONDS, self._kill)

    async def _beat(self) -> None:
        while True:
            for worker in list(self._workers):
                worker.tell({})
                if time.monotonic() - worker.heard > self._stall_timeout_seconds:
                    self._note_silence(worker)
                    worker.tell({"given_up": True})
                    await asyncio.to_thread(self._end_silent, worker)
                    worker.writer.close()
            await asyncio.sleep(BEAT_SECONDS)

    def _end_silent(self, worker: _Worker) -> None:
        """Ends what Horovod's driver runs here for a silent worker: its processes, or the ssh to its host."""
        _say(
            f"worker {worker.rank} on {worker.host or 'this machine'} gave no sign of life for "
            f"{self._stall_timeout_seconds:g} s: it counts as lost"
        )
        if not self._horovod:
            self._kill()
            return
        _end(self._processes_of(worker))

    async def _end_left_over(self, worker: _Worker) -> None:
        """Ends the driver's processes for a worker whose link broke, once its agent had time to stop the trainer.

        The driver would otherwise wait for the ssh to a host that is gone.
        """
        if self._horovod:
            processes = await asyncio.to_thread(self._processes_of, worker)
            await asyncio.sleep(_LEFT_OVER_SECONDS)
            await asyncio.to_thread(_end, processes)

    def _processes_of(self, worker: _Worker) -> list[psutil.Process]:
        """Finds the driver's processes for a worker, shells first: a shell would report the end of its command."""
        found = []
        for process in _descendants(self._process.pid):
            with contextlib.suppress(psutil.Error):
                place = Place.from_environment(process.environ())
                if place.host and (place.host, place.local_rank) == (worker.host, worker.local_rank):
                    found.append(process)
        return found

    def _stop(self, number: int) -> None:
        """Asks the workers to finish their step and save; after a second Ctrl-C, to stop at once."""
        if self._stop_level == 0:
            self._stop_level = 1
        elif number == signal.SIGINT:
            self._stop_level = 2
        for worker in self._workers:
            worker.tell({"stop": self._stop_level})
        if not self._workers:
            self._kill()  # the driver still starts workers, or waits for hosts and heeds no signal

    def _kill(self) -> None:
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _end_orphans(self) -> None:
        """Stops the workers on other hosts after the driver has died."""
        _say("horovodrun ended before its workers: they stop after this step and a checkpoint")
        self._gave_up = True
        for worker in self._workers:
            worker.tell({"stop": 1})
        await self._wait_for_workers(_ENDING_SECONDS)

    async def _wait_for_workers(self, seconds: float) -> None:
        """Waits until all links are closed, but no longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while self._workers and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    async def _keep_hosts(self, hosts: HostList) -> None:
        problem = ""
        while True:
            await asyncio.sleep(1)
            try:
                await self._refresh_hosts(hosts, await asyncio.to_thread(_hosts_of_workers, self._process.pid))
                problem = ""
            except (InputError, OSError) as error:  # the file is being replaced, for example: the job continues
                if str(error) != problem:
                    _say(f"{error} The hosts known so far are kept.")
                problem = str(error)

    async def _refresh_hosts(self, hosts: HostList, with_workers: set[str]) -> None:
        await hosts.refresh({worker.host for worker in self._workers}, with_workers)
        for name in sorted(hosts.silent - self._silent):
            _say(f"{name} does not answer on its ssh port: left out until it does")
        for name in sorted(self._silent - hosts.silent):
            _say(f"{name} answers")
        self._silent = hosts.silent

    def _start_pumps(self) -> list[threading.Thread]:
        """Starts threads that pass on output, so that a terminal that takes none does not silence the links."""
        if not self._horovod:
            return []
        pumps = [
            threading.Thread(target=self._pump, args=(self._process.stdout, sys.stdout.buffer), daemon=True),
            threading.Thread(target=self._pump, args=(self._process.stderr, sys.stderr.buffer), daemon=True),
        ]
        for pump in pumps:
            pump.start()
        return pumps

    def _pump(self, source: BinaryIO, target: BinaryIO) -> None:
        """Passes on the workers' lines, which Horovod prefixes with `[RANK]<stdout>:`.

        Rank 0 speaks for the job, so its lines lose the prefix. Only the chief writes to stdout; in an elastic job the
        chief may change. Lines of horovodrun itself are kept for the case that no worker explains the failure.
        """
        for line in source:
            match = _PREFIX.match(line)
            if match is None:
                self._horovodrun_said.append(line)
                continue
            rank, stream, text = match.groups()
            if _NOISE in text and not wants_horovods_log():
                continue  # the trainer explains the consequence in its own words
            if self._log_dir:
                # Opened for each line, because an elastic job may run for weeks while its logs are rotated.
                with contextlib.suppress(OSError), Path(self._log_dir, f"rank-{int(rank)}.log").open("ab") as log:
                    log.write(text)
            # A line of --log_format=json holds its rank.
            named = stream == b"stderr" and rank != b"0" and not text.startswith(b"{")
            with contextlib.suppress(OSError, ValueError):
                target.write(b"[%s] %s" % (rank, text) if named else text)
                target.flush()

    def _verdict(self, code: int) -> int:
        if self._gave_up or (self._stop_level and self._killed and not self._failures):
            if not self._killed:
                self._repeat_horovodrun()  # it may say why it left its workers
            return EXIT_RETRY
        if code and self._out_of_reach and not self._done:
            _say(
                f"no worker gave a sign of life for {self._stall_timeout_seconds:g} s: this machine is cut off from "
                "them, and they save and stop. The same command resumes."
            )
            return EXIT_RETRY
        if self._elastic and code == 0 and not self._done and self._failures and self._failures[-1][1] == EXIT_RETRY:
            return EXIT_RETRY  # the last workers left, which Horovod takes for success
        if self._elastic and (code == 0 or self._done):
            return 0  # a worker that failed was not needed, even if Horovod took its late end for the job's
        if self._failures:
            return self._verdict_of_workers()
        if code:
            self._repeat_horovodrun()
        return code

    def _repeat_horovodrun(self) -> None:
        for line in self._horovodrun_said:
            sys.stderr.buffer.write(printable(line.decode(errors="replace")).encode())
        sys.stderr.flush()

    def _verdict_of_workers(self) -> int:
        if self._elastic and self._stop_level and self._failures[-1][1] == EXIT_RETRY:
            return EXIT_RETRY  # a worker that failed earlier was not needed
        # The first worker to fail takes the others down. In an elastic job the others continue, so the last one counts.
        # A worker that names a wrong input comes before both.
        wrong_input = [failure for failure in self._failures if failure[1] == EXIT_INPUT_ERROR]
        rank, code = (wrong_input or self._failures)[-1 if self._elastic and not wrong_input else 0]
        if code == 128 + signal.SIGKILL:
            _say(f"worker {rank} was killed (SIGKILL). Often memory ran out: use fewer workers or a smaller batch.")
        elif code == 128 + signal.SIGBUS:
            _say(f"worker {rank} ended by SIGBUS: a mapped file was cut short, or its disk gave an error.")
        elif code not in (EXIT_INPUT_ERROR, EXIT_RETRY, EXIT_HUNG) and not self._stop_level:
            _say(f"worker {rank} ended with exit code {code}, see above.")
        return code


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _hosts_of_workers(driver: int) -> set[str]:
    """Returns the hosts for whose workers Horovod's driver has a process: the worker, or the ssh to it."""
    found = set()
    for process in _descendants(driver):
        with contextlib.suppress(psutil.Error):
            host = Place.from_environment(process.environ()).host
            found.update([host] if host else [])
    return found


def _say(text: str) -> None:
    """Prints a line, with control characters escaped: names and errors in it may come from other hosts."""
    print(f"{program()}: {printable_line(text)}", file=sys.stderr, flush=True)
