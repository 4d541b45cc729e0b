"""Starts and ends every command: flags in, one clear line and an exit code out."""

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
from din_dist.cli import flags as settings
from din_dist.cli import help
from din_dist.cluster.link import BEAT_SECONDS
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
    LostPeer,
)
from din_dist.machine import require_threads
from din_dist.place import Place
from din_dist.telemetry.terminal import format_line
from din_dist.text import printable
from din_dist.versions import require_tensorflow

_HELP_OF_ABSL = {f"{dashes}{name}" for dashes in ("-", "--") for name in ("helpfull", "helpxml")}
_MOST_LAST_WORDS = 1 << 20  # bytes
_NOT_NEEDED = ("matplotlib", "pandas")  # Keras imports them where they are installed, which takes 2 of 7 seconds
_PRINTING_SECONDS = 2.0  # for the last line of a stuck process

_signals_are_heard = threading.Event()  # set by `Signals`, which watches disks too


def run(main: Callable[[], None]) -> None:
    """Parses the flags, runs `main` and exits: 0 done, 2 wrong input, 75 stopped on request (run it again), else 1."""
    streams.open_standard_streams()
    try:
        environment.settle()
    except InputError as error:
        _leave(EXIT_INPUT_ERROR, str(error))
    _quieten()
    mapped_files.set_end(
        lambda text: format_line(text, _log_format(), rank=_rank(), level="error"),
        Place.from_environment().beats,
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
    """The requests that signals make of a training process.

    SIGINT, SIGTERM and SIGHUP ask it to stop the job after the current step and a checkpoint. A second SIGINT ends the
    process at once, without a checkpoint. In an elastic job SIGTERM announces an eviction and asks only this worker to
    leave. A thread handles the signals, whatever the main thread waits for. The thread also sends heartbeats to the
    worker's agent. It ends the process when a disk does not answer, because that holds up the other workers.

    Args:
        answer: the line that the chief prints at the first signal.
    """

    def __init__(
        self, answer: str = "stopping after this step and a checkpoint; Ctrl-C once more stops at once, without one"
    ) -> None:
        self.stop = self.leave = False
        self._answer = answer
        self._told = _Told("Training goes on without it.")
        self._elastic = Place.from_environment().elastic
        hear, tell = socket.socketpair()
        tell.setblocking(False)
        signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
        for number in environment.ending_signals():
            signal.signal(number, lambda *_: None)
        _signals_are_heard.set()
        threading.Thread(target=self._listen, args=(hear, tell), daemon=True).start()

    def _listen(self, hear: socket.socket, tell: socket.socket) -> None:
        """Handles signals for as long as the process lives, and keeps the sending end `tell` open."""
        hear.settimeout(BEAT_SECONDS)
        watch = progress.Watch(_patience_seconds())
        numbers = environment.ending_signals()
        while True:
            _tell_agent(b".")
            with contextlib.suppress(TimeoutError):
                for number in hear.recv(64):
                    self._note(number)
            # The kernel gives a signal to the main thread, which cannot take one while it waits for a disk.
            while waiting := signal.sigtimedwait(numbers, 0):
                self._note(waiting.si_signo)
            if self.stop or self.leave:
                watch.stop()
            self._look_for_what_is_stuck(watch)

    def _look_for_what_is_stuck(self, watch: progress.Watch) -> None:
        found, asked = watch.stuck(), self.stop or self.leave
        for stuck in found:
            if stuck.essential:
                rank, seconds = _rank(), f"{stuck.seconds:.0f} s"
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
    """Logs once that a disk does not answer, and once that it has answered.

    Args:
        consequence: a sentence about what happens meanwhile.
    """

    def __init__(self, consequence: str) -> None:
        self._consequence = consequence
        self._stuck: set[str] = set()

    def tell(self, found: Sequence[progress.Stuck]) -> None:
        """Logs the blocks that are stuck since the last call, and those that no longer are."""
        for stuck in found:
            if stuck.what not in self._stuck:
                warn(
                    f"a disk must answer. Received: nothing for {stuck.seconds:.0f} s while rank "
                    f"{_rank()} was {stuck.what}. {self._consequence}"
                )
        now = {stuck.what for stuck in found}
        for what in self._stuck - now:
            say(f"the disk has answered: {what} goes on")
        self._stuck = now


def _watch_disks() -> None:
    """Logs disks that do not answer, until `Signals` takes over. Before that, Ctrl-C ends the process."""
    watch, told = progress.Watch(_patience_seconds()), _Told("It waits; Ctrl-C ends it.")
    while not _signals_are_heard.wait(BEAT_SECONDS):
        told.tell(watch.stuck())


def _parse_flags(argv: list[str]) -> list[str]:
    if help.is_asked_for(argv[1:]):
        print(help.page(sys.modules["__main__"].__doc__, flags.FLAGS), flush=True)
        sys.exit(0)
    try:
        rest = flags.FLAGS(settings.with_our_flagfiles(argv))
    except flags.Error as error:
        _leave(EXIT_INPUT_ERROR, settings.problem_of(error, list(flags.FLAGS)))
    if len(rest) > 1:
        _leave(EXIT_INPUT_ERROR, f"Every setting is a --flag. Received: {rest[1]!r}. See --help.")
    return rest


def _exit_code(main: Callable[[], None]) -> int:
    try:
        main()
    except InputError as error:
        _leave(EXIT_INPUT_ERROR, str(error))
    except Left as reason:
        _leave(EXIT_RETRY, f"rank {_rank()} leaves {reason}; {reason.after}", level="stopped")
    except Interrupted as stop:
        if not _is_chief():
            return EXIT_RETRY
        _leave(EXIT_RETRY, str(stop), level="stopped")
    except FailedElsewhere:
        return 1
    except CannotJoin as error:
        _leave(1, f"rank {_rank()} must reach the other workers. Received: {error}. See launch/README.md.")
    except FloatingPointError as error:
        _leave(1, str(error))
    except LostPeer as error:
        _leave(
            1, f"rank {_rank()} lost another worker{_where(error)} and cannot go on alone. The same command resumes."
        )
    except Exception as error:
        where, rank = _where(error), _rank()
        if _log_format() is LogFormat.JSON:
            _leave(1, f"rank {rank} failed{where}: {error}", traceback=traceback.format_exc())
        print(printable(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        _leave(1, f"rank {rank} failed{where}: see the lines above")
    return 0


def _where(error: Exception) -> str:
    """Returns where in the job an error came, from its notes."""
    return "".join(f" at {note}" for note in getattr(error, "__notes__", []))


def say(text: str) -> None:
    """Prints a line for people or log collectors to stderr; stdout is for programs."""
    _print(text, "info")


def warn(text: str) -> None:
    """Prints a line about something that may not be as the user meant it."""
    _print(text, "warning")


def _print(text: str, level: str, **fields: str) -> None:
    print(format_line(text, _log_format(), rank=_rank(), level=level, **fields), file=sys.stderr, flush=True)


def _log_format() -> LogFormat:
    """Returns the value of --log_format; text before the flags are parsed."""
    values = flags.FLAGS
    return LogFormat(values.log_format) if "log_format" in values and values.is_parsed() else LogFormat.TEXT


def _rank() -> int:
    """Returns this process' rank as it is now: in an elastic job it changes."""
    return Place.from_environment().rank


def _is_chief() -> bool:
    return _rank() == 0


def _leave(code: int, text: str, level: str = "error", **fields: str) -> None:
    _print(" ".join(text.split()), level, **fields)
    _tell_end(code)
    sys.exit(code)


def leave_at_once(code: int, text: str, level: str = "stopped") -> NoReturn:
    """Ends the process from any thread, whatever the other threads wait for."""
    # In another thread, because stderr may be a file on a disk that does not answer.
    printing = threading.Thread(target=_print, args=(text, level), daemon=True)
    printing.start()
    printing.join(_PRINTING_SECONDS)
    _tell_end(code)
    _tell_agent(b"\ngone\n")
    os._exit(code)


def _patience_seconds() -> float:
    """Returns how long a disk may take to answer: the launcher's `--stall_timeout_seconds`, or a default."""
    launcher = Place.from_environment().launcher
    return launcher.stall_timeout_seconds if launcher else progress.PATIENCE_SECONDS


def _tell_agent(word: bytes) -> None:
    """Sends bytes to the agent of this process, if `launch/train.sh` started one."""
    beats = Place.from_environment().beats
    if beats >= 0:
        with contextlib.suppress(OSError):
            os.write(beats, word)


def _tell_end(code: int) -> None:
    """Announces the exit code to the agent, because ending takes seconds.

    Meanwhile another rank that fails because of this one may end first, and would be taken for the cause.
    """
    _tell_agent(f"\nends {code}\n".encode())


def _quieten() -> None:
    """Silences the libraries' start-up notes, which would bury ours."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


def import_tensorflow() -> None:
    """Imports TensorFlow without the lines that its C++ prints before a setting can silence it.

    Raises:
        InputError: it is not installed, or there is no room for its threads.
    """
    require_tensorflow()
    require_threads()
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            with _last_words(aside.fileno(), saved), _hidden(_NOT_NEEDED):
                importlib.import_module("tensorflow")
        except BaseException:
            os.write(saved, os.pread(aside.fileno(), _MOST_LAST_WORDS, 0))
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def _hidden(names: Sequence[str]) -> Iterator[None]:
    """Makes modules that nobody has imported yet look as if they were not installed, in the block."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _last_words(source: int, target: int) -> Iterator[None]:
    """Lets another process copy `source` to `target` if this one ends in the block.

    C++ ends a process without Python, for example at a setting that XLA does not know. Then only another process can
    print the reason.
    """
    ends, tell = os.pipe()
    try:
        child = os.fork()
    except OSError:  # the limit on processes is reached: nobody prints the reason
        child = -1
    if child == 0:
        try:
            for number in environment.ending_signals():
                signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches the child too
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
