"""The server's settings, checked when they are built; `cli/serve.py` makes a flag of each."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

from din_dist.config.settings import Settings, port_setting, require, setting, source_setting, text_setting
from din_dist.serving.manifest import DIGEST_HELP, check_digest

_ADDRESSES, _BATCHING, _LIMITS, _TIMEOUTS = "addresses", "batching and queue", "limits of a request", "timeouts"
_CONNECTIONS = "connections"


def _check_export_dir(name: str, value: str) -> None:
    require(bool(value), "must name an export", name, value, "See cli.export.")


def _check_model_name(name: str, value: str) -> None:
    is_valid = re.fullmatch(r"[\w.-]+", value, re.ASCII) is not None
    require(is_valid, "must be of letters, digits, _, - and .", name, value, "For example din_dist.")


@dataclasses.dataclass(frozen=True)
class ServeConfig(Settings):
    """The server's addresses and limits. A position is a pair of a candidate and a history item."""

    THEME: ClassVar[str] = "model"

    export_dir: str = source_setting(
        "",
        "The export to serve, or a folder with a numbered folder for each version. The highest version is then served, "
        "also one that comes later: see --reload_interval_seconds. From a store (s3://, gs://, abfs://, hdfs://) it is "
        "copied to the user's cache folder first.",
        check=_check_export_dir,
    )
    reload_interval_seconds: float = setting(
        1.0,
        "How often to look for another version in --export_dir. It is opened beside the one that is served, and takes "
        "its place between two requests. 0: never.",
        at_least=0,
        at_most=86_400,
    )
    model_name: str = text_setting(
        "din_dist", "Name of the model in URLs: /v1/models/NAME:predict.", check=_check_model_name
    )
    host: str = text_setting(
        "127.0.0.1",
        "Address to listen on. 0.0.0.0: every address of this machine; there is no password.",
        theme=_ADDRESSES,
    )
    port: int = port_setting(8501, "Port to listen on. 0: a free one, printed on stdout.", theme=_ADDRESSES)
    health_port: int = port_setting(
        -1,
        "A second port, only for /healthz, /readyz and /metrics. It answers however busy the first one is. 0: a free "
        "one, printed on stderr. -1: none.",
        lowest=-1,
        theme=_ADDRESSES,
    )
    health_host: str = text_setting("", "Address for --health_port. Default: that of --host.", theme=_ADDRESSES)
    expect_digest: str = text_setting("", DIGEST_HELP, check=lambda _, value: check_digest(value))
    batch_timeout_ms: float = setting(
        0.0,
        "How long a request waits for others to be scored with, in milliseconds. Requests that arrive while the model "
        "is busy are scored together in any case.",
        at_least=0,
        at_most=10_000,
        theme=_BATCHING,
    )
    max_batch_examples: int = setting(
        4096, "Most candidates to score in one call, unless one request has more.", at_least=1, theme=_BATCHING
    )
    max_batch_positions: int = setting(
        200_000, "Most positions to score in one call, and so in one request.", at_least=1, theme=_BATCHING
    )
    max_queue_requests: int = setting(
        256, "Most requests that may wait; any more get 429 at once.", at_least=1, theme=_BATCHING
    )
    max_queue_positions: int = setting(
        1_000_000, "Most positions that may wait in all; any more get 429 at once.", at_least=1, theme=_BATCHING
    )
    request_timeout_seconds: float = setting(
        10.0, "How long a request may be in the queue and the model before it gets 503.", above=0, theme=_TIMEOUTS
    )
    client_timeout_seconds: float = setting(
        30.0,
        "How long a client may take over a request, leave its answer unread or its connection idle. The server then "
        "closes the connection.",
        above=0,
        theme=_TIMEOUTS,
    )
    max_connections: int = setting(
        1000,
        "Most open connections. Any more get 503 and are closed, unless others that keep the server waiting give way.",
        at_least=1,
        theme=_CONNECTIONS,
    )
    max_buffered_bytes: int = setting(
        1 << 28,
        "Most bytes, over all connections, of bodies that arrive and of answers that wait to be read; any more get "
        "503.",
        at_least=1,
        theme=_CONNECTIONS,
    )
    max_body_bytes: int = setting(
        1 << 20, "Largest body of a request, decompressed. Larger ones get 413.", at_least=1, theme=_LIMITS
    )
    max_instances: int = setting(1024, "Most instances in a request.", at_least=1, theme=_LIMITS)
    max_candidates: int = setting(
        10_000, "Most candidates in a request, over all its instances.", at_least=1, theme=_LIMITS
    )
    max_history_items: int = setting(
        10_000,
        "Longest history in a request. The model reads the newest items of it, as many as it was trained with.",
        at_least=1,
        theme=_LIMITS,
    )
    shutdown_timeout_seconds: float = setting(
        20.0,
        "How long accepted requests may take after SIGTERM, SIGINT or SIGHUP before they are dropped.",
        above=0,
        theme=_TIMEOUTS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.health_port >= 0 or not self.health_host,
            "is for --health_port",
            "health_host",
            self.health_host,
            "Give --health_port, too.",
        )
        require(
            self.max_queue_positions >= self.max_batch_positions,
            "must be at least --max_batch_positions, because a request may have as many",
            "max_queue_positions",
            self.max_queue_positions,
            f"Give {self.max_batch_positions} or more.",
        )
        require(
            self.max_buffered_bytes >= self.max_body_bytes,
            "must be at least --max_body_bytes, because a request may have as many",
            "max_buffered_bytes",
            self.max_buffered_bytes,
            f"Give {self.max_body_bytes} or more.",
        )
