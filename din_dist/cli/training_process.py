"""One process of a training job, from its settings to its summary: the command `train`, and the library."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from din_dist import progress
from din_dist.cli import entry
from din_dist.config import Config
from din_dist.errors import EXIT_GAVE_UP, InputError
from din_dist.files import read_record
from din_dist.text import duration, parse_json

if TYPE_CHECKING:
    from din_dist.distributed.runtime import Runtime
    from din_dist.training.output_dir import OutputDirLock
    from din_dist.training.trainer import ReceivedSignals, Trainer
    from din_dist.training.warm_start import Parent
    from din_dist.training_state import TrainingState

_SAVING_LOCK = ".saving"


def open_parent(folder: Path) -> Parent:
    """Opens the job or the export that `--warm_start_from` names.

    Raises:
        InputError: it is neither, or cannot be read.
    """
    from din_dist.serving.export.parent import ParentExport
    from din_dist.serving.manifest import MANIFEST
    from din_dist.training.warm_start import ParentJob

    return ParentExport(folder) if (folder / MANIFEST).is_file() else ParentJob(folder)


class TrainingProcess:
    """One process of a training job: it is wired when it is built.

    Args:
        config: all settings.
        runtime: this rank's way to the others.
        lock: of `--output_dir`, not held yet.
        signals: what this process was asked to do.
        num_threads: how many cores this process may use.
        flagfile: the settings as text, for flags.txt.
        started: `time.perf_counter` at the start of the process.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        lock: OutputDirLock,
        signals: ReceivedSignals,
        num_threads: int,
        flagfile: str,
        started: float,
    ) -> None:
        from din_dist.assembly import Assembly
        from din_dist.data.prepared import open_prepared
        from din_dist.telemetry.prometheus import PrometheusMetrics

        self._config, self._signals, self._started = config, signals, started
        self._folder, self._flagfile = Path(config.job.output_dir), flagfile
        self._runtime, self._lock = runtime, lock
        with self._runtime.together():
            self._lock.hold(self._runtime.is_chief)
            self._prometheus_metrics = PrometheusMetrics(config, self._runtime)
        self._store = open_prepared(config.data)
        self._job = Assembly(
            config,
            self._runtime,
            self._store,
            prometheus_metrics=self._prometheus_metrics,
            signals=signals,
            num_threads=num_threads,
            open_parent=open_parent,
        )
        self._seconds = {"start": time.perf_counter() - started}

    @property
    def state(self) -> TrainingState:
        """The state of the training."""
        return self._job.trainer.state

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of this process by phase, and in total: once tested, as its summary has them."""
        return {"total": time.perf_counter() - self._started, **self._job.trainer.seconds, **self._seconds}

    def run(self) -> str | None:
        """Trains and tests until the job is done, however often workers come or go.

        Returns:
            The summary, on the chief.
        """
        from din_dist.distributed.elastic import run_elastic

        job = self._job
        patience = self._config.recovery.rejoin_timeout_seconds
        waiting = _Waiting(self._lock, self._folder, job.trainer, self._signals, patience)
        with job.telemetry.until_the_end(self):
            summary = run_elastic(self._runtime, self._run_with_these_workers, job.telemetry.say, waiting)
        self._runtime.barrier()
        self._runtime.shutdown()
        if summary:
            self._lock.release()
        return summary

    def _run_with_these_workers(self) -> str | None:
        """Trains and tests. `run_elastic` calls it again when the set of workers has changed."""
        job = self._job
        self._lock.hold(self._runtime.is_chief)
        with self._runtime.together():
            self._require_same_job()
        job.telemetry.show_flags(self._flagfile)
        job.trainer.train()
        test = job.trainer.test()
        floors = self._finish_test(has_results=bool(test))
        peak_memory = self._peak_memory_bytes()
        if not self._runtime.is_chief:
            return None
        return self._publish(self._summary(test, floors, peak_memory))

    def _require_same_job(self) -> None:
        """Refuses to resume with other settings or data, before anything of the job that is there is written over.

        The chief then keeps what the rows of tables stand for.
        """
        from din_dist.training.checkpoint import check_resumable
        from din_dist.training.warm_start import keep_rows

        if self._runtime.is_chief:
            check_resumable(self._config, self._store.facts.fingerprint)
            keep_rows(self._config, self._job.model, self._store)

    def _finish_test(self, *, has_results: bool) -> dict[str, Any]:
        """Computes the floors of the test split and writes the projector's files."""
        from din_dist.telemetry.projector import write_projector

        job, num_items = self._job, self._config.telemetry.projector_items
        floors_started = time.perf_counter()
        with job.telemetry.phase("test"):
            floors = job.evaluator.floors("test") if has_results else {}
            if job.shards and num_items:
                job.telemetry.say("TensorBoard's projector is left out: no worker holds the table of items")
            elif self._runtime.is_chief and num_items:
                with job.telemetry.dispensable():
                    write_projector(self._folder / "tensorboard", job.model.lookup, self._store, num_items)
        self._prometheus_metrics.enter_phase("done")
        self._seconds.update(job.trainer.seconds, floors=time.perf_counter() - floors_started)
        self._seconds["total"] = time.perf_counter() - self._started
        return floors

    def _peak_memory_bytes(self) -> int:
        """Returns the largest peak of all ranks, each of which must call it."""
        import numpy as np

        from din_dist.training.trainer import peak_memory_bytes

        return int(self._runtime.gather(np.array([peak_memory_bytes()])).max())

    def _summary(self, test: Mapping[str, float], floors: dict[str, Any], peak_memory: int) -> dict[str, Any]:
        """Returns what summary.json holds."""
        from din_dist.versions import build_info

        trainer = self._job.trainer
        return {
            **{f"test_{name}": value for name, value in test.items()},
            "test_floors": floors,
            **({"tasks": list(self._config.data.label_columns)} if self._config.data.label_columns else {}),
            f"best_validation_{trainer.validation_metric}": trainer.state.best_validation,
            "best_step": trainer.state.best_step or trainer.state.step,
            "examples_per_second": round(trainer.examples_per_second, 1) or None,
            "epochs": trainer.state.epoch,
            "steps": trainer.state.step,
            "epoch_records": trainer.state.epoch_records,
            **({"warm_start": trainer.state.parent} if trainer.state.parent else {}),
            "world_size": self._runtime.world_size,
            "global_batch_size": self._config.job.global_batch_size,
            "num_parameters": self._job.num_parameters,
            "peak_memory_bytes": peak_memory,
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
            "versions": build_info(),
            "metrics": self._prometheus_metrics.values(),
        }

    def _publish(self, summary: dict[str, Any]) -> str:
        """Shows the summary, writes it, and returns it as JSON."""
        from din_dist.text import to_json

        path, telemetry = self._folder / "summary.json", self._job.telemetry
        if not self._job.trainer.seconds["training"]:
            with progress.at(f"reading {path}"):
                summary = _with_what_was_measured(summary, self._folder)
        telemetry.say(_table(summary), summary=summary)
        text = to_json(summary)
        telemetry.show_summary(text)
        return text


