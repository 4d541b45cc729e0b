"""How every command starts and ends: flags in, one clear line and an exit code out."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from din_dist import environment, mapped_files, progress, streams
from din_dist.cli import help
from din_dist.cluster.link import ADDRESS_VARIABLE, BEAT_SECONDS, BEATS_VARIABLE, Address
from din_dist.config import LogFormat
from din_dist.errors import (
    EXIT_HUNG,
    EXIT_INPUT_ERROR,
    EXIT_RETRY,
    EXIT_SIGINT,
    CannotJoin,
    FailedElsewhere,
    InputError,
    Interrupted,
    Left,
    is_lost_peer,
)
from din_dist.machine import require_threads
from din_dist.telemetry.terminal import format_line
from din_dist.text import printable

_HELP_OF_ABSL = {f"{dashes}{name}" for dashes in ("-", "--") for name in ("helpfull", "helpxml")}
_MOST_LAST_WORDS = 1 << 20  # bytes
_PRINTING_SECONDS = 2.0  # for the last line of a process that is stuck

_signals_are_heard = threading.Event()  # by `Signals`, which looks at disks too


def run(main: Callable[[], None]) -> None:
    """Parses the flags, runs `main` and exits: 0 done, 2 wrong input, 75 stopped on request (run it again), else 1."""
    streams.open_standard_streams()
    try:
        environment.settle()
    except InputError as error:
        _leave(EXIT_INPUT_ERROR, str(error))
    _quieten()
    mapped_files.set_end(
        lambda text: format_line(text, _log_format(), rank=environment.rank(), level="error"),
        int(os.environ.get(BEATS_VARIABLE, "-1")),
    )
    threading.Thread(target=_watch_disks, daemon=True).start()
    try:
        app.run(lambda _: _exit_code(main), flags_parser=_parse_flags)
    except SystemExit as end:
        if end.code == 1 and _HELP_OF_ABSL & set(sys.argv[1:]):
            sys.exit(0)  # absl exits as after a failure
        problem = streams.unwritten()
        if problem and not end.code:
            _leave(1, f"standard output must take the result. Received: {problem.strerror}. It is not complete.")
        raise


class Signals:
    """What signals ask of a training process.

    SIGINT, SIGTERM and SIGHUP ask it to stop the job, by finishing the step and writing a checkpoint; a second SIGINT
    ends it at once, without. In an elastic job SIGTERM, which announces an eviction, asks this worker alone to leave.
    They are heard by a thread, whatever the main one waits for. It also gives the worker's agent signs of life, and
    ends the process when nothing goes on: a disk that does not answer holds up the others, and a request to stop too.

    Args:
        answer: what the chief says to the first of them.
    """

    def __init__(
        self, answer: str = "stopping after this step and a checkpoint; Ctrl-C once more stops at once, without one"
    ) -> None:
        self.stop = self.leave = False
        self._answer = answer
        self._told = _Told("Training goes on without it.")
        self._elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
        hear, tell = socket.socketpair()
        tell.setblocking(False)
        signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
        for number in environment.ending_signals():
            signal.signal(number, lambda *_: None)
        _signals_are_heard.set()
        threading.Thread(target=self._listen, args=(hear, tell), daemon=True).start()

    def _listen(self, hear: socket.socket, tell: socket.socket) -> None:
        """`tell`: kept open by this thread."""
        hear.settimeout(BEAT_SECONDS)
        watch = progress.Watch(_patience_seconds())
        while True:
            _tell_agent(b".")
            with contextlib.suppress(TimeoutError):
                for number in hear.recv(64):
                    self._note(number)
            if self.stop or self.leave:
                watch.stop()
            self._look_for_what_is_stuck(watch)

    def _look_for_what_is_stuck(self, watch: progress.Watch) -> None:
        found, asked = watch.stuck(), self.stop or self.leave
        for stuck in found:
            if stuck.essential:
                rank, seconds = environment.rank(), f"{stuck.seconds:.0f} s"
                what = f"nothing for {seconds} while rank {rank} was {stuck.what}" if stuck.what else ""
                rule = "a disk must answer" if what else f"rank {rank} must end when it is asked to"
                leave_at_once(
                    EXIT_RETRY if asked else EXIT_HUNG,
                    f"{rule}. Received: {what or f'no update for {seconds}'}. This process ends; the same "
                    "command goes on from what is saved.",
                    level="error",
                )
        self._told.tell(found)

    def _note(self, number: int) -> None:
        if self.stop and number == signal.SIGINT:
            os._exit(EXIT_SIGINT)
        if self._elastic and number == signal.SIGTERM:
            self.leave = True
            return
        if not self.stop and _is_chief():
            say(self._answer)
        self.stop = True


class _Told:
    """Says once that a disk does not answer, and once that it has answered.

    Args:
        consequence: a sentence about what happens meanwhile.
    """

    def __init__(self, consequence: str) -> None:
        self._consequence = consequence
        self._stuck: set[str] = set()

    def tell(self, found: Sequence[progress.Stuck]) -> None:
        for stuck in found:
            if stuck.what not in self._stuck:
                warn(
                    f"a disk must answer. Received: nothing for {stuck.seconds:.0f} s while rank "
                    f"{environment.rank()} was {stuck.what}. {self._consequence}"
                )
        now = {stuck.what for stuck in found}
        for what in self._stuck - now:
            say(f"the disk has answered: {what} goes on")
        self._stuck = now


def _watch_disks() -> None:
    """Says what the process waits for; until `Signals` hears signals, the user can end it."""
    watch, told = progress.Watch(_patience_seconds()), _Told("It waits; Ctrl-C ends it.")
    while not _signals_are_heard.wait(BEAT_SECONDS):
        told.tell(watch.stuck())


def _parse_flags(argv: list[str]) -> list[str]:
    if help.is_asked_for(argv[1:]):
        print(help.page(sys.modules["__main__"].__doc__, flags.FLAGS), flush=True)
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        if isinstance(error.__context__, InputError):  # of a flag that checks itself
            _leave(EXIT_INPUT_ERROR, str(error.__context__))
        text = str(error).removeprefix("ERROR:: ").rstrip(".")
        _leave(EXIT_INPUT_ERROR, f"{text}. See --help.")
    if len(rest) > 1:
        _leave(EXIT_INPUT_ERROR, f"Every setting is a --flag. Received: {rest[1]!r}. See --help.")
    return rest


def _exit_code(main: Callable[[], None]) -> int:
    try:
        main()
    except InputError as error:
        _leave(EXIT_INPUT_ERROR, str(error))
    except Left as reason:
        _leave(EXIT_RETRY, f"rank {environment.rank()} leaves {reason}; the other workers go on", level="stopped")
    except Interrupted as stop:
        if not _is_chief():
            return EXIT_RETRY
        _leave(EXIT_RETRY, str(stop), level="stopped")
    except FailedElsewhere:
        return 1
    except CannotJoin as error:
        _leave(1, f"rank {environment.rank()} must reach the other workers. Received: {error}. See launch/README.md.")
    except FloatingPointError as error:
        _leave(1, str(error))
    except Exception as error:
        where = "".join(f" at {note}" for note in getattr(error, "__notes__", []))
        rank = environment.rank()
        if is_lost_peer(error):
            _leave(1, f"rank {rank} lost another worker{where} and cannot go on alone. The same command resumes.")
        if _log_format() is LogFormat.JSON:
            _leave(1, f"rank {rank} failed{where}: {error}", traceback=traceback.format_exc())
        print(printable(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        _leave(1, f"rank {rank} failed{where}: see the lines above")
    return 0


def say(text: str) -> None:
    """Lines for people or log collectors; stdout is for programs."""
    _print(text, "info")


def warn(text: str) -> None:
    """Prints a line about what may not be as it was meant."""
    _print(text, "warning")


def _print(text: str, level: str, **fields: str) -> None:
    print(format_line(text, _log_format(), rank=environment.rank(), level=level, **fields), file=sys.stderr, flush=True)


def _log_format() -> LogFormat:
    """Returns the format that was asked for; text until the flags are parsed."""
    values = flags.FLAGS
    return LogFormat(values.log_format) if "log_format" in values and values.is_parsed() else LogFormat.TEXT


def _is_chief() -> bool:
    return environment.rank() == 0


def _leave(code: int, text: str, level: str = "error", **fields: str) -> None:
    _print(" ".join(text.split()), level, **fields)
    _tell_end(code)
    sys.exit(code)


def leave_at_once(code: int, text: str, level: str = "stopped") -> NoReturn:
    """Ends the process from any thread, whatever the others wait for."""
    # Beside: where stderr is a file on a disk that does not answer, nobody can be told.
    printing = threading.Thread(target=_print, args=(text, level), daemon=True)
    printing.start()
    printing.join(_PRINTING_SECONDS)
    _tell_end(code)
    _tell_agent(b"\ngone\n")
    os._exit(code)


def _patience_seconds() -> float:
    """Returns for how long a disk may not answer: the launcher's `--stall_timeout_seconds`, where there is one."""
    if ADDRESS_VARIABLE not in os.environ:
        return progress.PATIENCE_SECONDS
    return Address.from_environment().stall_timeout_seconds


