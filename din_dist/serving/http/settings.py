"""The server's settings, checked when they are built; `cli/serve.py` makes a flag of each."""

from __future__ import annotations

import dataclasses
import re

from din_dist.config import path_setting, require, require_numbers_that_fit, resolve_paths, setting
from din_dist.serving.manifest import DIGEST_HELP, check_digest


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What the server listens to, and how much it takes on. A position is a pair of a candidate and a history item."""

    export_dir: str = path_setting(
        "", "The export to serve, or a folder with a numbered folder for each version: then the one with the highest."
    )
    model_name: str = setting("din_dist", "What the model is called in URLs: /v1/models/NAME:predict.")
    host: str = setting("127.0.0.1", "Address to listen on. 0.0.0.0: every one of this machine; there is no password.")
    port: int = setting(8501, "Port to listen on. 0: a free one, see the line on stdout.")
    health_port: int = setting(
        -1,
        "A second port, for /healthz, /readyz and /metrics alone, which answers however busy the first one is. "
        "0: a free one, see stderr; -1: none.",
    )
    health_host: str = setting("", "Address for --health_port. Default: that of --host.")
    expect_digest: str = setting("", DIGEST_HELP)
    batch_timeout_ms: float = setting(
        0.0,
        "How long a request waits for others to be scored with, in milliseconds. Those that arrive while the model is "
        "busy are scored together in any case.",
    )
    max_batch_examples: int = setting(4096, "Most candidates to score in one call, unless one request has more.")
    max_batch_positions: int = setting(200_000, "Most positions to score in one call, and so of one request.")
    max_queue_requests: int = setting(256, "Requests that may wait; any more get 429 at once.")
    max_queue_positions: int = setting(1_000_000, "Positions that may wait in all; any more get 429 at once.")
    request_timeout_seconds: float = setting(10.0, "After so long in the queue or the model a request gets 503.")
    client_timeout_seconds: float = setting(
        30.0,
        "How long a client may take over a request, leave its answer unread or its connection idle, before it is hung "
        "up on.",
    )
    max_connections: int = setting(
        1000,
        "Connections that may be open; any more get 503 and are closed, unless others that keep the server waiting "
        "give way.",
    )
    max_buffered_bytes: int = setting(
        1 << 28, "Bytes of bodies that arrive and of answers that wait to be read, over all; any more get 503."
    )
    max_body_bytes: int = setting(1 << 20, "Largest body of a request, unpacked. Larger ones get 413.")
    max_instances: int = setting(1024, "Most instances in a request.")
    max_candidates: int = setting(10_000, "Most candidates in a request, over all its instances.")
    max_history_items: int = setting(
        10_000, "Longest history in a request. The model reads the newest of it, as many as it was trained with."
    )
    shutdown_timeout_seconds: float = setting(
        20.0, "After SIGTERM, SIGINT or SIGHUP, how long what was accepted may take before it is dropped."
    )

    def __post_init__(self) -> None:
        resolve_paths(self)
        require_numbers_that_fit(self)
        require(bool(self.export_dir), "must name an export", "export_dir", self.export_dir, "See cli.export.")
        require(
            re.fullmatch(r"[\w.-]+", self.model_name, re.ASCII) is not None,
            "must be of letters, digits, _, - and .",
            "model_name",
            self.model_name,
            "For example din_dist.",
        )
        require(0 <= self.port <= 65535, "must be a port, or 0", "port", self.port, "For example 8501.")
        require(
            -1 <= self.health_port <= 65535,
            "must be a port, 0 or -1",
            "health_port",
            self.health_port,
            "For example 8502.",
        )
        require(
            self.health_port >= 0 or not self.health_host,
            "is for --health_port",
            "health_host",
            self.health_host,
            "Give --health_port, too.",
        )
        check_digest(self.expect_digest)
        require(
            0 <= self.batch_timeout_ms <= 10_000,
            "must be from 0 to 10000",
            "batch_timeout_ms",
            self.batch_timeout_ms,
            "For example 2.",
        )
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name.startswith("max_"):
                require(value >= 1, "must be at least 1", name, value, f"For example {field.default}.")
            if name.endswith("_seconds"):
                require(value > 0, "must be above 0", name, value, f"For example {field.default:.0f}.")
        require(
            self.max_queue_positions >= self.max_batch_positions,
            "must be at least --max_batch_positions, for a request may have as many",
            "max_queue_positions",
            self.max_queue_positions,
            f"Give {self.max_batch_positions} or more.",
        )
        require(
            self.max_buffered_bytes >= self.max_body_bytes,
            "must be at least --max_body_bytes, for a request may have as many",
            "max_buffered_bytes",
            self.max_buffered_bytes,
            f"Give {self.max_body_bytes} or more.",
        )
