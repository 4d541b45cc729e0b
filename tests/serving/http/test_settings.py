"""Settings that break a rule are told as every command does."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from din_dist.errors import InputError
from din_dist.serving.http.listener import listen
from din_dist.serving.http.settings import ServeConfig
from din_dist.serving.http.versions import find_export
from din_dist.serving.manifest import MANIFEST


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"export_dir": ""}, "--export_dir: must name an export. Received: ''."),
        ({"model_name": "a/b"}, "--model_name: must be of letters, digits, _, - and .. Received: 'a/b'."),
        ({"model_name": ""}, "--model_name: must be of letters"),
        ({"port": 65536}, "--port: must be a port, or 0. Received: 65536."),
        ({"port": -1}, "--port: must be a port, or 0. Received: -1."),
        ({"health_port": -2}, "--health_port: must be a port, 0 or -1. Received: -2."),
        ({"health_host": "127.0.0.1"}, "--health_host: is for --health_port. Received: '127.0.0.1'."),
        ({"expect_digest": "abc"}, "--expect_digest: must be the SHA-256 of a manifest, 64 hexadecimal digits. Rec"),
        ({"max_buffered_bytes": 1000}, "--max_buffered_bytes: must be at least --max_body_bytes"),
        ({"batch_timeout_ms": -1.0}, "--batch_timeout_ms: must be at least 0. Received: -1.0."),
        ({"max_body_bytes": 0}, "--max_body_bytes: must be at least 1. Received: 0. For example 1048576."),
        ({"max_queue_requests": -5}, "--max_queue_requests: must be at least 1. Received: -5. For example 256."),
        (
            {"request_timeout_seconds": 0.0},
            "--request_timeout_seconds: must be above 0. Received: 0.0. For example 10.",
        ),
        ({"max_queue_positions": 10}, "--max_queue_positions: must be at least --max_batch_positions"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        ServeConfig(**{"export_dir": "somewhere"} | settings)
    assert str(error.value).startswith(told)


def test_addresses_that_are_not_to_be_had() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"Received: 127.0.0.1 and {port}, Address already in use"):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match="Received: nowhere.invalid and 0, "):
        listen("nowhere.invalid", 0)


def test_the_newest_version_is_found(tmp_path: Path) -> None:
    """By number, not by name; what has no manifest is not yet an export."""
    for name in ("2", "10", "newest"):
        (tmp_path / name / MANIFEST).parent.mkdir(parents=True)
        (tmp_path / name / MANIFEST).touch()
    (tmp_path / "11").mkdir()
    assert find_export(str(tmp_path)) == (tmp_path / "10", 10)
    assert find_export(str(tmp_path / "2")) == (tmp_path / "2", 2)
    assert find_export(str(tmp_path / "newest")) == (tmp_path / "newest", None)
    assert find_export(str(tmp_path / "nowhere")) == (tmp_path / "nowhere", None)
