"""One rank's Prometheus metrics."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow as tf
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
    push_to_gateway,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import basic_auth_handler, default_handler
from prometheus_client.registry import Collector

from din_dist.config import Config
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.files import read_text
from din_dist.schema import METRICS_OF_TASKS, metric_of
from din_dist.telemetry.metrics_server import MetricsServer
from din_dist.telemetry.step_report import StepReport
from din_dist.training_state import TrainingState
from din_dist.versions import build_info

PHASES = ("starting", "training", "validation", "checkpoint", "test", "done", "stopped", "failed")
_STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_CHECKPOINT_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_PUSH_SECONDS = 10.0


class PrometheusMetrics:
    """Metrics in a registry of their own, served at `/metrics` unless `--metrics_port` is -1.

    Raises:
        InputError: the port is taken, or the files for TLS or authentication are of no use.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        settings = config.telemetry
        self._settings, self._output_dir, self._rank = settings, config.job.output_dir, runtime.rank
        self._login = _login(settings.pushgateway_password_file) if settings.pushgateway_password_file else None
        self.registry = CollectorRegistry()
        self._define(config)
        self.world_size.set(runtime.world_size)
        self.rank.set(runtime.rank)
        self.enter_phase("starting")
        self._server = None
        self.address = ""  # host and port at which a Prometheus on another machine reaches the metrics
        if settings.metrics_port >= 0:
            self._server = MetricsServer(
                settings, self.registry, settings.metrics_port + runtime.local_rank if settings.metrics_port else 0
            )
            host = socket.gethostname() if settings.metrics_host in ("0.0.0.0", "::") else settings.metrics_host
            self.address = f"[{host}]:{self._server.port}" if ":" in host else f"{host}:{self._server.port}"

    def _define(self, config: Config) -> None:
        self._define_training()
        self._define_tasks(config.data.label_columns)
        self._define_job(config)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(_OutputFolder(config.job.output_dir))
        if tf.config.list_physical_devices("GPU"):
            self.registry.register(_GpuMemory())

    def _define_training(self) -> None:
        """Defines what is counted in each update and at each evaluation."""
        self.examples = self._counter("examples", "Examples trained on by this rank.")
        self.positions = self._counter("positions", "Positions of behaviour histories trained on by this rank.")
        self.steps = self._counter("steps", "Updates made by this process.")
        self.epochs = self._counter("epochs", "Epochs completed by this process.")
        self.step = self._gauge("step", "Updates of the whole job so far.")
        self.steps_planned = self._gauge("steps_planned", "Updates at which the job ends.")
        self.epoch = self._gauge("epoch", "Epochs completed by the whole job.")
        self.step_seconds = self._histogram("step_seconds", "One update with its wait for input.", _STEP_BUCKETS)
        self.step_part_seconds = self._counter(
            "step_part_seconds",
            "Where that time went: input_wait, compute (forward and backward, batch statistics' messages included), "
            "exchange (of gradients, beyond what ran beside compute), update.",
            "part",
        )
        self.loss = self._gauge("loss", "Mean loss of the last global batch, in nats.")
        self.gradient_norm = self._gauge("gradient_norm", "Global norm of the last gradient, before clipping.")
        self.learning_rate = self._gauge("learning_rate", "Learning rate of the last update.")
        self.nonfinite_steps = self._counter(
            "nonfinite_steps", "Updates refused because loss or gradient was not a finite number."
        )
        self.unknown_ids_ratio = self._gauge(
            "unknown_ids_ratio", "Share of the last batch's candidates and positions without a known id.", "table"
        )
        self.padding_ratio = self._gauge(
            "padding_ratio", "Share of the positions of the last update that were padding."
        )
        self.exchanged_bytes = self._counter(
            "exchanged_bytes", "Bytes that this rank handed to the exchange between workers.", "kind"
        )
        self.unique_rows = self._gauge("unique_rows", "Rows of a table that the last update changed.", "table")
        self.evaluated = {
            "gauc": self._gauge("gauc", "Per-user AUC averaged by impressions, at the last evaluation.", "split"),
            "auc": self._gauge("auc", "AUC at the last evaluation.", "split"),
            "log_loss": self._gauge("log_loss", "Mean log loss at the last evaluation, in nats.", "split"),
        }

    def _define_tasks(self, tasks: Sequence[str]) -> None:
        """Defines what is measured of each label, if several are predicted."""
        self._tasks = tasks
        if tasks:
            help_text = "The metric of the same name, of each of --label_columns."
            names = {name: f"task_{name}" for name in METRICS_OF_TASKS}
            self.evaluated_tasks = {name: self._gauge(own, help_text, "split", "task") for name, own in names.items()}

    def _define_job(self, config: Config) -> None:
        """Defines the size, the checkpoints and the state of the job."""
        self.global_batch_size = self._gauge("global_batch_size", "Examples per update over all ranks.")
        self.global_batch_size.set(config.job.global_batch_size)
        self.world_size = self._gauge("world_size", "Ranks in the job.")
        self.rank = self._gauge("rank", "Number of this process among all ranks.")
        self.elastic_resets = self._counter(
            "elastic_resets", "Times the set of workers changed while this process lived."
        )
        self.restarts = self._counter("restarts", "Times the job was started again in this output directory.")
        if config.telemetry.baseline_examples_per_second:
            self._gauge(
                "baseline_examples_per_second", "What one worker alone does, by --baseline_examples_per_second."
            ).set(config.telemetry.baseline_examples_per_second)
        self.checkpoint_seconds = self._histogram(
            "checkpoint_seconds", "Time to write and publish a checkpoint.", _CHECKPOINT_BUCKETS
        )
        self.checkpoint_bytes = self._gauge("checkpoint_bytes", "Size of the last checkpoint.")
        self.checkpoint_time = self._gauge(
            "checkpoint_last_success_timestamp_seconds", "When the last checkpoint was published; 0 before the first."
        )
        self.tracker_failures = self._counter("tracker_failures", "Calls of --tracker that failed or were dropped.")
        self.checkpoint_failures = self._counter("checkpoint_failures", "Checkpoints that could not be written.")
        self._gauge("start_timestamp_seconds", "When this process began.").set(time.time())
        self.last_step_time = self._gauge(
            "last_step_timestamp_seconds", "When the last update ended; 0 before the first."
        )
        self.phase = self._gauge("phase", f"1 for what the job is doing now, of {', '.join(PHASES)}; else 0.", "phase")
        Info("din_dist_build", "Versions.", registry=self.registry).info(build_info())

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"din_dist_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"din_dist_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"din_dist_{name}", text, buckets=buckets, registry=self.registry)

    def enter_phase(self, current: str) -> None:
        """Shows `current`, one of `PHASES`, as what the job is doing."""
        for phase in PHASES:
            self.phase.labels(phase).set(phase == current)

    def show_position(self, state: TrainingState) -> None:
        """Shows the step and the epoch of `state`."""
        self.step.set(state.step)
        self.epoch.set(state.epoch)

    def after_step(self, state: TrainingState, report: StepReport) -> None:
        self.examples.inc(report.examples)
        self.positions.inc(report.positions)
        self.steps.inc()
        self.step.set(state.step)
        self.step_seconds.observe(report.total_seconds)
        for part, seconds in report.seconds.items():
            self.step_part_seconds.labels(part).inc(seconds)
        self.loss.set(report.loss)
        self.gradient_norm.set(report.gradient_norm)
        self.learning_rate.set(report.learning_rate)
        self.padding_ratio.set(report.padding_ratio)
        for kind, size in report.exchanged_bytes.items():
            self.exchanged_bytes.labels(kind).inc(size)
        for table, rows in report.unique_rows.items():
            self.unique_rows.labels(table).set(rows)
        for table, share in report.unknown_ids_ratio.items():
            self.unknown_ids_ratio.labels(table).set(share)
        self.last_step_time.set_to_current_time()

    def after_evaluation(self, split: str, metrics: Mapping[str, float]) -> None:
        for name, gauge in self.evaluated.items():
            gauge.labels(split).set(metrics[name])
            for task in self._tasks:
                self.evaluated_tasks[name].labels(split, task).set(metrics[metric_of(name, task)])

    def after_checkpoint(self, seconds: float, size: int) -> None:
        self.checkpoint_seconds.observe(seconds)
        self.checkpoint_bytes.set(size)
        self.checkpoint_time.set_to_current_time()

    def values(self) -> dict[str, float]:
        """Returns our own metrics as a scrape would find them now, without buckets of histograms."""
        return {
            sample.name + "".join(f"{{{name}={value}}}" for name, value in sample.labels.items()): sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name.startswith("din_dist_") and not sample.name.endswith(("_bucket", "_created", "_info"))
        }

    def push(self) -> str | None:
        """Pushes the metrics to `--pushgateway`, for jobs that end before a scrape. Returns the problem, if any."""
        try:
            push_to_gateway(
                self._settings.pushgateway,
                "din_dist",
                self.registry,
                grouping_key={"run": self._output_dir, "rank": str(self._rank)},
                timeout=_PUSH_SECONDS,
                handler=self._authenticated if self._login else default_handler,
            )
        except (OSError, ValueError) as error:
            return f"--pushgateway: {self._settings.pushgateway} did not take the metrics: {error}"
        return None

    def _authenticated(
        self, url: str, method: str, timeout: float | None, headers: list[tuple[str, str]], data: bytes
    ) -> Callable[[], None]:
        assert self._login
        return basic_auth_handler(url, method, timeout, headers, data, *self._login)

    def close(self) -> None:
        if self._server:
            self._server.close()
            self._server = None


