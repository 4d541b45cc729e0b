"""Searches for better settings: `python -m din_dist.cli.tune --trials=N --space=FILE`, with the trainer's flags.

Trial 0 trains with these flags themselves. Each trial is a job in OUTPUT_DIR/trials/NUMBER. A study that was stopped or
killed goes on by the same command. The best flags go to OUTPUT_DIR/best.flags, a table to stdout, and the same as JSON
to its last line.
"""

from __future__ import annotations

import os
import signal
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from din_dist import environment, place
from din_dist.cli import entry, launch
from din_dist.cli import flags as settings
from din_dist.cli.help import theme
from din_dist.config import Config, Split, require
from din_dist.errors import EXIT_SIGINT, InputError, Interrupted
from din_dist.files import write_text
from din_dist.text import to_json
from din_dist.tracking.run import TrackedRun, require_installed
from din_dist.tracking.tracked_job import add_to_run, open_study_run
from din_dist.training.output_dir import claim_output_dir
from din_dist.tuning import result
from din_dist.tuning.search import TRIALS, TrialSearch
from din_dist.tuning.space import Dimension, ValueKind, read_space
from din_dist.tuning.study import JOURNAL, Study, optuna
from din_dist.tuning.trial_job import LOG, LaunchedProcess

BEST_FLAGS = "best.flags"
_METRICS = {"gauc": True, "auc": True, "log_loss": False}  # whether more is better
_NOT_SEARCHED = {
    "output_dir": "is the folder of a trial, which tune names",
    "features": "cannot be searched, because jobs keep the declarations and not the file",
    "feature_declarations": "cannot be searched, because jobs keep the declarations and not the file",
    **dict.fromkeys(
        ("dataset", "data_path", "data_dir", "extend", "split", "validation_from", "test_from", "validation_task"),
        "decides what trials are compared on, and must be the same for all",
    ),
}

with theme("search"):
    flags.DEFINE_integer("trials", 20, "Trials of the study, with trial 0, which has the start flags.")
    settings.define_path("space", "", "TOML file with a table for each setting to search (din_dist/tuning/README.md).")
    flags.DEFINE_enum("metric", "gauc", list(_METRICS), "Metric of the validation events that trials are compared by.")
    flags.DEFINE_integer("num_workers", 1, "Workers of each trial, under horovodrun if there are several.")
    flags.DEFINE_integer("parallel_trials", 1, "Trials to run side by side, each on its share of cores and GPUs.")
    flags.DEFINE_integer("search_seed", 1, "Seed of the values that are tried.")
    flags.DEFINE_boolean("prune", True, "Stop a trial that validates worse than the median of those that are done.")
    flags.DEFINE_integer("prune_after_trials", 5, "Trials to finish before the first is stopped early.")
settings.define_flags()


def main() -> None:
    config, values = settings.config_from_flags(), flags.FLAGS
    space = _checked_space(config)
    optuna()  # before anything is written
    require_installed(config.telemetry.tracker)
    folder = Path(config.job.output_dir)
    lock = _claim(folder)
    start = settings.to_flagfile()
    maximize = _METRICS[values.metric]
    study = Study(
        folder,
        space,
        _start_values(space),
        maximize=maximize,
        seed=values.search_seed,
        prune_after_trials=values.prune_after_trials if values.prune else None,
    )
    _require_same_study(study, folder, start, space)
    asked = _StopRequest()
    prepares = any(dimension.name in settings.settings_from_flags(type(config.data)) for dimension in space)
    if code := launch.run_first("prepare_data", start.splitlines()):
        sys.exit(code)
    asked.listen()
    jobs = _Jobs(start, prepares, open_study_run(config, folder, entry.say))
    search = TrialSearch(
        study, folder, jobs.start, metric=values.metric, say=entry.say, stop_requested=lambda: asked.stopped
    )
    if not search.run(values.trials, values.parallel_trials):
        raise Interrupted(f"the study in {folder} is saved; the same command goes on with it")
    _publish(study, folder, jobs, maximize)
    add_to_run(folder, folder / BEST_FLAGS, entry.say)
    lock.close()


