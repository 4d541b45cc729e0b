"""Reports a running job to the terminal, metrics.jsonl, TensorBoard and Prometheus."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from din_dist import progress
from din_dist.background_writer import Writer
from din_dist.config import Config
from din_dist.distributed.runtime import Runtime
from din_dist.errors import Interrupted, Left
from din_dist.files import make_folder, sync, write_text
from din_dist.schema import METRICS_OF_TASKS, metric_of
from din_dist.telemetry.prometheus import PrometheusMetrics
from din_dist.telemetry.step_report import PARTS, StepReport
from din_dist.telemetry.tensorboard import PROFILED_STEPS, TensorBoard
from din_dist.telemetry.terminal import Terminal
from din_dist.text import to_json
from din_dist.tracking.run import run_of
from din_dist.tracking.tracked_job import TrackedJob, parameters_of
from din_dist.training_state import TrainingState

_MOST_RECORDS = 1000  # records that may wait for the disk; a job makes a few each second
PATIENCE_SECONDS = 10.0  # at the end, the time to wait for a disk that does not answer


class Reported(Protocol):
    """The part of a trainer or a job that is reported at the end: its state, and its seconds by phase."""

    @property
    def state(self) -> TrainingState: ...

    @property
    def seconds(self) -> dict[str, float]: ...


Histograms = Callable[[], Mapping[str, np.ndarray]]


class Reporter:
    """Reports a job. Each rank exports its own Prometheus metrics; only the chief prints and writes files.

    Args:
        runtime: the ranks.
        prometheus_metrics: this rank's metrics.
        num_steps: the number of updates at which the job ends.
    """

    def __init__(self, config: Config, runtime: Runtime, prometheus_metrics: PrometheusMetrics, num_steps: int) -> None:
        self._job, self._settings, self._runtime, self._num_steps = config.job, config.telemetry, runtime, num_steps
        self._parameters = parameters_of(config)
        self.prometheus_metrics = prometheus_metrics
        self._folder = Path(config.job.output_dir)
        self._since_log = _Interval()
        self._tasks = config.data.label_columns
        prometheus_metrics.steps_planned.set(num_steps)
        self._restarts: int | None = None
        self._lost_records = False
        self._writer, self._num_dropped = Writer("records", _MOST_RECORDS), 0
        self._profile_is_asked_for = False
        self._open()

    def say(self, text: str, *, level: str = "info", **fields: Any) -> None:
        """Logs one line, on the chief only."""
        self._terminal.say(text, level=level, **fields)

    def _open(self) -> None:
        """Opens the terminal and, on the chief, the files. After an elastic reset the chief may be another rank."""
        self._terminal = Terminal(self._settings.log_format, self._num_steps, silent=not self._runtime.is_chief)
        self._reports = self._runtime.is_chief
        if self._reports:
            with self._at_records():
                make_folder(self._folder)
                self._lines = (self._folder / "metrics.jsonl").open("a", encoding="utf-8")
            self._tensorboard = TensorBoard(self._folder / "tensorboard")
        self._tracked = self._open_tracked() if self._reports else None

    def _open_tracked(self) -> TrackedJob | None:
        """Opens the run of the job in its tracker; None without one."""
        run = run_of(self._settings, self._folder)
        if run is None:
            return None
        count = self.prometheus_metrics.tracker_failures.inc
        return TrackedJob(run, self._folder, lambda text: self.say(text, level="warning"), count)

    def _at_records(self) -> progress.at:
        return progress.at(f"writing records to {self._folder}")

    def _close(self) -> None:
        self._terminal.close()
        if self._reports:
            lines, tensorboard = self._lines, self._tensorboard
            self._later(lambda: sync(self._folder / "metrics.jsonl"))
            self._later(lines.close)
            self._later(tensorboard.close)
            if not self._writer.wait(PATIENCE_SECONDS):
                count = self._writer.num_waiting
                self.say(f"the last {count:,} records of the job are lost: their disk does not answer", level="warning")
        if self._tracked:  # after the records, because files of the job are given to it when they are written
            self._tracked.close(PATIENCE_SECONDS)

    def _later(self, write: Callable[[], object]) -> None:
        """Writes records in another thread, because training does not need them. The first failure is logged."""

        def attempt() -> None:
            with self._log_first_failure():
                write()

        if self._writer.offer(f"writing records to {self._folder}", attempt):
            return
        if not self._num_dropped:
            self.say("records of the job are dropped from now on: their disk does not answer", level="warning")
        self._num_dropped += 1

    @contextlib.contextmanager
    def dispensable(self) -> Iterator[None]:
        """Lets a block fail that writes files training does not need, on a full disk for example.

        The first failure is logged.
        """
        with self._log_first_failure(), self._at_records():
            yield

    @contextlib.contextmanager
    def _log_first_failure(self) -> Iterator[None]:
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            if not self._lost_records:
                self.say(f"records of the job are lost from now on: {error}", level="warning")
            self._lost_records = True

    def started(self, state: TrainingState) -> None:
        """Reports that training begins or resumes from `state` with the current ranks. All ranks must call it."""
        runtime = self._runtime
        first = self._restarts is None
        if self._reports != runtime.is_chief:
            self._close()
            self._open()
        with self._at_records():
            restarts = _num_starts(self._folder) if runtime.is_chief and first else self._restarts
        restarts = runtime.broadcast_object(restarts)
        if first:
            self.prometheus_metrics.restarts.inc(restarts)
        else:
            self.prometheus_metrics.elastic_resets.inc()
        self.prometheus_metrics.world_size.set(runtime.world_size)
        self.prometheus_metrics.rank.set(runtime.rank)
        self.prometheus_metrics.enter_phase("training")
        self.prometheus_metrics.show_position(state)
        self._since_log.pause()
        self._terminal.go_to(state.step)
        if first:
            self.record("start", state, {"world_size": runtime.world_size, "restarts": restarts})
        else:
            workers = f"{runtime.world_size} worker(s) from step {state.step} on"
            self.record("elastic", state, {"world_size": runtime.world_size, "event": workers})
            self.say(workers, world_size=runtime.world_size, step=state.step)
        self._restarts = restarts
        self._write_targets()

    def show_flags(self, flagfile: str) -> None:
        """Writes the job's settings to `flags.txt`, from which the job can be repeated, and to TensorBoard."""
        if self._reports:
            tensorboard = self._tensorboard
            self._later(lambda: write_text(self._folder / "flags.txt", flagfile))
            self._later(lambda: tensorboard.text("flags", 0, flagfile))
        if self._tracked:
            self._tracked.parameters(self._parameters)
            self._keep_in_tracker("flags.txt")

    def show_summary(self, text: str) -> None:
        """Writes the result of the job to `summary.json`."""
        with self.dispensable():
            write_text(self._folder / "summary.json", text + "\n")
        self._keep_in_tracker("summary.json")

    def _keep_in_tracker(self, name: str) -> None:
        """Gives the tracker a file of the job, once it is written."""
        tracked, path = self._tracked, self._folder / name
        if tracked:
            self._later(lambda: tracked.artefact(path))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Marks a block that is not training, and leaves its time out of the training rate."""
        self.prometheus_metrics.enter_phase(name)
        self._since_log.pause()
        try:
            yield
        finally:
            self.prometheus_metrics.enter_phase("training")

    def after_step(self, state: TrainingState, report: StepReport, histograms: Histograms) -> None:
        """Reports an update.

        Args:
            state: after the update.
            report: its measurements.
            histograms: returns the arrays whose histograms to write; called only when they are due.
        """
        self.prometheus_metrics.after_step(state, report)
        if not self._reports:
            return
        self._terminal.advance()
        self._since_log.add(report)
        if state.step % self._settings.log_every_steps == 0:
            found = {
                "epoch": state.epoch + 1,
                "examples": state.examples,
                **self._since_log.close(),
                "world_size": self._runtime.world_size,
            }
            self.record("train", state, found)
            rate = found["examples_per_second"]
            left = (self._num_steps - state.step) * self._job.global_batch_size / max(rate, 1e-9)
            self._terminal.show_progress(state.step, found["loss"], rate, left, found)
        if self._settings.histograms_every_steps and state.step % self._settings.histograms_every_steps == 0:
            step, tensorboard = state.step, self._tensorboard
            for name, values in histograms().items():
                self._later(lambda name=name, values=values: tensorboard.histogram(name, step, values))  # type: ignore[misc]
            self._since_log.pause()
        self._profile_if_asked(state.step)

    def refused_step(self, loss: float, gradient_norm: float) -> None:
        """Reports an update that was refused because the loss or the gradient norm is not finite."""
        self.prometheus_metrics.nonfinite_steps.inc()
        self.prometheus_metrics.loss.set(loss)
        self.prometheus_metrics.gradient_norm.set(gradient_norm)

    def after_epoch(self, state: TrainingState, record: dict[str, Any]) -> None:
        self.prometheus_metrics.epochs.inc()
        self.prometheus_metrics.show_position(state)
        self.record("epoch", state, record)
        self.say(f"epoch {record['epoch']}: {record['examples']:,} examples, loss {record['loss']:.4f}", **record)

    def after_evaluation(self, split: str, state: TrainingState, metrics: dict[str, Any], seconds: float) -> None:
        self.prometheus_metrics.after_evaluation(split, metrics)
        self.record(split, state, {**metrics, "seconds": seconds})
        words = []
        for task in self._tasks or [""]:
            gauc, auc, log_loss = (metrics[metric_of(name, task) if task else name] for name in METRICS_OF_TASKS)
            what = f"{split}, {task}" if task else split
            words.append(f"{what}: GAUC {gauc:.4f}, AUC {auc:.4f}, log loss {log_loss:.4f}")
        for number, line in enumerate(words):
            self.say(line, split=split, **({} if number else metrics))
        if math.isnan(metrics["gauc"]):
            self.say(
                f"{split}: GAUC is not defined, because none of {metrics['num_users_skipped']:,} users has examples of "
                "both labels here; AUC decides. --split=temporal keeps more examples of a user together."
            )

    def after_checkpoint(self, state: TrainingState, seconds: float, size: int) -> None:
        self.prometheus_metrics.after_checkpoint(seconds, size)
        self.record("checkpoint", state, {"seconds": seconds, "bytes": size})

    def checkpoint_failed(self, problem: str) -> None:
        """Reports a checkpoint that could not be written."""
        if self._runtime.is_chief:  # the chief publishes checkpoints
            self.prometheus_metrics.checkpoint_failures.inc()
            self.say(f"{problem} Training goes on without it.", level="warning")

    def record(self, kind: str, state: TrainingState, values: Mapping[str, Any]) -> None:
        """Writes a line to metrics.jsonl and the same numbers to TensorBoard."""
        if not self._reports:
            return
        if self._tracked:
            self._tracked.curves(kind, state.step, values)
        step, lines, tensorboard = state.step, self._lines, self._tensorboard
        line = to_json({"kind": kind, "time": time.time(), "step": step, **values})

        def write() -> None:
            lines.write(line + "\n")
            lines.flush()
            tensorboard.scalars(kind, step, values)
            if self._lost_records or self._num_dropped:
                dropped = f"; {self._num_dropped:,} were dropped" if self._num_dropped else ""
                self.say(f"records of the job are kept again{dropped}")
            self._lost_records, self._num_dropped = False, 0

        self._later(write)

    @contextlib.contextmanager
    def until_the_end(self, trainer: Reported) -> Iterator[None]:
        """Runs a whole job as a block; reports how it ended, and closes all files."""
        outcome = "failed"
        try:
            yield
            outcome = "done"
        except Left:
            outcome = "left"
            raise
        except Interrupted:
            outcome = "stopped"
            raise
        finally:
            if outcome != "left":
                self._end(trainer, outcome)
            self.close()

    def _end(self, trainer: Reported, outcome: str) -> None:
        self.prometheus_metrics.enter_phase(outcome)
        self.record("end", trainer.state, {"outcome": outcome, "seconds_by_phase": dict(trainer.seconds)})
        if tracked := self._tracked:
            self._later(lambda: tracked.end(outcome))  # after the files that wait for the disk
        if self._reports and self._settings.metrics_port >= 0 and outcome != "failed":
            # An empty list, so that Prometheus alerts about jobs that broke down, not about those that ended.
            self._later(lambda: write_text(self._folder / "targets.json", "[]"))
        if self._settings.pushgateway and (problem := self.prometheus_metrics.push()):
            self.say(problem, level="warning")

    def close(self) -> None:
        self._close()
        self.prometheus_metrics.close()

    def _profile_if_asked(self, step: int) -> None:
        if self._tensorboard.stop_profile_if_due(step):
            self.say(f"profile of {PROFILED_STEPS} updates: tensorboard --logdir {self._folder / 'tensorboard'}")
        asked = step + 1 == self._settings.profile_at_step or self._profile_is_asked_for
        if step % self._settings.log_every_steps == 0:
            self._later(self._look_for_request)
        self._profile_is_asked_for = False if asked else self._profile_is_asked_for
        if asked and (problem := self._tensorboard.start_profile(step)):
            self.say(f"no profile: {problem}", level="warning")

    def _look_for_request(self) -> None:
        request = self._folder / "profile"
        if request.exists():
            request.unlink(missing_ok=True)
            self._profile_is_asked_for = True

    def _write_targets(self) -> None:
        """Writes `targets.json`, from which Prometheus learns all ranks' addresses (file-based service discovery)."""
        if self._settings.metrics_port < 0:
            return
        address = np.zeros((1, 256), np.uint8)
        encoded = self.prometheus_metrics.address.encode()
        address[0, : len(encoded)] = list(encoded)
        addresses = [bytes(row[row > 0]).decode() for row in self._runtime.gather(address)]
        if self._runtime.is_chief:
            scheme = "https" if self._settings.metrics_tls_certificate else "http"
            labels = {"job": "din_dist", "run": self._job.output_dir, "__scheme__": scheme}
            targets = [
                {"targets": [address], "labels": {**labels, "rank": str(rank)}}
                for rank, address in enumerate(addresses)
            ]
            text = json.dumps(targets, indent=1)
            self._later(lambda: write_text(self._folder / "targets.json", text))
            self.say(
                f"metrics: {', '.join(f'{scheme}://{address}/metrics' for address in addresses)}", addresses=addresses
            )