class _Waiting:
    """The work of a worker of an elastic job while it waits for the others; see `distributed.elastic.Waiting`."""

    def __init__(
        self, lock: OutputDirLock, folder: Path, trainer: Trainer, signals: ReceivedSignals, patience_seconds: float
    ) -> None:
        self._lock, self._folder, self._trainer, self._signals = lock, folder, trainer, signals
        self.patience_seconds = patience_seconds

    def stop_requested(self) -> bool:
        return self._signals.stop

    def give_up(self, waited_seconds: float) -> None:
        reason = "on request" if self.stop_requested() else f"fewer than --min_workers for {waited_seconds:.0f} s"
        entry.leave_at_once(EXIT_GAVE_UP, f"{reason}; {self._save()}")

    def keep(self) -> str | None:
        # The lock of a chief that is lost is free, unless its host hangs.
        return self._save() if self._lock.hold_if_free() else None

    def _save(self) -> str:
        """Lets one worker save. It takes a lock of its own, because the chief may be the one that all wait for."""
        from din_dist.training.output_dir import claim_output_dir

        try:
            self._saving = claim_output_dir(self._folder, name=_SAVING_LOCK)  # to the end of this process
            self._trainer.save_alone()
        except InputError:
            return "another worker saves"
        except OSError as error:
            return f"the checkpoint could not be written: {error}"
        return f"step {self._trainer.state.step} is saved. The same command goes on from there"


def _with_what_was_measured(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the summary of a run that had nothing left to train, with the speed and times of the run that had."""
    try:
        before = parse_json(read_record(folder / "summary.json"))
    except (OSError, ValueError):
        return summary
    measured = ("examples_per_second", "world_size", "peak_memory_bytes", "seconds", "metrics")
    if not isinstance(before, dict) or before.get("steps") != summary["steps"] or not before.get("examples_per_second"):
        return summary
    found = {name: before[name] for name in measured if name in before}
    return {**summary, **found} if all(_is_like(value, summary[name]) for name, value in found.items()) else summary


def _is_like(value: Any, ours: Any) -> bool:
    """Tells whether a value that was read is of the kind that is written: a number, or numbers by name."""
    if isinstance(ours, dict):
        return isinstance(value, dict) and all(isinstance(part, (int, float)) for part in value.values())
    return isinstance(value, (int, float))


def _table(summary: dict[str, Any]) -> str:
    """Renders the end of a job for people: the model against its floors, and where the time went."""
    lines = []
    if "test_gauc" in summary:
        tasks = {f"this model: {task}": f"_{task}" for task in summary.get("tasks", ())} or {"this model": ""}
        rows = {
            **{
                name: {"gauc": summary[f"test_gauc{of}"], "auc": summary[f"test_auc{of}"]} for name, of in tasks.items()
            },
            **summary["test_floors"],
        }
        width = max(20, *map(len, rows))
        lines.append(f"  {'':<{width}} test GAUC      AUC")
        lines += [f"  {name:<{width}} {metrics['gauc']:9.4f} {metrics['auc']:8.4f}" for name, metrics in rows.items()]
    if summary["examples_per_second"]:
        lines.append(f"  {summary['examples_per_second']:,.0f} examples/s with {summary['world_size']} worker(s)")
    seconds = {name: value for name, value in summary["seconds"].items() if name != "total"}
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    lines.append(f"  {duration(summary['seconds']['total'])} in all: {parts}")
    return "\n".join(lines)
