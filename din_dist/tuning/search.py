"""Runs the trials of a study, one after the other or side by side."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from din_dist.errors import EXIT_RETRY, InputError
from din_dist.tuning.study import Study, TrialState
from din_dist.tuning.trial_job import LOG, TrialProcess, Validations, last_words, wait_for_earlier

TRIALS = "trials"
_LOOK_SECONDS = 0.1
_MOST_REPEATS = 3  # of a job that somebody else has stopped
_EARLIER_SECONDS = 120.0  # for a job of a killed study to save and end

# Starts the job of a trial: its folder, its values by setting, and its place among those side by side.
Start = Callable[[Path, Mapping[str, str], int], TrialProcess]


@dataclasses.dataclass(eq=False)
class _Running:
    """A trial whose job runs."""

    trial: Any
    values: dict[str, str]
    slot: int
    folder: Path
    process: TrialProcess
    validations: Validations
    log_begin: int
    started: float
    repeats: int = 0
    is_pruned: bool = False
    undefined: bool = False


class TrialSearch:
    """The trials of a study that are still to come.

    Args:
        study: of the trials.
        folder: of the study; the job of trial N is in trials/N.
        start: starts the job of a trial.
        metric: what trials are compared by.
        say: prints a line for people.
        stop_requested: tells whether the search should stop; it is called every tenth of a second.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        start: Start,
        *,
        metric: str,
        say: Callable[[str], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self._study, self._folder, self._start, self._metric = study, folder, start, metric
        self._say, self._stop_requested = say, stop_requested
        self._running: list[_Running] = []

    def run(self, num_trials: int, num_parallel: int) -> bool:
        """Runs trials until the study has so many; returns False if it was stopped before.

        Args:
            num_trials: how many, with those of earlier runs.
            num_parallel: how many run side by side.
        """
        waiting = self._study.unfinished()
        try:
            while not self._stop_requested():
                while len(self._running) < num_parallel and (waiting or self._study.count() < num_trials):
                    self._begin(waiting.pop(0) if waiting else self._study.next(), num_parallel)
                if not self._running:
                    return True
                time.sleep(_LOOK_SECONDS)
                for running in list(self._running):
                    self._look(running)
            return False
        finally:
            self._end_all()

    def _begin(self, trial: Any, num_parallel: int) -> None:
        folder, values = self._folder / TRIALS / str(trial.number), self._study.words(trial)
        folder.mkdir(parents=True, exist_ok=True)
        if not wait_for_earlier(folder, _EARLIER_SECONDS):
            raise InputError(
                f"{folder}: one job at a time. Received: a job that has been at work there for {_EARLIER_SECONDS:g} s. "
                "Stop it, and run the same command again."
            )
        slot = min(set(range(num_parallel)) - {running.slot for running in self._running})
        size = (folder / LOG).stat().st_size if (folder / LOG).exists() else 0
        what = ", ".join(f"{name}={value}" for name, value in values.items()) or "the start flags"
        self._say(f"trial {trial.number}: {what}")
        self._running.append(
            _Running(
                trial,
                values,
                slot,
                folder,
                self._start(folder, values, slot),
                Validations(folder, self._metric),
                size,
                time.monotonic(),
            )
        )

    def _look(self, running: _Running) -> None:
        """Reads what a job has validated, and ends its trial when the job has ended."""
        code = running.process.poll()  # before reading: what an ended job has written is all there
        self._read(running)
        if code is None:
            return
        self._study.add_seconds(running.trial, time.monotonic() - running.started)
        stopped = code == EXIT_RETRY and not running.is_pruned
        if stopped and running.repeats < _MOST_REPEATS and not self._stop_requested():
            running.repeats += 1
            running.started = time.monotonic()
            running.process = self._start(running.folder, running.values, running.slot)
            return
        self._running.remove(running)
        if not (stopped and self._stop_requested()):  # otherwise it goes on later
            self._finish(running, code)

    def _read(self, running: _Running) -> None:
        """Reports validations to the study, and stops the job if the study wants that."""
        if running.is_pruned:
            return
        for step, value in running.validations.new():
            if value is None:
                running.undefined = True
            elif self._study.report(running.trial, step, value):
                running.is_pruned = True
                self._say(f"trial {running.trial.number}: stopped at step {step}, {self._metric} {value:.4f}")
                running.process.stop()
                return

    def _finish(self, running: _Running, code: int) -> None:
        study, trial = self._study, running.trial
        if running.is_pruned:
            study.end(trial, TrialState.PRUNED)
        elif code or study.best_of(trial) is None:
            problem = last_words(running.folder / LOG, running.log_begin) if code else self._without_value(running)
            study.end(trial, TrialState.FAILED, problem)
            self._say(f"trial {trial.number}: failed: {problem}")
        else:
            study.end(trial, TrialState.DONE)
            self._say(f"trial {trial.number}: validation {self._metric} {study.best_of(trial):.4f}")

    def _without_value(self, running: _Running) -> str:
        if running.undefined:
            return f"validation {self._metric} is not defined: no user has examples of both labels; try --metric=auc"
        return "the job has no validation"

    def _end_all(self) -> None:
        """Stops the jobs that run; they save, and their trials go on when the study does."""
        for running in self._running:
            running.process.stop()
        for running in list(self._running):
            while running.process.poll() is None:
                time.sleep(_LOOK_SECONDS)
            self._study.add_seconds(running.trial, time.monotonic() - running.started)
        self._running.clear()
