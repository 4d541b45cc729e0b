"""Tells a tracker about a job in another thread, so that neither a slow nor a broken tracker stops training."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from din_dist.background_writer import Writer
from din_dist.config import Config, TrackerKind, list_text
from din_dist.text import printable_line
from din_dist.tracking.run import TrackedRun, Tracker, keep_run, kept_run, open_tracker, run_of

RETRY_SECONDS = 60.0  # between two tries to open a run
_MOST_WAITING = 1000  # calls; a job makes a few each second
_MOST_SHOWN = 300  # characters of an error
_DISPENSABLE = ("feature_declarations",)  # too long for a table of settings


class TrackedJob:
    """The run of a job, on the chief. No method raises what the tracker raises, and none but `close` waits for it.

    Args:
        run: of the job.
        folder: of the job, where the run's id is kept for the next start.
        say: prints a line.
        count_failure: is called for each call of the tracker that failed or was dropped.
    """

    def __init__(
        self, run: TrackedRun, folder: Path, say: Callable[[str], None], count_failure: Callable[[], None]
    ) -> None:
        self._run, self._folder, self._say, self._count_failure = run, folder, say, count_failure
        self._writer = Writer(f"tracker {run.tracker}", _MOST_WAITING)
        self._tracker: Tracker | None = None
        self._not_before = 0.0
        self._parameters: dict[str, str] = {}
        self._has_failed = False
        self._ended = False

    def parameters(self, values: Mapping[str, str]) -> None:
        """Keeps settings by their names."""
        self._parameters = dict(values)
        self._later(lambda tracker: None)  # opening a run gives it the parameters

    def curves(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds a point to the curve KIND/NAME of each number among the values."""
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if numbers:
            self._later(lambda tracker: tracker.curves(step, numbers))

    def artefact(self, path: Path) -> None:
        """Keeps a copy of a file."""
        self._later(lambda tracker: tracker.artefact(path))

    def end(self, outcome: str) -> None:
        """Says how the job ended. What follows is dropped."""
        self._later(lambda tracker: tracker.end(outcome))
        self._ended = True

    def close(self, patience_seconds: float) -> None:
        """Sends what is left; gives up after some time without progress."""
        if not self._ended and self._tracker:
            self._later(lambda tracker: tracker.close())
        if not self._writer.wait(patience_seconds):
            self._fail(f"it does not answer, and {self._writer.num_waiting:,} calls are lost")

    def _later(self, call: Callable[[Tracker], object]) -> None:
        if not self._writer.offer(f"telling {self._run.tracker}", functools.partial(self._attempt, call)):
            self._fail("it is too slow, and calls are dropped")

    def _attempt(self, call: Callable[[Tracker], object]) -> None:
        try:
            if tracker := self._opened():
                call(tracker)
            else:
                self._count_failure()
        except Exception as error:  # of a foreign library, which may raise anything
            self._fail(_line(error))

    def _opened(self) -> Tracker | None:
        """Returns the tracker, once it could be opened; None between two tries."""
        if self._tracker is None:
            if time.monotonic() < self._not_before:
                return None
            self._not_before = time.monotonic() + RETRY_SECONDS
            tracker = open_tracker(self._run, self._folder)
            if tracker.run_id != self._run.id:
                self._run = dataclasses.replace(self._run, id=tracker.run_id)
                keep_run(self._run, self._folder)
            if self._parameters:
                tracker.parameters(self._parameters)
            self._tracker = tracker
        return self._tracker

    def _fail(self, problem: str) -> None:
        """Counts a failure; the first is logged."""
        self._count_failure()
        if not self._has_failed:
            self._has_failed = True
            self._say(f"--tracker={self._run.tracker} has failed, and training goes on without: {problem}")


def parameters_of(config: Config) -> dict[str, str]:
    """Returns the settings of a job as a tracker keeps them: those that are not empty, by name."""
    found = {}
    for _, part in config.parts():
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            text = list_text(value) if isinstance(value, tuple) else str(value)
            if "help" in field.metadata and text and field.name not in _DISPENSABLE:
                found[field.name] = text
    return found


def add_to_run(folder: Path, path: Path, say: Callable[[str], None]) -> None:
    """Gives a file to the run of a job that may have ended. If it has none, or that fails, the file stays where it is.

    Args:
        folder: of the job.
        path: of the file.
        say: prints a line.
    """
    run = kept_run(folder)
    if run is None or run.tracker is TrackerKind.TENSORBOARD_HPARAMS:  # TensorBoard keeps no files
        return
    try:
        tracker = open_tracker(run, folder)
        tracker.artefact(path)
        tracker.close()
    except Exception as error:  # of a foreign library, which may raise anything
        say(f"--tracker={run.tracker} has not got {path}: {_line(error)}")


def open_study_run(config: Config, folder: Path, say: Callable[[str], None]) -> TrackedRun | None:
    """Makes the run of a study, which the runs of its trials belong to. It has the start flags.

    Args:
        config: the start flags.
        folder: of the study.
        say: prints a line.

    Returns:
        The run, without an id if that failed; None without a tracker.
    """
    run = run_of(config.telemetry, folder)
    if run is None or run.tracker is TrackerKind.TENSORBOARD_HPARAMS:  # its trials are found by their folders
        return None
    try:
        tracker = open_tracker(run, folder)
        tracker.parameters(parameters_of(config))
        tracker.close()
    except Exception as error:  # of a foreign library, which may raise anything
        say(f"--tracker={run.tracker} has no run of the study: {_line(error)}")
        return run
    run = dataclasses.replace(run, id=tracker.run_id)
    keep_run(run, folder)
    return run


def _line(error: Exception) -> str:
    """Returns an error as one line."""
    return printable_line(" ".join(f"{type(error).__name__}: {error}".split()))[:_MOST_SHOWN]
