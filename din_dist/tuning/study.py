"""Keeps a study in a journal: its trials, their values, and what Optuna suggests next. Only this module imports Optuna.

Every choice follows from the seed, the trial's number and the trials before it. So a study that was killed goes on as
if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from din_dist.errors import InputError
from din_dist.text import shown
from din_dist.tuning.space import Dimension, ValueKind, words

JOURNAL = "journal.log"
_NAME = "tune"
_SETTINGS, _SECONDS, _PROBLEM = "settings", "seconds", "problem"
_SEEDS_OF_A_TRIAL = 1000  # more than there are settings


class TrialState(enum.StrEnum):
    """How a trial ended."""

    DONE = "done"
    PRUNED = "pruned"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A trial of a study.

    Attributes:
        number: of the trial; trial 0 has the start flags.
        values: by setting, as on a command line, what the trial has in place of the start flags.
        state: of the trial.
        value: its best validation so far; None without one.
        seconds: how long its job has run.
        problem: why it failed, as one line.
    """

    number: int
    values: dict[str, str]
    state: TrialState
    value: float | None
    seconds: float
    problem: str


def optuna() -> Any:
    """Imports Optuna.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise InputError(
            f"tune: needs Optuna. Received: {shown(str(error))}. Run: pip install -c launch/constraints.txt optuna."
        ) from error


class Study:
    """A study in a folder that this process alone works in.

    Args:
        folder: of the journal.
        space: the settings that are searched.
        start: by setting, the values of the start flags, where the space has them.
        maximize: whether more is better.
        seed: of everything that is drawn.
        prune_after_trials: how many trials must be done before others are stopped early; None: none is.
    """

    def __init__(
        self,
        folder: Path,
        space: Sequence[Dimension],
        start: Mapping[str, Any],
        *,
        maximize: bool,
        seed: int,
        prune_after_trials: int | None,
    ) -> None:
        self._optuna = library = optuna()
        library.logging.set_verbosity(library.logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")
        self._space, self._start, self._seed, self._maximize = space, start, seed, maximize
        path = folder / JOURNAL
        _drop_cut_line(path)
        journal = library.storages.journal
        backend = journal.JournalFileBackend(str(path), lock_obj=_NoLock())
        pruner = library.pruners.NopPruner()
        if prune_after_trials is not None:
            pruner = library.pruners.MedianPruner(n_startup_trials=prune_after_trials)
        self._study = library.create_study(
            storage=library.storages.JournalStorage(backend),
            pruner=pruner,
            study_name=_NAME,
            direction="maximize" if maximize else "minimize",
            load_if_exists=True,
        )

    def settings(self) -> dict[str, str] | None:
        """Returns what `keep_settings` was given when the study began; None for a new study."""
        return self._study.user_attrs.get(_SETTINGS)

    def keep_settings(self, settings: Mapping[str, str]) -> None:
        """Keeps what must stay the same when the study goes on."""
        self._study.set_user_attr(_SETTINGS, dict(settings))

    def unfinished(self) -> list[Any]:
        """Returns the trials that were running when the study was stopped or killed, by number."""
        running = self._optuna.trial.TrialState.RUNNING
        trials = self._study.get_trials(states=(running,))
        return [self._completed(self._optuna.trial.Trial(self._study, trial._trial_id)) for trial in trials]

    def count(self) -> int:
        """Returns how many trials have begun."""
        waiting = self._optuna.trial.TrialState.WAITING
        return sum(trial.state is not waiting for trial in self._study.get_trials(deepcopy=False))

    def next(self) -> Any:
        """Begins the next trial, whose values Optuna suggests; the first has the start flags."""
        if not self._study.get_trials(deepcopy=False):
            self._study.enqueue_trial(self._start_values())
        return self._completed(self._study.ask())

    def words(self, trial: Any) -> dict[str, str]:
        """Returns, by setting, the values of a trial as on a command line; none for the first."""
        return words(trial.params, self._space) if trial.number else {}

    def report(self, trial: Any, step: int, value: float) -> bool:
        """Notes a validation; tells whether the trial should be stopped. A step that is repeated counts once."""
        if step not in self._frozen(trial.number).intermediate_values:
            trial.report(value, step)
        return trial.number > 0 and trial.should_prune()

    def best_of(self, trial: Any) -> float | None:
        """Returns the best validation of a trial; None before the first."""
        return self._best(self._frozen(trial.number))

    def add_seconds(self, trial: Any, seconds: float) -> None:
        """Adds to how long the job of a trial has run."""
        trial.set_user_attr(_SECONDS, trial.user_attrs.get(_SECONDS, 0.0) + seconds)

    def end(self, trial: Any, state: TrialState, problem: str = "") -> None:
        """Ends a trial as done with its best validation, as pruned, or as failed because of `problem`."""
        states = self._optuna.trial.TrialState
        if state is TrialState.FAILED:
            trial.set_user_attr(_PROBLEM, problem)
            self._study.tell(trial, state=states.FAIL)
        elif state is TrialState.PRUNED:
            self._study.tell(trial, state=states.PRUNED)
        else:
            self._study.tell(trial, self.best_of(trial))

    def outcomes(self) -> list[Outcome]:
        """Returns all trials that have begun, by number."""
        states = self._optuna.trial.TrialState
        names = {
            states.COMPLETE: TrialState.DONE,
            states.PRUNED: TrialState.PRUNED,
            states.FAIL: TrialState.FAILED,
            states.RUNNING: TrialState.STOPPED,
        }
        return [
            Outcome(
                trial.number,
                self.words(trial),
                names[trial.state],
                self._best(trial),
                float(trial.user_attrs.get(_SECONDS, 0.0)),
                str(trial.user_attrs.get(_PROBLEM, "")),
            )
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state in names
        ]

    def _best(self, trial: Any) -> float | None:
        best = max if self._maximize else min
        return best(trial.intermediate_values.values(), default=None)

    def _frozen(self, number: int) -> Any:
        return self._study.get_trials(deepcopy=False)[number]

    def _start_values(self) -> dict[str, Any]:
        """Returns the start flags that lie in the space, from which Optuna learns too."""
        found = {}
        for dimension in self._space:
            value = self._start.get(dimension.name)
            if dimension.has(value):
                found[dimension.name] = value
        return found

    def _completed(self, trial: Any) -> Any:
        """Draws what a trial has no value of yet: each from a seed of its own, because a kill may come between two."""
        fixed = self._start_values() if trial.number == 0 else None
        for place, dimension in enumerate(self._space):
            if fixed is not None and dimension.name not in fixed:
                continue
            seed = (self._seed * 1_000_003 + trial.number * _SEEDS_OF_A_TRIAL + place) % 2**32
            self._study.sampler = self._optuna.samplers.TPESampler(seed=seed)
            name, low, high, log = dimension.name, dimension.low, dimension.high, dimension.log
            if dimension.choices:
                trial.suggest_categorical(name, dimension.choices)
            elif dimension.kind is ValueKind.WHOLE:
                trial.suggest_int(name, int(low), int(high), log=log, step=int(dimension.step or 1))
            else:
                trial.suggest_float(name, low, high, log=log, step=dimension.step)
        return trial


class _NoLock:
    """Locks nothing: the folder of the study is locked, and a lock file would outlive a killed process."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _drop_cut_line(path: Path) -> None:
    """Drops the end of a line that a killed process has begun, because the journal must end with a whole one."""
    if path.exists():
        with path.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
