"""`cli.daily` with real jobs: killed in each phase, it ends with the weights of a run that nobody has killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from din_dist.daily.loop import Loop, LoopEnded
from din_dist.daily.settings import DailyConfig
from din_dist.serving.http.versions import found_versions
from din_dist.serving.manifest import read_manifest
from tests.support.daily_log import date, write_days
from tests.support.jobs import assert_same_weights
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded
from tests.support.repository import ROOT

NUM_DAYS = 3
TRAINER = (
    *("--metrics_port=-1", "--embedding_dim=8", "--hidden_units=8", "--attention_hidden_units=8", "--noxla"),
    *("--global_batch_size=32", "--max_history_length=10", "--epochs=2", "--learning_rate=0.01"),
    *("--log_every_steps=1", "--checkpoint_every_steps=2"),
)


class Killed(BaseException):
    """The loop's process is killed."""


class Days:
    """Daily training whose commands are forks of one process, but for `launch`: its one worker is started at once.

    Args:
        folder: of the log; work folders lie beside it.
        commands: starts them.
    """

    def __init__(self, folder: Path, commands: Preloaded) -> None:
        self.folder, self._commands = folder, commands
        self.said: list[str] = []

    def loop(self, work: str, kill: tuple[str, str] | None = None, **settings: Any) -> dict[str, Any]:
        """Calls the loop once; returns what it found.

        Args:
            work: name of the work folder.
            kill: date and command in which SIGKILL ends both the command and the loop, once it is at work.
            settings: of the loop.
        """
        folder, last = self.folder / work, ""

        def run(name: str, words: Sequence[str]) -> int:
            given = TRAINER if name in ("prepare_data", "launch") else ()
            started = self._commands.start("train" if name == "launch" else name, *given, *words)
            if kill == (last, name):
                until = time.monotonic() + PATIENCE
                while not AT_WORK[name](folder, last, started.stderr) and time.monotonic() < until:
                    time.sleep(0.001)
                os.kill(started.pid, signal.SIGKILL)
                assert started.wait().returncode == -signal.SIGKILL, "it was done before"
                raise Killed
            done = started.wait()
            assert done.returncode == 0, done.stderr
            return 0

        def say(text: str) -> None:
            nonlocal last
            last = text.partition(":")[0]
            self.said.append(text)

        log = self.folder / ("log" if work == "whole" else "short")
        values: dict[str, Any] = {"log": str(log), "work_dir": str(folder), "begins": date(0)}
        return Loop(DailyConfig(**values | settings), run, say).run()


# Command -> whether it has begun to write, by the work folder, the date and its stderr.
AT_WORK: dict[str, Callable[[Path, str, str], bool]] = {
    "prepare_data": lambda folder, day, said: any((folder / "prepared" / day).glob("event_log/*/*.incomplete")),
    "evaluate": lambda folder, day, said: "scoring " in said,
    "launch": lambda folder, day, said: any((folder / "jobs" / day / "checkpoints").glob("step-*[1-9]")),
    "export": lambda folder, day, said: any((folder / "versions").glob(".*.exporting-*/*")),
}


