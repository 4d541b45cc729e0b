"""Trains day after day: the command that a scheduler calls; `launch/daily.sh` runs it after set-up.

Each call does the days of --log that are due. For each of them it prepares the new events, evaluates yesterday's model
on them, goes on from that model with one pass over them, and exports a numbered version. If the quality fell, it stops
before training. A call that was interrupted is repeated by the same command.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from din_dist import environment, place, streams
from din_dist.cli import flags as settings
from din_dist.cli import help, launch
from din_dist.cli.help import theme
from din_dist.config import FORGETTING, Config
from din_dist.daily.loop import Loop, LoopEnded
from din_dist.daily.settings import DailyConfig
from din_dist.errors import EXIT_INPUT_ERROR, EXIT_RETRY, InputError
from din_dist.text import printable, to_json
from din_dist.tracking.run import require_installed
from din_dist.training.output_dir import claim_output_dir

_USAGE = """\
launch/daily.sh --log=DIR --from=DATE [--work_dir=DIR] [flags of launch/train.sh]

The last line on stdout is the result as JSON, everything else goes to stderr.

--dataset, --split, --data_dir and --output_dir are set for each day, and --epochs=1 after the first. Give the trainer's
other flags with each call: what the model is must stay the same.

Exit codes: 0 done, or nothing to do; 2 wrong input; 75 stopped by a signal (run it again to go on); 81 the quality
fell; 82 a day is missing; otherwise what the command gave that failed.
"""
_OURS = ("data_path", "extend", "train_from", "validation_from", "test_from", "warm_start_from")

_FLAGS = flags.FlagValues()  # of this command; all others are the launcher's and the trainer's
settings.define_settings(DailyConfig, _FLAGS)
with theme("days", _FLAGS):
    flags.DEFINE_string("from", "", "The first day, for example 2026-11-01. It trains from the start.", _FLAGS)


def main(arguments: Sequence[str]) -> int:
    """Does the days that are due; returns the exit code.

    Raises:
        InputError: a flag or a file is wrong.
    """
    words, trainer_flags = parse_flags(arguments)
    config = config_from_flags()
    data = check_trainer_flags(config, trainer_flags).data
    # Those of the job that is evaluated may have been others.
    forgetting = [f"--{name}={getattr(data, name)}" for name in FORGETTING]

    def run(name: str, own: Sequence[str]) -> int:
        given = {"launch": words, "prepare_data": trainer_flags, "evaluate": forgetting}.get(name, [])
        ending_seconds = {"ending_seconds": math.inf} if name == "launch" else {}  # its workers save before
        return launch.run_first(name, [*given, *own], **ending_seconds)

    lock = claim_output_dir(Path(config.work_dir), flag="--work_dir")
    try:
        result = Loop(config, run, _say).run()
    except LoopEnded as end:
        _say(str(end))
        return end.code
    except OSError as error:
        raise InputError(
            f"--work_dir: must be a folder that can be written. Received: {config.work_dir}, {error.strerror}. Make "
            "room or give rights there."
        ) from error
    finally:
        lock.close()
    print(to_json(result), flush=True)
    return 0


def parse_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parses the flags of this command; returns those of the launcher and the trainer, and those of the trainer alone.

    Raises:
        InputError: a flag has no value that it can take.
    """
    try:
        words = _FLAGS(settings.with_our_flagfiles(["daily.sh", *arguments]), known_only=True)[1:]
        return words, launch.parse_launcher_flags(words)
    except flags.Error as error:
        raise _wrong_flag(error) from error


def config_from_flags() -> DailyConfig:
    """Returns the settings of this command, after `parse_flags`.

    Raises:
        InputError: a setting breaks a rule.
    """
    return DailyConfig(**settings.settings_from_flags(DailyConfig, _FLAGS), begins=str(_FLAGS["from"].value))


def check_trainer_flags(config: DailyConfig, trainer_flags: Sequence[str]) -> Config:
    """Checks all flags of the trainer before any work is done; returns the settings of a day after the first.

    Raises:
        InputError: one of them is wrong, or is set for each day.
    """
    values = flags.FlagValues()
    settings.define_flags(values)
    try:
        values(["daily.sh", *trainer_flags])
        for name in _OURS:
            if values[name].present:
                raise InputError(
                    f"--{name}: is set for each day. Received: {values[name].value}. Drop it; --log names the days."
                )
        days = ["--dataset=event_log", f"--data_path={config.log}", "--split=temporal", f"--extend={config.work_dir}"]
        values(["daily.sh", *trainer_flags, *days])
    except flags.Error as error:
        raise _wrong_flag(error) from error
    given = settings.config_from_flags(values)
    require_installed(given.telemetry.tracker)
    return given


def _wrong_flag(error: flags.Error) -> InputError:
    if isinstance(error.__context__, InputError):  # from a flag that checks itself
        return error.__context__
    return InputError(f"{str(error).rstrip('.')}. See --help.")


def _say(text: str) -> None:
    print(printable(f"daily.sh: {text}"), file=sys.stderr, flush=True)


def _stop(number: int, frame: object) -> None:
    raise LoopEnded(EXIT_RETRY, "stopped. The same command goes on.")


def _print_help() -> None:
    """Prints the flags of this command, the launcher's and the trainer's."""
    settings.define_flags()
    print(help.page(f"{__doc__}\n\n{_USAGE}", _FLAGS, launch._FLAGS, flags.FLAGS))


if __name__ == "__main__":
    streams.open_standard_streams()
    place.forget()
    if help.is_asked_for(sys.argv[1:]):
        _print_help()
        sys.exit()
    for ending in environment.ending_signals():
        signal.signal(ending, _stop)
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        _say(str(error))
        sys.exit(EXIT_INPUT_ERROR)
    except LoopEnded as end:  # at a signal outside of the loop
        _say(str(end))
        sys.exit(end.code)
