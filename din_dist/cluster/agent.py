"""Watches one trainer process on the trainer's own host: `python -m din_dist.cluster.agent TRAINER_FLAGS`.

The agent stops the trainer when the launcher asks for that or is gone. It kills a trainer that has hung. It reports the
trainer's exit code to the launcher. It needs no shared files, so it runs on any host.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from din_dist import environment
from din_dist.cluster.addresses import card_of
from din_dist.cluster.link import BEAT_SECONDS, Lines, Seal, introduce
from din_dist.cluster.processes import die_with_parent, exit_code
from din_dist.errors import EXIT_HUNG, EXIT_RETRY
from din_dist.place import LauncherAddress, Place, variables_of_trainer
from din_dist.text import printable_line

_CONNECT_SECONDS = 10.0
_JOIN_SECONDS = 30.0  # because many agents may connect to the launcher at once
_LONGEST_LINE = 1 << 20  # bytes; a longer line is passed on in pieces
_GRACE_SECONDS = 20.0  # for a trainer without a launcher to finish its step and write a checkpoint
_SILENCE_AFTER_STOP_SECONDS = 20.0  # after which a trainer that was asked to stop has hung
_GONE_SECONDS = 10.0  # for the kernel to remove a process
_LAST_WORDS_SECONDS = 0.5  # for a trainer to report by itself that it lost another worker


class Agent:
    """One trainer and the link to the launcher.

    Args:
        place: the worker's place in its job.
        launcher: the link, on which this agent is known already.
        seal: proves the lines of this agent and checks those of the launcher.
        lines: the launcher's lines, with the bytes that came after its first one.
        stall_timeout_seconds: a launcher or trainer that is silent for longer is lost.
    """

    def __init__(
        self, place: Place, launcher: socket.socket, seal: Seal, lines: Lines, stall_timeout_seconds: float
    ) -> None:
        self._place = place
        self._launcher: socket.socket | None = launcher
        self._seal, self._launcher_lines, self._trainer_lines = seal, lines, Lines()
        self._stall_timeout_seconds = stall_timeout_seconds
        self._selector = selectors.DefaultSelector()
        self._heard_launcher = time.monotonic()
        self._heard_trainer: float | None = None  # None: the trainer is not ready for signals yet
        self._stop_level = 0  # how many SIGINTs the trainer must get
        self._interrupts_sent = 0  # how many it got
        self._terminate_at: float | None = None
        self._has_terminated = False
        self._kill_at: float | None = None
        self._verdict: int | None = None  # the exit code where it is not the trainer's own
        self._told: int | None = None  # the exit code that the trainer announced
        self._gone_by: float | None = None
        self._trainer: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str]) -> int:
        """Runs the trainer to its end; returns the worker's exit code."""
        here, there = socket.socketpair()
        here.setblocking(False)
        there.setblocking(False)
        signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        for number in (*environment.ending_signals(), signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # `_hear_signals` handles them
        assert self._launcher
        self._launcher.setblocking(False)
        self._selector.register(self._launcher, selectors.EVENT_READ, self._hear_launcher)
        self._selector.register(here, selectors.EVENT_READ, lambda: self._hear_signals(here))
        pumps = self._start(command)
        assert self._trainer
        self._heed(b"")  # lines that came with the launcher's first one
        next_beat = 0.0
        while self._trainer.poll() is None and not self._is_left_behind():
            for key, _ in self._selector.select(timeout=max(0.0, next_beat - time.monotonic())):
                key.data()
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_SECONDS
                self._tell({})
                self._check()
        # Python restores the default handlers at its end, just when Horovod's driver may send a signal.
        for number in environment.ending_signals():
            signal.signal(number, signal.SIG_IGN)
        code = self._verdict or self._told or EXIT_HUNG
        if self._trainer.returncode is not None:
            code = self._verdict or exit_code(self._trainer.returncode)
        if self._told is None:
            self._tell({"ended": code})
        for pump in pumps:
            pump.join(timeout=5)  # a child of the trainer may hold them open
        return code

    def _start(self, command: Sequence[str]) -> list[threading.Thread]:
        beats, trainers_end = os.pipe()
        os.set_blocking(beats, False)
        self._selector.register(beats, selectors.EVENT_READ, lambda: self._hear_trainer(beats))
        under_horovodrun = self._place.under_horovodrun
        is_static_follower = self._place.rank != 0 and not self._place.elastic
        self._trainer = subprocess.Popen(
            command,
            env={**os.environ, **self._cards(), **variables_of_trainer(trainers_end)},
            pass_fds=[trainers_end],
            stdin=subprocess.DEVNULL,  # a trainer that cannot be ended must not hold the ssh session open
            # Output goes through this process: writing to the pipe of a broken ssh session would end the trainer.
            stdout=subprocess.PIPE if under_horovodrun else None,
            stderr=subprocess.PIPE if under_horovodrun else None,
            preexec_fn=die_with_parent,  # no trainer without its agent
        )
        os.close(trainers_end)
        if not under_horovodrun:
            return []
        pumps = [
            # Stdout is for the chief's summary. In an elastic job any rank may become the chief.
            threading.Thread(target=pump, args=(self._trainer.stdout, 2 if is_static_follower else 1), daemon=True),
            threading.Thread(target=pump, args=(self._trainer.stderr, 2), daemon=True),
        ]
        for thread in pumps:
            thread.start()
        return pumps

    def _hear_launcher(self) -> None:
        assert self._launcher
        try:
            piece = self._launcher.recv(65536)
        except OSError:
            piece = b""
        if not piece:
            self._part_from_launcher()
            return
        self._heed(piece)

    def _heed(self, piece: bytes) -> None:
        """Follows the launcher's messages. A line that is not the launcher's, or was changed, breaks the link."""
        try:
            messages = [self._seal.decode(line) for line in self._launcher_lines.add(piece)]
        except ValueError:
            self._part_from_launcher()
            return
        self._heard_launcher = time.monotonic()
        for message in messages:
            if message.get("given_up"):  # for a host that had hung: others have taken its place
                self._kill(EXIT_HUNG)
            self._ask_to_stop(message.get("stop", 0))

    def _hear_trainer(self, beats: int) -> None:
        piece = os.read(beats, 65536)
        if not piece:
            self._selector.unregister(beats)
            return
        self._heard_trainer = time.monotonic()
        for line in self._trainer_lines.add(piece):
            if line.startswith(b"ends "):  # announced early, because ending takes seconds
                self._told = int(line.split()[1])
                self._tell({"ended": self._told})
            if line.strip() == b"gone":
                self._gone_by = time.monotonic() + _GONE_SECONDS
        self._interrupt()

    def _hear_signals(self, here: socket.socket) -> None:
        numbers = here.recv(64)
        if signal.SIGINT in numbers:
            self._ask_to_stop(self._stop_level + 1)
        elif signal.SIGHUP in numbers:
            self._ask_to_stop(1)
        if signal.SIGTERM in numbers:
            self._terminate()

    def _terminate(self) -> None:
        """Passes SIGTERM on to the trainer: it comes from Horovod's driver, or announces the eviction of this worker.

        Unless the job is elastic, the driver sends it when another worker has failed. The trainer is about to report
        that failure by itself. It gets the signal a little later, so that its answer does not bury the report.
        """
        assert self._trainer
        if self._heard_trainer is None:
            self._kill(EXIT_RETRY)
        elif self._place.elastic or self._place.size == 1:
            self._send_sigterm()
        else:
            self._terminate_at = time.monotonic() + _LAST_WORDS_SECONDS

    def _send_sigterm(self) -> None:
        assert self._trainer
        self._trainer.send_signal(signal.SIGTERM)
        self._has_terminated = True

    def _ask_to_stop(self, level: int) -> None:
        self._stop_level = max(self._stop_level, level)
        if self._stop_level and self._heard_trainer is None:
            self._kill(EXIT_RETRY)  # it has no progress to save yet
        self._interrupt()

    def _interrupt(self) -> None:
        assert self._trainer
        while self._heard_trainer is not None and self._interrupts_sent < self._stop_level:
            self._trainer.send_signal(signal.SIGINT)
            self._interrupts_sent += 1

    def _check(self) -> None:
        now = time.monotonic()
        assert self._trainer
        if self._launcher and now - self._heard_launcher > self._stall_timeout_seconds:
            self._part_from_launcher()
        if self._terminate_at is not None and now >= self._terminate_at:
            self._terminate_at = None
            self._send_sigterm()
        asked = self._stop_level > 0 or self._has_terminated
        patience = self._stall_timeout_seconds
        if asked:
            patience = min(patience, _SILENCE_AFTER_STOP_SECONDS)
        hung = self._heard_trainer is not None and now - self._heard_trainer > patience
        if hung and self._verdict is None and self._gone_by is None:
            self._kill(EXIT_RETRY if asked else EXIT_HUNG)
            say(f"it gave no sign of life for {patience:g} s: it has hung and is killed")
        if self._kill_at is not None and now >= self._kill_at and self._verdict is None:
            self._kill(EXIT_RETRY)
            say(f"it is killed: it did not stop within {_GRACE_SECONDS:g} s")

    def _part_from_launcher(self) -> None:
        """Stops the trainer because the launcher is gone, or this worker is cut off from all others."""
        assert self._launcher
        self._tell({"parted": True})  # the other direction of the link may still work
        self._selector.unregister(self._launcher)
        self._launcher.close()
        self._launcher = None
        say("the launcher is gone or out of reach: stopping after this step and a checkpoint")
        self._kill_at = time.monotonic() + _GRACE_SECONDS
        self._ask_to_stop(1)

    def _kill(self, verdict: int) -> None:
        assert self._trainer
        self._verdict = verdict
        self._trainer.kill()
        self._gone_by = time.monotonic() + _GONE_SECONDS

    def _is_left_behind(self) -> bool:
        """Returns True when only the kernel keeps the ended trainer, because a disk does not answer."""
        if self._gone_by is None or time.monotonic() < self._gone_by:
            return False
        assert self._trainer
        say(f"process {self._trainer.pid} cannot be ended before its disk answers: it is left behind")
        return True

    def _tell(self, message: dict[str, int]) -> None:
        if self._launcher:
            with contextlib.suppress(OSError):  # `_hear_launcher` and `_check` find out
                self._launcher.send(self._seal.encode(message))

    def _cards(self) -> dict[str, str]:
        """Returns the variables that name this host's card towards the launcher, unless the user named a card.

        Horovod gives workers the name of the launcher's own card, which may differ here.
        """
        assert self._launcher
        if not self._place.find_card or not (card := card_of(self._launcher.getsockname()[0])):
            return {}
        variables = {"HOROVOD_GLOO_IFACE": card}
        if os.environ.get("NCCL_SOCKET_IFNAME", "") == self._place.card:  # otherwise the user set it
            variables["NCCL_SOCKET_IFNAME"] = card
        return variables


def pump(source: IO[bytes], target: int) -> None:
    """Passes on whole lines, so that the other stream cuts none; keeps reading when nobody takes them."""
    broken, rest = False, b""
    while True:
        piece = os.read(source.fileno(), 65536)
        lines, end, rest = (rest + piece).rpartition(b"\n")
        if not piece or len(rest) > _LONGEST_LINE:
            end, rest = end + rest, b""
        lines += end
        while lines and not broken:
            try:
                lines = lines[os.write(target, lines) :]
            except OSError:
                broken = True
        if not piece:
            return


def say(text: str) -> None:
    """Prints a line, with control characters escaped: errors in it may come from other hosts."""
    line = printable_line(f"worker {Place.from_environment().rank}: {text}") + "\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())


def _join(place: Place, address: LauncherAddress) -> tuple[socket.socket, Seal, Lines]:
    """Connects to the launcher and introduces this agent; returns the link."""
    hello = {"host": place.host, "local_rank": place.local_rank, "rank": place.rank}
    started = time.monotonic()
    while True:
        link = None
        try:
            link = socket.create_connection((address.host, address.port), timeout=_CONNECT_SECONDS)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            seal, lines = introduce(link, place.key, hello)
            return link, seal, lines
        except (OSError, ValueError) as error:
            if link:
                link.close()
            if time.monotonic() - started >= (_JOIN_SECONDS if link else _CONNECT_SECONDS):
                say(f"the launcher at {address.host}:{address.port} must be reachable. Received: {error}")
                sys.exit(EXIT_RETRY)
            time.sleep(0.5)


def main(trainer_flags: Sequence[str]) -> int:
    """Runs a trainer with these flags; returns its exit code."""
    place = Place.from_environment()
    if place.launcher is None:
        sys.exit("an agent must have a launcher. Received: no address of one. Start workers with launch/train.sh.")
    agent = Agent(place, *_join(place, place.launcher), place.launcher.stall_timeout_seconds)
    return agent.run([sys.executable, "-m", "din_dist.cli.train", *trainer_flags])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
