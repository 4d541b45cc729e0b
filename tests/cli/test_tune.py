"""`tune`: what it finds, how it goes on after a kill, what it stops early, and what it refuses.

Most studies here have stand-ins for jobs, which `trial_stub` describes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import assert_one_line, command
from tests.support.finished_job import run as run_command
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded, Running
from tests.support.programs import imported
from tests.support.repository import ROOT
from tests.support.small_log import write_log
from tests.support.trial_stub import NUM_STEPS, SLOW

pytestmark = pytest.mark.usefixtures("optuna")
SPACE = """
[learning_rate]
low = 1e-4
high = 1.0
log = true
[dropout]
choices = ["0.0", "0.2"]
"""


@pytest.fixture(scope="module")
def optuna() -> Any:
    return imported("optuna", "optuna")


def words(folder: Path, *flags: str, space: str = SPACE) -> list[str]:
    """Returns the flags of a study in `folder`/study, and writes its space."""
    (folder / "space.toml").write_text(space)
    return [f"--space={folder / 'space.toml'}", f"--output_dir={folder / 'study'}", "--split=leave_two_out", *flags]


def start(folder: Path, *flags: str, space: str = SPACE) -> subprocess.Popen[str]:
    """Starts a study whose jobs are stand-ins."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.trial_stub", "--tune", *words(folder, *flags, space=space)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(study: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = study.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess([], study.returncode, out, err)


def tune(folder: Path, *flags: str, space: str = SPACE) -> subprocess.CompletedProcess[str]:
    return finished(start(folder, *flags, space=space))


def rows(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Returns the lines of the table without seconds."""
    lines = [line for line in done.stdout.splitlines() if re.match(r" +\d+ ", line)]
    return [re.sub(r" +\d+\.\d  ", " ", line, count=1) for line in lines]


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def jobs(folder: Path) -> list[int]:
    """Returns the trials whose jobs have begun."""
    return sorted(int(path.parent.name) for path in folder.glob("study/trials/*/metrics.jsonl"))


def steps(folder: Path, trial: int) -> list[int]:
    lines = (folder / "study" / "trials" / str(trial) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(optuna: Any, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A study of six trials that nothing disturbed; it prunes early."""
    return tune(tmp_path_factory.mktemp("study"), "--trials=6", "--prune_after_trials=2")


def test_trial_0_is_the_start_and_the_best_is_told(uninterrupted: subprocess.CompletedProcess[str]) -> None:
    found, lines = told(uninterrupted), rows(uninterrupted)
    assert len(lines) == found["trials"] == 6
    assert re.fullmatch(r" +0 +0\.7060  done +the start flags", lines[0])
    assert sum("pruned" in line for line in lines) == found["trials_pruned"] > 0
    values = [float(line.split()[1]) for line in lines if " done " in line]
    assert found["best_value"] == pytest.approx(max(values), abs=1e-4)
    assert found["start_value"] == pytest.approx(0.706) and found["is_better"]
    assert f"trial {found['best_trial']} is better than the start flags: validation gauc" in uninterrupted.stdout
    flagfile = Path(found["best_flags"]).read_text().splitlines()
    assert flagfile[0].startswith(f"# Trial {found['best_trial']} is better than")
    for name, value in found["values"].items():
        assert [line for line in flagfile if line.startswith(f"--{name}=")] == [f"--{name}={value}"]
    assert flagfile[-1] == f"--output_dir={Path(found['best_flags']).parent / 'best'}"


def test_a_killed_study_goes_on_as_if_nothing_had_happened(
    uninterrupted: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    """Its job saves and ends; then the same job goes on, and none was ever beside another in a folder."""
    flags = ("--trials=6", "--prune_after_trials=2")
    study = start(tmp_path, *flags)
    wait_until(lambda: 1 in jobs(tmp_path))
    (tmp_path / "study" / "trials" / SLOW).touch()
    wait_until(lambda: (tmp_path / "study" / "trials" / SLOW).exists() and len(jobs(tmp_path)) >= 2)
    os.kill(study.pid, signal.SIGKILL)
    assert finished(study).returncode == -signal.SIGKILL
    with (tmp_path / "study" / "journal.log").open("a") as journal:
        journal.write('{"op_code": 4, "worker')  # what a kill in the middle of a line leaves
    (tmp_path / "study" / "trials" / SLOW).unlink()
    again = tune(tmp_path, *flags)
    assert again.returncode == 0, again.stderr
    assert rows(again) == rows(uninterrupted)
    assert all(steps(tmp_path, trial) == sorted({*steps(tmp_path, trial)}) for trial in jobs(tmp_path))
    assert rows(tune(tmp_path, *flags)) == rows(again)  # nothing is left to do


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    study = start(tmp_path, "--trials=2")
    (tmp_path / "study" / "trials").mkdir(parents=True)
    (tmp_path / "study" / "trials" / SLOW).touch()
    wait_until(lambda: jobs(tmp_path) == [0] and bool(steps(tmp_path, 0)))
    study.send_signal(signal.SIGTERM)
    done = finished(study)
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        f"the study in {tmp_path / 'study'} is saved; the same command goes on with it"
    )
    assert (tmp_path / "study" / "trials" / "0" / "saved").exists()
    (tmp_path / "study" / "trials" / SLOW).unlink()
    assert told(tune(tmp_path, "--trials=2"))["trials"] == 2
    assert steps(tmp_path, 0) == list(range(1, NUM_STEPS + 1))
    other = tune(tmp_path, "--trials=3", "--epochs=7")
    assert_one_line(other, "--output_dir: a study goes on with the same start flags. Received: ")
    assert "has --epochs=2, now --epochs=7. Give the same again, or name another folder." in other.stderr
    assert told(tune(tmp_path, "--trials=3"))["trials"] == 3


def test_trials_run_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "study" / "trials").mkdir(parents=True)
    (tmp_path / "study" / "trials" / SLOW).touch()
    study = start(tmp_path, "--trials=3", "--parallel_trials=2")
    wait_until(lambda: jobs(tmp_path) == [0, 1])
    (tmp_path / "study" / "trials" / SLOW).unlink()
    assert told(finished(study))["trials"] == 3


def test_failures_are_told_and_the_study_goes_on(tmp_path: Path) -> None:
    space = '[dropout]\nchoices = ["0.9", "0.8"]'
    done = tune(tmp_path, "--trials=5", space=space)
    assert told(done)["trials_failed"] + told(done)["trials_done"] == 5
    assert told(done)["is_better"] is False and told(done)["best_trial"] == 0
    assert "no trial is better than the start flags, whose validation gauc is 0.7060" in done.stdout
    failed = [line for line in rows(done) if "failed" in line]
    assert failed and all(
        "--dropout=0.9 (--dropout: must be another. Received: 0.9. Give less.)" in line for line in failed
    )


def test_a_study_whose_trials_all_fail(tmp_path: Path) -> None:
    done = tune(tmp_path, "--trials=2", "--dropout=0.9", space="[learning_rate]\nlow = 0.1\nhigh = 0.2")
    assert done.returncode == 2
    assert "space.toml: some trial must succeed. Received: 2 that failed, the first by '--dropout: must" in done.stderr
    assert len(rows(done)) == 2 and not (tmp_path / "study" / "best.flags").exists()


@pytest.mark.parametrize(
    ("flags", "space", "error"),
    [
        (
            [],
            "[learnin_rate]\nlow=1\nhigh=2",
            "[learnin_rate] must be a setting of train. Received: 'learnin_rate'. Did",
        ),
        ([], "[dropout]\nlow=0\nhigh=1.5", "--dropout: must be below 1"),
        ([], "[embedding_dim]\nchoices=['x']", "--embedding_dim: "),
        ([], "[optimizer]\nchoices=['sgdd']", "flag --optimizer=sgdd: value should be one of"),
        ([], "[split]\nchoices=['temporal']", "[split] decides what trials are compared on"),
        (
            ["--split=leave_one_out"],
            SPACE,
            "--split: trials are compared on validation events, which leave_one_out has",
        ),
        (["--space="], SPACE, "--space: must name the file of the space to search. Received: ''. Give a TOML file."),
        (["--trials=0"], SPACE, "--trials: must be at least 1. Received: 0. Give 1."),
        (["--parallel_trials=0"], SPACE, "--parallel_trials: must be at least 1. Received: 0. Give 1."),
        (["--search_seed=-1"], SPACE, "--search_seed: must be at least 0. Received: -1. For example 1."),
    ],
)
def test_refusals(commands: Preloaded, tmp_path: Path, flags: list[str], space: str, error: str) -> None:
    assert_one_line(commands.run("tune", *words(tmp_path, *flags, space=space)), error)
    assert not (tmp_path / "study").exists()


def test_a_folder_with_a_job_is_refused(commands: Preloaded, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "metrics.jsonl").touch()
    error = (
        f"--output_dir: must be a folder of the study's own. Received: {tmp_path / 'study'}, which has a training job."
    )
    assert_one_line(commands.run("tune", *words(tmp_path)), error)


def test_without_optuna_a_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "optuna.py").write_text("raise ModuleNotFoundError(\"No module named 'optuna'\")")
    done = subprocess.run(
        [sys.executable, "-m", "din_dist.cli.tune", *words(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert_one_line(
        done, "tune: needs Optuna. Received: \"No module named 'optuna'\". Run: pip install -c launch/constraints"
    )
    assert not (tmp_path / "study").exists()


class _Job:
    """A real job of a trial, in a process that has its imports."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.asked = False

    def poll(self) -> int | None:
        done = self._running.ended()
        return None if done is None else done.returncode

    def stop(self) -> None:
        self.asked = True
        os.kill(self._running.pid, signal.SIGTERM)


def test_real_jobs_find_the_better_rate_and_prune_the_worse(optuna: Any, commands: Preloaded, tmp_path: Path) -> None:
    """A rate of nearly nothing is stopped early, with its updates saved; the other is the best."""
    from din_dist.tuning.result import best_of
    from din_dist.tuning.search import TrialSearch
    from din_dist.tuning.space import Dimension, ValueKind
    from din_dist.tuning.study import Study, TrialState

    write_log(tmp_path / "log.parquet", num_users=40)
    flags = ("--split=leave_two_out", "--epochs=1", "--evaluate_every_steps=10", "--learning_rate=0.02")
    run_command(commands, "prepare_data", *command("train", tmp_path, *flags)[3:])
    started: dict[str, _Job] = {}

    def start_job(folder: Path, values: Mapping[str, str], slot: int) -> _Job:
        (folder / "tune.log").touch()
        changed = [f"--{name}={text}" for name, text in values.items()]
        changed += ["--epochs=1000"] if "1e-09" in values.values() else []  # it does not end by itself meanwhile
        given = command("train", tmp_path, *flags, *changed, f"--output_dir={folder}")[3:]
        started[folder.name] = _Job(commands.start("train", *given))
        return started[folder.name]

    space = [Dimension("learning_rate", ValueKind.NUMBER, choices=("1e-09", "0.02"))]
    (tmp_path / "study").mkdir()
    study = Study(tmp_path / "study", space, {"learning_rate": "0.02"}, maximize=True, seed=3, prune_after_trials=1)
    search = TrialSearch(
        study, tmp_path / "study", start_job, metric="gauc", say=lambda _: None, stop_requested=lambda: False
    )
    assert search.run(2, 1)
    outcomes = study.outcomes()
    worse = [outcome for outcome in outcomes if outcome.values.get("learning_rate") == "1e-09"]
    assert worse and all(outcome.state is TrialState.PRUNED for outcome in worse)
    best = best_of(outcomes, maximize=True)
    assert best is not None and best not in worse
    for outcome in worse:
        assert started[str(outcome.number)].asked and started[str(outcome.number)].poll() == 75
        assert list((tmp_path / "study" / "trials" / str(outcome.number) / "checkpoints").iterdir())


@pytest.mark.thorough
def test_a_study_under_horovodrun(tmp_path: Path) -> None:
    flags = [flag for flag in command("tune", tmp_path, "--epochs=1") if not flag.startswith("--output_dir")]
    given = words(tmp_path, "--trials=2", "--num_workers=2", space="[learning_rate]\nchoices = [0.01]")
    done = subprocess.run([*flags, *given], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert told(done)["trials_done"] == 2, done.stderr
    summary = json.loads((tmp_path / "study" / "trials" / "1" / "summary.json").read_text())
    assert summary["world_size"] == 2
