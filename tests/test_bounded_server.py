"""The server of metrics and of Horovod's store, beset by clients that only hold on."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from din_dist.bounded_server import BoundedServer


class Handler(BaseHTTPRequestHandler):
    timeout = 60

    def do_GET(self) -> None:
        body = b"x" * (1 << 24 if self.path == "/much" else 2)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(BoundedServer):
    most_connections = 8
    patience_seconds = 2.0


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(server.server_address, timeout=20)


def files_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def get(server: Server, path: bytes = b"/") -> bytes:
    with connect(server) as link:
        link.sendall(b"GET %s HTTP/1.0\r\n\r\n" % path)
        answer = b""
        while piece := link.recv(1 << 20):
            answer += piece
    return answer


def test_who_asks_gets_an_answer_while_others_hold_all_places(server: Server) -> None:
    before = threading.active_count()
    strangers = [connect(server) for _ in range(100)]
    assert get(server).endswith(b"\r\n\r\nxx")
    assert threading.active_count() - before <= Server.most_connections + 1
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.0\r\n"], ids=["silent", "a header now and then"])
def test_nobody_keeps_a_place_for_long(server: Server, first: bytes) -> None:
    with connect(server) as link:
        link.sendall(first)
        started = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - started < 20:
                if first:
                    link.sendall(b"A: b\r\n")
                    time.sleep(0.2)
                elif not link.recv(1):
                    raise ConnectionError
        assert 1 < time.monotonic() - started < 15


def test_who_does_not_take_the_answer_keeps_no_place(server: Server) -> None:
    files = files_open()
    links = [connect(server) for _ in range(4)]
    for link in links:
        link.sendall(b"GET /much HTTP/1.0\r\n\r\n")
    deadline = time.monotonic() + 20
    while files_open() > files + len(links):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for link in links:
        link.close()


def test_it_asks_no_name_server_for_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be away, and is waited for."""

    def away(*_: object) -> str:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(socket, "getfqdn", away)
    Server(("127.0.0.1", 0), Handler).server_close()
