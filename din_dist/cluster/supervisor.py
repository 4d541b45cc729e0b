"""Runs a job's workers, under Horovod's driver or a single one without, and answers for them.

Each worker has an agent (`agent.py`) with a link to here. Over the links a stop reaches every host, exit codes come
back, and who falls silent is ended: Horovod itself would wait for it on and on.
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
from din_dist.place import LauncherAddress, Place, variables_of_agents, wants_horovods_log
from din_dist.text import printable, printable_line

_GIVING_UP_SECONDS = 5.0  # in which the other workers give up too
_ENDING_SECONDS = 30.0  # for agents to stop their trainers when Horovod's driver is gone
_LEFT_OVER_SECONDS = 25.0  # in which an agent without a link stops its trainer
_LAST_WORDS_SECONDS = 5.0  # in which an agent that has ended is heard to its last word
_HELLO_SECONDS = 10.0
_MOST_STRANGERS = 64  # that have connected and not yet introduced themselves: the oldest gives way to a new one
_ACCEPTED_AT_ONCE = 16
_LOOPBACK = "127.0.0.1"
_NOISE = b"Horovod background loop uncaught exception"
_PREFIX = re.compile(rb"\[(\d+)\]<(stdout|stderr)>:(.*)", re.DOTALL)


@dataclasses.dataclass(eq=False)
class _Worker:
    """As its agent introduced it."""

    host: str
    local_rank: int
    rank: int
    writer: asyncio.StreamWriter
    seal: Seal
    heard: float
    has_ended: bool = False  # as it has said itself

    def tell(self, message: dict[str, int | bool]) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # that it is gone, the reader finds out
            self.writer.write(self.seal.encode(message))


class Supervisor:
    """One job."""

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
        """`command`: that starts the agents: `horovodrun ...`, or an agent itself without `horovod`.

        `address`: of this machine, at which all agents reach it, and nobody else need. `hosts`: of an elastic job, and
        only there; refreshed while it runs. `log_dir`: for a file of each rank's output; only with `horovod`.
        """
        self._command, self._horovod, self._address = command, horovod, address
        self._stall_timeout_seconds, self._hosts = stall_timeout_seconds, hosts
        self._elastic = hosts is not None
        self._log_dir = log_dir
        self._key = secrets.token_hex(32)
        self._strangers: collections.OrderedDict[asyncio.StreamWriter, None] = collections.OrderedDict()
        self._chores: set[asyncio.Task[None]] = set()
        self._workers: set[_Worker] = set()
        self._out_of_reach = False  # the workers that are left, of whom none said why it left
        self._failures: list[tuple[int, int]] = []  # rank and exit code, in the order in which they came
        self._stop_level = 0
        self._gave_up = self._killed = self._done = False
        self._silent: set[str] = set()
        self._horovodrun_said: list[bytes] = []

    def run(self) -> int:
        """The job's exit code."""
        return asyncio.run(self._run())

    async def _run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in environment.ending_signals():
            loop.add_signal_handler(number, self._stop, number)
        listener = socket.create_server((self._address, 0))
        # Asyncio takes in as many at once as may wait, and only then looks at any: far fewer than there are files.
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
            start_new_session=True,  # where Ctrl-C does not reach it ahead of `_stop`
            # Without us it would wait for hosts on and on. Its children still end their workers gently.
            preexec_fn=die_with_parent if self._horovod else None,
        )
        pumps = self._start_pumps()
        self._begin(self._beat())
        if self._hosts:
            self._begin(self._keep_hosts(self._hosts))
        code = exit_code(await asyncio.to_thread(self._process.wait))
        if not self._killed:
            # That a process ended may be known here before what it said last on another way.
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
        """Starts something that goes on beside, to the end of the job at most."""
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Of one agent, to the end of its link."""
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
            pass  # broken off, a stranger, or the job is at its end
        finally:
            if worker:
                self._workers.discard(worker)
                if not worker.has_ended and self._process.poll() is None:
                    self._begin(self._end_left_over(worker))
            writer.close()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Worker:
        """Waits until an agent has introduced itself.

        Raises:
            OSError, ValueError, KeyError, TypeError, TimeoutError: it is a stranger, or was late.
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
        """Notes that a worker does not hear this launcher, or is not heard: its agent stops its trainer."""
        self._workers.discard(worker)
        self._out_of_reach = not self._workers and self._address != _LOOPBACK

    def _note_end(self, worker: _Worker, code: int) -> None:
        worker.has_ended = True
        self._out_of_reach = False
        if code:
            self._failures.append((worker.rank, code))
        else:
            self._done = True  # a worker ends well only when the whole job has
        if code == EXIT_INPUT_ERROR and self._hosts and worker.host and len({w.host for w in self._workers}) > 1:
            _say(f"{worker.host} is left out for good: what is wrong there does not change by trying again")
            self._hosts.refused.add(worker.host)
        if code == EXIT_GAVE_UP and not self._gave_up:
            # It has saved, for want of others. Horovod would wait for them on and on.
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
        """Ends what Horovod's driver has of a worker on this machine: a worker of this host's, or the ssh to it."""
        _say(
            f"worker {worker.rank} on {worker.host or 'this machine'} was not heard of for "
            f"{self._stall_timeout_seconds:g} s: it is given up"
        )
        if not self._horovod:
            self._kill()
            return
        _end(self._processes_of(worker))

    async def _end_left_over(self, worker: _Worker) -> None:
        """Ends what the driver still has of a worker whose link broke, when its agent has had the time to stop it.

        The driver would wait for the ssh to a host that is no more.
        """
        if self._horovod:
            processes = await asyncio.to_thread(self._processes_of, worker)
            await asyncio.sleep(_LEFT_OVER_SECONDS)
            await asyncio.to_thread(_end, processes)

    def _processes_of(self, worker: _Worker) -> list[psutil.Process]:
        """Finds what the driver has of a worker here. A shell comes before what it runs: it would remark on its end."""
        found = []
        for process in _descendants(self._process.pid):
            with contextlib.suppress(psutil.Error):
                place = Place.from_environment(process.environ())
                if place.host and (place.host, place.local_rank) == (worker.host, worker.local_rank):
                    found.append(process)
        return found

    def _stop(self, number: int) -> None:
        """By a signal: the workers finish their step and save. A second Ctrl-C: at once."""
        if self._stop_level == 0:
            self._stop_level = 1
        elif number == signal.SIGINT:
            self._stop_level = 2
        for worker in self._workers:
            worker.tell({"stop": self._stop_level})
        if not self._workers:
            self._kill()  # a driver that still starts workers, or waits for hosts and hears nothing

    def _kill(self) -> None:
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _end_orphans(self) -> None:
        """Of a driver that died: stops the workers that it has left on other hosts."""
        _say("horovodrun ended before its workers: they stop after this step and a checkpoint")
        self._gave_up = True
        for worker in self._workers:
            worker.tell({"stop": 1})
        await self._wait_for_workers(_ENDING_SECONDS)

    async def _wait_for_workers(self, seconds: float) -> None:
        """Until all links are closed, or that long."""
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
            except (InputError, OSError) as error:  # a file that is being replaced, say: the job goes on
                if str(error) != problem:
                    _say(f"{error} The hosts known so far stay.")
                problem = str(error)

    async def _refresh_hosts(self, hosts: HostList, with_workers: set[str]) -> None:
        await hosts.refresh({worker.host for worker in self._workers}, with_workers)
        for name in sorted(hosts.silent - self._silent):
            _say(f"{name} does not answer on its ssh port: left out until it does")
        for name in sorted(self._silent - hosts.silent):
            _say(f"{name} answers")
        self._silent = hosts.silent

    def _start_pumps(self) -> list[threading.Thread]:
        """Threads: a terminal that takes no output must not silence the links."""
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
        """Horovod puts `[RANK]<stdout>:` before each line. Rank 0 speaks for the job and loses that.

        On stdout only the chief speaks, which in an elastic job may be another than at the start. What horovodrun
        says itself, that a worker failed, is kept for when no worker did.
        """
        for line in source:
            match = _PREFIX.match(line)
            if match is None:
                self._horovodrun_said.append(line)
                continue
            rank, stream, text = match.groups()
            if _NOISE in text and not wants_horovods_log():
                continue  # the trainer says in its own words what came of it
            if self._log_dir:
                # Opened for each line: an elastic job may run for weeks, and logs be moved under it.
                with contextlib.suppress(OSError), Path(self._log_dir, f"rank-{int(rank)}.log").open("ab") as log:
                    log.write(text)
            # Of --log_format=json the rank is in the line.
            named = stream == b"stderr" and rank != b"0" and not text.startswith(b"{")
            with contextlib.suppress(OSError, ValueError):
                target.write(b"[%s] %s" % (rank, text) if named else text)
                target.flush()

    def _verdict(self, code: int) -> int:
        if self._gave_up or (self._stop_level and self._killed and not self._failures):
            if not self._killed:
                self._repeat_horovodrun()  # why it left its workers
            return EXIT_RETRY
        if code and self._out_of_reach and not self._done:
            _say(
                f"no worker was heard of for {self._stall_timeout_seconds:g} s: this machine is cut off from them, and "
                "they save and stop. The same command goes on from there."
            )
            return EXIT_RETRY
        if self._elastic and (code == 0 or self._done):
            return 0  # whoever failed was not needed; also in the last moment, when Horovod takes it for the job's end
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
            return EXIT_RETRY  # whoever failed before was not needed
        # The first to fail takes the others down; in an elastic job they went on, until the last. One that knows the
        # wrong input knows best.
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
    """Those for whose workers Horovod's driver has a process: the worker, or the ssh to it."""
    found = set()
    for process in _descendants(driver):
        with contextlib.suppress(psutil.Error):
            host = Place.from_environment(process.environ()).host
            found.update([host] if host else [])
    return found


def _say(text: str) -> None:
    """Prints a line. Names and errors in it may come from other hosts, so a terminal must not obey them."""
    print(f"train.sh: {printable_line(text)}", file=sys.stderr, flush=True)
