"""The server's Prometheus metrics, in a registry of their own."""

from __future__ import annotations

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, Info, ProcessCollector

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_POSITIONS = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000)


class ServingMetrics:
    """The server's metrics, whose names begin with `din_dist_serving_`.

    Args:
        build: labels with versions.
    """

    def __init__(self, build: Mapping[str, str]) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"din_dist_serving_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"din_dist_serving_{name}", text, labels, buckets=buckets, registry=registry)

        self._requests = Counter(
            "din_dist_serving_requests",
            "Requests answered, by HTTP status; 499: the client had left. Signature none: it was refused before.",
            ("signature", "code"),
            registry=registry,
        )
        self._request_seconds = histogram(
            "request_seconds", "From a request's headers to its answer.", _SECONDS, "signature"
        )
        self._instances = Counter(
            "din_dist_serving_instances", "Instances of the requests answered well.", ("signature",), registry=registry
        )
        self._batch_requests = histogram("batch_requests", "Requests scored in one call.", _COUNTS)
        self._batch_examples = histogram("batch_examples", "Candidates scored in one call.", _COUNTS)
        self._batch_positions = histogram("batch_positions", "Pairs of candidate and history item in one.", _POSITIONS)
        self._batch_seconds = histogram("batch_seconds", "One call of the model.", _SECONDS)
        self.queue_requests = gauge("queue_requests", "Requests that wait for the model.")
        self.queue_positions = gauge("queue_positions", "Their pairs of candidate and history item.")
        self.in_progress = gauge("in_progress", "Requests not yet answered.")
        self.connections = gauge("connections", "Open connections, without those of --health_port.")
        self.buffered_bytes = gauge("buffered_bytes", "Bodies that arrive and answers that are not yet read.")
        self.connections_refused = Counter(
            "din_dist_serving_connections_refused", "Connections above --max_connections.", registry=registry
        )
        self.connections_dropped = Counter(
            "din_dist_serving_connections_dropped",
            "Connections closed by the server. Unread: the client left its answer unread; room: it kept the server "
            "waiting while another client had no connection.",
            ("reason",),
            registry=registry,
        )
        for reason in ("unread", "room"):
            self.connections_dropped.labels(reason)
        self.ready = gauge("ready", "1 while requests are accepted; 0 while the server ends.")
        gauge("start_timestamp_seconds", "When this process began.").set(time.time())
        self.reloads = Counter(
            "din_dist_serving_reloads",
            "Versions that came while another was served. Refused: they could not be opened.",
            ("result",),
            registry=registry,
        )
        for result in ("served", "refused"):
            self.reloads.labels(result)
        self._version = gauge("version", "The version that is served.")
        self._model = Info("din_dist_serving_model", "What is served.", registry=registry)
        Info("din_dist_build", "Versions.", registry=registry).info(dict(build))
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)

    def show_model(self, name: str, version: int, digest: str) -> None:
        """Shows what is served from now on."""
        self._version.set(version)
        self._model.info({"name": name, "version": str(version), "digest": digest})

    def after_request(self, signature: str, code: int, seconds: float, num_instances: int) -> None:
        self._requests.labels(signature, str(code)).inc()
        self._request_seconds.labels(signature).observe(seconds)
        if code == 200:
            self._instances.labels(signature).inc(num_instances)

    def after_batch(self, *, seconds: float, num_requests: int, num_candidates: int, num_positions: int) -> None:
        self._batch_seconds.observe(seconds)
        self._batch_requests.observe(num_requests)
        self._batch_examples.observe(num_candidates)
        self._batch_positions.observe(num_positions)
