"""How our Horovod tells this machine's names from those of others."""

from __future__ import annotations

import socket
from typing import NoReturn

import pytest
from horovod.runner.util import network


def test_a_host_is_found_while_the_name_server_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(name: str) -> NoReturn:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "gethostbyname", lambda name: "127.0.0.1")
        assert network.resolve_host_address("own.test") == "127.0.0.1"
    monkeypatch.setattr(socket, "gethostbyname", away)
    assert network.resolve_host_address("own.test") == "127.0.0.1"
    assert network.filter_local_addresses(["own.test", "never.test"]) == ["never.test"]
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "203.0.113.7")
    assert network.resolve_host_address("own.test") == "203.0.113.7"


def test_localhost_needs_no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> NoReturn:
        raise socket.gaierror

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert network.filter_local_addresses(["localhost"]) == []