def trial_command(num_workers: int, prepare: bool) -> list[str]:
    """Returns the words that start the job of a trial, to which its flags are added."""
    words = [sys.executable, "-m", "din_dist.cli.launch", f"--num_workers={num_workers}"]
    return words if prepare else [*words, "--noprepare"]


class _StopRequest:
    """The request to stop that a signal makes. A second Ctrl-C ends the study at once; its jobs save and end."""

    def __init__(self) -> None:
        self.stopped = False

    def listen(self) -> None:
        for number in environment.ending_signals():
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.stopped and number == signal.SIGINT:
            os._exit(EXIT_SIGINT)
        if not self.stopped:
            entry.say("stopping when the jobs that run have saved; Ctrl-C once more does not wait for them")
        self.stopped = True


class _Jobs:
    """The jobs of trials.

    Args:
        start: the start flags, as a flagfile.
        prepare: whether each job prepares its data, because trials differ in settings of the data.
        run: the run of the study in a tracker, which those of the trials belong to; None: there is none.
    """

    def __init__(self, start: str, prepare: bool, run: TrackedRun | None) -> None:
        self._start, self._prepare, self._run = start, prepare, run

    def flagfile(self, folder: Path, values: Mapping[str, str]) -> str:
        """Returns the flags of a trial whose job writes to `folder`."""
        run = [f"--tracker_uri={self._run.uri}", f"--tracker_parent={self._run.id}"] if self._run else []
        port = ["--metrics_port=0"] if flags.FLAGS.parallel_trials > 1 and flags.FLAGS.metrics_port > 0 else []
        changed = [*run, *port, *(f"--{name}={text}" for name, text in values.items()), f"--output_dir={folder}"]
        names = {_name(line) for line in changed}
        names |= {f"no{name}" for name in names}
        kept = [line for line in self._start.splitlines() if _name(line) not in names]
        return "".join(f"{line}\n" for line in (*kept, *changed))

    def start(self, folder: Path, values: Mapping[str, str], slot: int) -> LaunchedProcess:
        """Starts the job of a trial, by the launcher.

        Args:
            folder: of the job.
            values: by setting, those of the trial.
            slot: its place among the trials that run side by side.
        """
        path, workers = folder / "trial.flags", flags.FLAGS.num_workers
        write_text(path, self.flagfile(folder, values))
        cores, gpus = _share(slot, flags.FLAGS.parallel_trials, workers)
        command = [*trial_command(workers, self._prepare), f"--flagfile={path}"]
        return LaunchedProcess(command, folder / LOG, cores, gpus)


def _name(line: str) -> str:
    """Returns the flag in a line of a flagfile; that of a switch that is off begins with `no`."""
    return line.partition("=")[0].removeprefix("--")