@pytest.fixture(scope="module")
def days(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Days:
    """Three days, done by a loop that nobody killed, in the work folder `whole`. Others have the first two alone."""
    folder = tmp_path_factory.mktemp("days")
    write_days(folder / "log", NUM_DAYS)
    write_days(folder / "short", 2)
    found = Days(folder, commands)
    assert found.loop("whole")["new_days"] == [date(day) for day in range(NUM_DAYS)]
    return found


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a job's newest checkpoint."""
    newest = max((folder / "checkpoints").glob("step-*"))
    return {path.name: np.load(path) for path in newest.glob("*.npy")}


def records(work: Path) -> dict[str, Any]:
    """Returns what the records of the first two days say, without paths and digests."""
    left_out = ("digest", "fingerprint", "output_dir", "source")
    found = {}
    for path in sorted(work.glob("days/*-0[12]/*ed.json")):
        values = json.loads(path.read_text())
        found[f"{path.parent.name}/{path.name}"] = {
            name: value for name, value in values.items() if name not in left_out
        }
    return found


def test_a_day_goes_on_from_the_day_before(days: Days) -> None:
    work = days.folder / "whole"
    assert [path.name for path in sorted((work / "days" / date(0)).iterdir())] == [
        *("exported.json", "prepared.json", "trained.json")
    ]
    for day in range(1, NUM_DAYS):
        evaluated = json.loads((work / "days" / date(day) / "evaluated.json").read_text())
        before = json.loads((work / "jobs" / date(day - 1) / "summary.json").read_text())
        summary = json.loads((work / "jobs" / date(day) / "summary.json").read_text())
        prepared = json.loads((work / "days" / date(day) / "prepared.json").read_text())
        assert evaluated["model_of"] == date(day - 1)
        assert evaluated["step"] == summary["warm_start"]["step"] == before["best_step"] > 0, "not of step 0"
        assert (summary["epochs"], before["epochs"]) == (1, 2 if day == 1 else 1)
        # Each new event and its negative once, but for the first event of each new user.
        assert summary["epoch_records"][0]["examples"] == 2 * (prepared["new_events"] - 5)
        assert evaluated["num_examples"] == 2 * (prepared["new_events"] - 5)
        assert evaluated["gauc"] > evaluated["floors"]["popularity"]["gauc"]
        manifest = read_manifest(work / "versions" / f"2026110{day + 1}")
        assert manifest.step == summary["best_step"]
    newest = found_versions(str(work / "versions"))[0]
    assert (newest.folder, newest.number) == (work / "versions" / "20261103", 20261103)


@pytest.mark.thorough(unless=lambda case: case["name"] == "launch")
@pytest.mark.parametrize("name", ["prepare_data", "evaluate", "launch", "export"])
def test_killed_in_a_phase_it_goes_on_and_ends_the_same(days: Days, name: str) -> None:
    work = f"killed_in_{name}"
    with pytest.raises(Killed):
        days.loop(work, kill=(date(1), name))
    assert days.loop(work)["version"] == 20261102
    for day in range(2):
        expected = weights(days.folder / "whole" / "jobs" / date(day))
        found = weights(days.folder / work / "jobs" / date(day))
        assert found.keys() == expected.keys()
        for array, values in expected.items():
            np.testing.assert_array_equal(found[array], values, err_msg=f"{date(day)} {array}")
    assert records(days.folder / work) == records(days.folder / "whole")
    assert not list((days.folder / work / "versions").glob(".*")), "nothing half is left"


def test_a_day_unlike_the_others_stops_it(days: Days) -> None:
    write_days(days.folder / "log", NUM_DAYS + 1, turned=(NUM_DAYS,))
    try:
        for _ in range(2):
            with pytest.raises(LoopEnded) as end:
                days.loop("whole")
            assert end.value.code == 81
            assert f"of the model of {date(2)}" in str(end.value)
        assert not (days.folder / "whole" / "jobs" / date(3)).exists()
        assert found_versions(str(days.folder / "whole" / "versions"))[0].number == 20261103
    finally:
        (days.folder / "log" / f"{date(NUM_DAYS)}.parquet").unlink()


def start(days: Days, log: str = "short", work: str = "real", num_workers: int = 2) -> subprocess.Popen[str]:
    """Starts the command itself with several workers, in a work folder of its own."""
    words = [f"--log={days.folder / log}", f"--from={date(0)}", f"--work_dir={days.folder / work}"]
    return subprocess.Popen(
        [sys.executable, "-m", "din_dist.cli.daily", *words, f"--num_workers={num_workers}", *TRAINER],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_training(days: Days, process: subprocess.Popen[str], day: int) -> None:
    until = time.monotonic() + PATIENCE
    while not AT_WORK["launch"](days.folder / "real", date(day), ""):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)


def test_two_workers_stopped_and_killed(days: Days) -> None:
    process = start(days)
    wait_for_training(days, process, 0)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 75, said
    assert said.splitlines()[-1] == f"daily.sh: {date(0)}: stopped during launch. The same command goes on."
    process = start(days)
    wait_for_training(days, process, 1)
    process.kill()
    process.wait(timeout=PATIENCE)  # its workers notice, and save what they have
    process = start(days)
    said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert json.loads(said.splitlines()[-1])["new_days"] == [date(1)]
    assert f"{date(1)}: prepare_data" not in errors, "that was done"
    real, whole = (days.folder / name / "jobs" for name in ("real", "whole"))
    for day in range(2):
        assert_same_weights(weights(real / date(day)), weights(whole / date(day)), tolerance=1e-3)


@pytest.mark.thorough(unless=lambda case: case["num_workers"] == 3)
@pytest.mark.parametrize("num_workers", [2, 3])
def test_many_workers_over_several_days_are_as_one(days: Days, num_workers: int) -> None:
    """Each day begins with the weights of the day before, so a difference would grow from day to day."""
    work = f"{num_workers}_workers"
    process = start(days, "log", work, num_workers)
    said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    found = json.loads(said.splitlines()[-1])
    assert found["new_days"] == [date(day) for day in range(NUM_DAYS)]
    many, alone = (days.folder / name for name in (work, "whole"))
    for day in range(NUM_DAYS):
        jobs = [folder / "jobs" / date(day) for folder in (many, alone)]
        summaries = [json.loads((job / "summary.json").read_text()) for job in jobs]
        assert [summary["world_size"] for summary in summaries] == [num_workers, 1]
        assert summaries[0]["best_step"] == summaries[1]["best_step"]
        assert_same_weights(*map(weights, jobs), tolerance=1e-3)
        if day:
            shown = [
                json.loads((folder / "days" / date(day) / "evaluated.json").read_text()) for folder in (many, alone)
            ]
            assert shown[0]["gauc"] == pytest.approx(shown[1]["gauc"], abs=5e-3)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--from="], "--from: must name the first day. Received: ''. Write it as 2026-11-01."),
        (["--period=year"], "flag --period=year: value should be one of <day|week|month>. See --help."),
        (["--train_from=5"], "--train_from: is set for each day. Received: 5. Drop it; --log names the days."),
        (["--epoch=2"], "Unknown command line flag 'epoch'. Did you mean: epochs ?. See --help."),
        (
            ["--min_item_events=5"],
            "--min_item_events: with --extend needs --forget_after, because new items of a day would have too few",
        ),
        (["--dropout=2"], "--dropout: must be below 1. Received: 2.0. For example 0."),
        (["--log=none"], "--log: must be a folder that can be read. Received: none, No such file or directory."),
        (
            ["--work_dir=/proc/daily"],
            "--work_dir: must be a folder that can be written. Received: /proc/daily, No such",
        ),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, flags: list[str], line: str) -> None:
    (tmp_path / f"{date(0)}.csv").touch()
    words = [f"--log={tmp_path}", f"--from={date(0)}", f"--work_dir={tmp_path / 'work'}", *flags]
    program = [sys.executable, "-m", "din_dist.cli.daily", *words]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"daily.sh: {line}"), said


def test_one_command_at_a_time(tmp_path: Path) -> None:
    from din_dist.training.output_dir import claim_output_dir

    (tmp_path / f"{date(0)}.csv").touch()
    with claim_output_dir(tmp_path / "work"):
        words = [f"--log={tmp_path}", f"--from={date(0)}", f"--work_dir={tmp_path / 'work'}"]
        program = [sys.executable, "-m", "din_dist.cli.daily", *words]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"daily.sh: --work_dir: one job at a time. Received: {tmp_path}/work, where another one is at work. Wait for "
        "its end, stop it, or name another folder.\n"
    )