def _num_starts(folder: Path) -> int:
    """Returns how often a job has begun or resumed in this folder."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as lines:
        return sum(line.startswith('{"kind": "start"') for line in lines)


class _Interval:
    """The updates since the last log line."""

    def __init__(self) -> None:
        self._last: float | None = None  # when the last update ended; None if something else ran since
        self._clear()

    def add(self, report: StepReport) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._seconds += now - self._last
            self._timed_examples += report.global_examples
        self._last = now
        self._reports.append(report)

    def pause(self) -> None:
        self._last = None

    def close(self) -> dict[str, float]:
        """Returns the examples per second, the mean loss and the mean times of an update, and starts a new interval."""
        reports = self._reports
        examples = sum(report.global_examples for report in reports)
        found = {
            "loss": sum(report.loss * report.global_examples for report in reports) / examples,
            "gradient_norm": reports[-1].gradient_norm,
            "learning_rate": reports[-1].learning_rate,
            "examples_per_second": self._timed_examples / self._seconds if self._seconds else 0.0,
            "step_seconds": sum(report.total_seconds for report in reports) / len(reports),
        }
        for part in PARTS:
            found[f"{part}_seconds"] = sum(report.seconds[part] for report in reports) / len(reports)
        self._clear()
        return found

    def _clear(self) -> None:
        self._seconds, self._timed_examples = 0.0, 0
        self._reports: list[StepReport] = []