def _share(slot: int, num_slots: int, num_workers: int) -> tuple[list[int], str]:
    """Returns the cores and GPUs of one of several trials side by side; nothing for a trial alone."""
    if num_slots == 1:
        return [], ""
    cores = sorted(os.sched_getaffinity(0))
    share = cores[len(cores) * slot // num_slots : len(cores) * (slot + 1) // num_slots]
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    own = gpus[slot * num_workers : (slot + 1) * num_workers]
    return share or [cores[slot % len(cores)]], ",".join(own)


def _checked_space(config: Config) -> list[Dimension]:
    """Checks the flags of the search, and returns the space.

    Raises:
        InputError: one of them is wrong, or there is nothing to compare trials by.
    """
    values = flags.FLAGS
    for name, least in (("trials", 1), ("num_workers", 1), ("parallel_trials", 1), ("prune_after_trials", 1)):
        given = typing.cast(int, values[name].value)
        require(given >= least, f"must be at least {least}", name, given, f"Give {least}.")
    require(values.search_seed >= 0, "must be at least 0", "search_seed", values.search_seed, "For example 1.")
    require(bool(values.space), "must name the file of the space to search", "space", values.space, "Give a TOML file.")
    require(
        config.data.split is not Split.LEAVE_ONE_OUT,
        "trials are compared on validation events, which leave_one_out has not",
        "split",
        str(config.data.split),
        "Use --split=leave_two_out, temporal or users.",
    )
    space = read_space(Path(values.space), _kinds(), _NOT_SEARCHED)
    for dimension in space:
        for text in dimension.texts():
            settings.check_text(dimension.name, text)
    return space


def _kinds() -> dict[str, ValueKind]:
    """Returns, by name, what the values of each setting are."""
    kinds: dict[Any, ValueKind] = {int: ValueKind.WHOLE, float: ValueKind.NUMBER}
    return {
        field.name: kinds.get(types[field.name], ValueKind.OTHER)
        for _, part in Config().parts()
        for types in (typing.get_type_hints(type(part)),)
        for field in settings.fields_with_flags(type(part))
    }


def _start_values(space: Sequence[Dimension]) -> dict[str, Any]:
    """Returns, by setting, the values of the start flags as the space writes them."""
    found = {}
    for dimension in space:
        flag = flags.FLAGS[dimension.name]
        if not dimension.choices:
            found[dimension.name] = flag.value
        else:
            text = flag.serialize().partition("=")[2] or str(flag.value).lower()
            found[dimension.name] = next((choice for choice in dimension.choices if choice == text), None)
    return found


def _claim(folder: Path) -> typing.TextIO:
    """Keeps other studies and jobs out of the folder.

    Raises:
        InputError: another one is at work in it, or it has a job.
    """
    if (folder / "metrics.jsonl").exists() or (folder / "flags.txt").exists():
        raise InputError(
            f"--output_dir: must be a folder of the study's own. Received: {folder}, which has a training job. Name "
            "another one."
        )
    return claim_output_dir(folder)


def _require_same_study(study: Study, folder: Path, start: str, space: Sequence[Dimension]) -> None:
    """Refuses to go on with other flags than the study began with.

    Raises:
        InputError: something differs that decides about its trials.
    """
    own = {name: str(flags.FLAGS[name].value) for name in ("metric", "search_seed", "prune", "prune_after_trials")}
    own |= {"space": to_json({"space": [dimension.to_json() for dimension in space]})}
    own |= {"start flags": "\n".join(line for line in start.splitlines() if _name(line) != "output_dir")}
    before = study.settings()
    if before is None:
        study.keep_settings(own)
        return
    for name, value in own.items():
        if before.get(name) != value:
            old, new = set(str(before.get(name)).splitlines()), set(value.splitlines())
            received = f"{' '.join(sorted(old - new))}, now {' '.join(sorted(new - old))}"
            raise InputError(
                f"--output_dir: a study goes on with the same {name}. Received: {folder / JOURNAL} has {received}. "
                "Give the same again, or name another folder."
            )


def _publish(study: Study, folder: Path, jobs: _Jobs, maximize: bool) -> None:
    """Writes the best flags, and prints the table and the result.

    Raises:
        InputError: every trial has failed.
    """
    metric, outcomes = flags.FLAGS.metric, study.outcomes()
    print(result.table(outcomes, metric))
    best = result.best_of(outcomes, maximize)
    if best is None:
        raise InputError(
            f"{flags.FLAGS.space}: some trial must succeed. Received: {len(outcomes)} that failed, the first by "
            f"{outcomes[0].problem!r}. See {folder / TRIALS}."
        )
    said = result.verdict(outcomes, best, metric)
    print(said)
    path = folder / BEST_FLAGS
    text = jobs.flagfile(folder / "best", best.values)
    write_text(path, f"# {said[0].upper()}{said[1:]}.\n{text}")
    print(to_json(result.to_record(outcomes, best, metric, str(path))), flush=True)


if __name__ == "__main__":
    place.forget()
    entry.run(main)