def _login(path: str) -> tuple[str, str]:
    """Returns the user and the password for a Pushgateway."""
    try:
        user, found, password = read_text(Path(path)).strip().partition(":")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--pushgateway_password_file: must be a file that can be read. Received: {path}, "
            f"{getattr(error, 'strerror', None) or 'which is no text'}. Correct the path."
        ) from error
    if not (user and found) or "\n" in password:
        raise InputError(
            f"--pushgateway_password_file: must have one line user:password. Received: {path}, with another content. "
            "Correct the file."
        )
    return user, password


class _OutputFolder(Collector):
    """Free and total space of the checkpoints' file system, read at each scrape."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # otherwise the registry collects at once to find the names, but the folder does not exist yet

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            usage = shutil.disk_usage(self._folder)
        except OSError:
            return
        yield GaugeMetricFamily(
            "din_dist_output_free_bytes", "Free space where --output_dir is.", value=float(usage.free)
        )
        yield GaugeMetricFamily(
            "din_dist_output_size_bytes", "All space where --output_dir is.", value=float(usage.total)
        )


class _GpuMemory(Collector):
    """The memory that TensorFlow holds on this process's GPU, read at each scrape."""

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily("din_dist_gpu_memory_bytes", "GPU memory held by TensorFlow.", labels=["kind"])
        for kind, size in tf.config.experimental.get_memory_info("GPU:0").items():
            family.add_metric([kind], float(size))
        yield family