def _tell_agent(word: bytes) -> None:
    """To the agent that stands by this process, where `launch/train.sh` started it."""
    if beats := os.environ.get(BEATS_VARIABLE):
        with contextlib.suppress(OSError):
            os.write(int(beats), word)


def _tell_end(code: int) -> None:
    """Ending takes seconds, in which a rank that only follows this one may end first and be taken for the cause."""
    _tell_agent(f"\nends {code}\n".encode())


def _quieten() -> None:
    """Keeps the libraries' own start-up notes from burying ours."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


def import_tensorflow() -> None:
    """Imports TensorFlow without the lines that its C++ prints before any setting can silence it.

    Raises:
        InputError: it could not start its threads.
    """
    require_threads()
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            with _last_words(aside.fileno(), saved):
                importlib.import_module("tensorflow")
        except BaseException:
            os.write(saved, os.pread(aside.fileno(), _MOST_LAST_WORDS, 0))
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def _last_words(source: int, target: int) -> Iterator[None]:
    """Lets another process copy `source` to `target` if this one ends in the block.

    C++ ends a process without Python, for a setting that XLA does not know, say: then only another can tell why.
    """
    ends, tell = os.pipe()
    try:
        child = os.fork()
    except OSError:  # too few processes: then nobody tells
        child = -1
    if child == 0:
        try:
            for number in environment.ending_signals():
                signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches it too
            os.close(tell)
            if not os.read(ends, 1):
                os.write(target, os.pread(source, _MOST_LAST_WORDS, 0))
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.write(tell, b".")
        os.close(tell)
        os.close(ends)
        if child > 0:
            os.waitpid(child, 0)
