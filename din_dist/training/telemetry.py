"""What a job says of itself while it runs: the terminal, metrics.jsonl, TensorBoard and Prometheus."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import tensorflow as tf
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from tqdm import tqdm

from din_dist.config import JobConfig
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.training.output_dir import to_json, write_text_atomically
from din_dist.training.state import TrainingState

_STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Exporter:
    """One rank's Prometheus metrics, in a registry of its own, served at `/metrics`.

    Raises:
        InputError: the port is taken.
    """

    def __init__(self, job: JobConfig, runtime: Runtime) -> None:
        self.registry = registry = CollectorRegistry()
        self.examples = Counter("din_dist_examples", "Examples trained on by this rank.", registry=registry)
        self.step_seconds = Histogram(
            "din_dist_step_seconds", "One update, input wait excluded.", buckets=_STEP_BUCKETS, registry=registry
        )
        self.input_wait_seconds = Counter(
            "din_dist_input_wait_seconds", "Time spent waiting for the next batch.", registry=registry
        )
        self.loss = Gauge("din_dist_loss", "Mean loss of the last global batch, in nats.", registry=registry)
        self.epoch = Gauge("din_dist_epoch", "Epochs completed.", registry=registry)
        self.world_size = Gauge("din_dist_world_size", "Ranks in the job.", registry=registry)
        self.world_size.set(runtime.world_size)
        port = job.metrics_port + runtime.local_rank if job.metrics_port else 0
        try:
            self._server, self._thread = start_http_server(port, job.metrics_host, registry)
        except OSError as error:
            raise InputError(
                f"--metrics_port: each rank of a machine needs a free port on {job.metrics_host}. Received: {port}, "
                f"{error.strerror or error}. Choose another, or 0 for any free one."
            ) from error
        host = socket.gethostname() if job.metrics_host in ("0.0.0.0", "::") else job.metrics_host
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Telemetry:
    """Reports a job. Every rank exports its own metrics; only the chief prints and writes files."""

    def __init__(self, job: JobConfig, runtime: Runtime, exporter: Exporter | None, num_steps: int) -> None:
        self._job, self._runtime, self._exporter = job, runtime, exporter
        self._folder = Path(job.output_dir)
        self._bar: tqdm | None = None
        self._files: Any = None
        self._since_log = _Interval()
        if runtime.is_chief:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lines = (self._folder / "metrics.jsonl").open("a")
            self._summaries = tf.summary.create_file_writer(str(self._folder / "tensorboard"))
            terminal = _terminal()
            if terminal:
                self._bar = tqdm(total=num_steps, unit="step", file=terminal, dynamic_ncols=True, smoothing=0.05)
        self._write_targets()

    def say(self, text: str) -> None:
        """One line for people."""
        if not self._runtime.is_chief:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._bar.fp)
        else:
            print(text, file=sys.stderr, flush=True)

    def resumed(self, state: TrainingState) -> None:
        if self._bar is not None:
            self._bar.n = state.step
        self._show_epoch(state)

    def after_step(
        self, state: TrainingState, loss: float, rank_examples: int, global_examples: int, seconds: float, waited: float
    ) -> None:
        if self._exporter:
            self._exporter.examples.inc(rank_examples)
            self._exporter.step_seconds.observe(seconds)
            self._exporter.input_wait_seconds.inc(waited)
            self._exporter.loss.set(loss)
        if not self._runtime.is_chief:
            return
        if self._bar is not None:
            self._bar.update()
        self._since_log.add(global_examples, loss)
        if state.step % self._job.log_every_steps == 0:
            rate, mean_loss = self._since_log.close()
            self.record("train", state, {"loss": mean_loss, "examples_per_second": rate})
            if self._bar is not None:
                self._bar.set_postfix_str(f"loss {mean_loss:.4f}, {rate:,.0f} examples/s")
            else:
                self.say(f"step {state.step}: loss {mean_loss:.4f}, {rate:,.0f} examples/s")

    def pause(self) -> None:
        """What follows is no training: keep it out of the rate."""
        self._since_log.pause()

    def after_epoch(self, state: TrainingState, record: dict[str, Any]) -> None:
        self._show_epoch(state)
        self.record("epoch", state, record)
        self.say(f"epoch {record['epoch']}: {record['examples']:,} examples, loss {record['loss']:.4f}")

    def after_evaluation(self, split: str, state: TrainingState, metrics: dict[str, float]) -> None:
        self.record(split, state, metrics)
        self.say(f"{split}: GAUC {metrics['gauc']:.4f}, AUC {metrics['auc']:.4f}, log loss {metrics['log_loss']:.4f}")
        if math.isnan(metrics["gauc"]):
            self.say(
                f"{split}: GAUC is not defined, since none of {metrics['num_users_skipped']:,} users has examples of "
                "both labels here; AUC decides. --split=temporal keeps more examples of a user together."
            )

    def record(self, kind: str, state: TrainingState, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and points in TensorBoard."""
        if not self._runtime.is_chief:
            return
        line = {"kind": kind, "time": time.time(), "step": state.step, **values}
        self._lines.write(to_json(line) + "\n")
        self._lines.flush()
        with self._summaries.as_default():
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    tf.summary.scalar(f"{kind}/{name}", float(value), step=state.step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._exporter:
            self._exporter.close()
        if self._runtime.is_chief:
            self._lines.close()
            self._summaries.close()

    def _show_epoch(self, state: TrainingState) -> None:
        if self._exporter:
            self._exporter.epoch.set(state.epoch)

    def _write_targets(self) -> None:
        """`targets.json`, by which Prometheus finds every rank (its file-based service discovery)."""
        if self._job.metrics_port < 0:
            return
        address = np.zeros((1, 256), np.uint8)
        encoded = (self._exporter.address if self._exporter else "").encode()
        address[0, : len(encoded)] = list(encoded)
        addresses = [bytes(row[row > 0]).decode() for row in self._runtime.gather(address)]
        if self._runtime.is_chief:
            targets = [
                {"targets": [address], "labels": {"job": "din_dist", "rank": str(rank)}}
                for rank, address in enumerate(addresses)
            ]
            write_text_atomically(self._folder / "targets.json", json.dumps(targets, indent=1))
            self.say(f"metrics: {', '.join(f'http://{address}/metrics' for address in addresses)}")


class _Interval:
    """Examples, loss and seconds since the last log line."""

    def __init__(self) -> None:
        self._last: float | None = None  # when the last update ended, unless something else came between
        self._seconds = self._loss = 0.0
        self._examples = self._timed_examples = 0

    def add(self, examples: int, loss: float) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._seconds += now - self._last
            self._timed_examples += examples
        self._last = now
        self._examples += examples
        self._loss += loss * examples

    def pause(self) -> None:
        self._last = None

    def close(self) -> tuple[float, float]:
        """Examples per second and mean loss; counting starts afresh."""
        rate = self._timed_examples / self._seconds if self._seconds else 0.0
        mean_loss = self._loss / max(self._examples, 1)
        self._seconds = self._loss = 0.0
        self._examples = self._timed_examples = 0
        return rate, mean_loss


def _terminal() -> TextIO | None:
    """Where a progress bar may move: stderr, or the launcher's own terminal behind horovodrun's pipes."""
    if sys.stderr.isatty():
        return sys.stderr
    path = os.environ.get("DIN_DIST_PROGRESS_TTY")
    try:
        return Path(path).open("w") if path else None
    except OSError:  # the chief runs on another machine than the launcher
        return None
