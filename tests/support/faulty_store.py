"""An S3 server on loopback, and a proxy before it that breaks connections in chosen ways."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from tests.support.patience import PATIENCE
from tests.support.programs import imported

BUCKET = "logs"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_PIECE = 1 << 16


class Fault(enum.Enum):
    NONE = "none"
    BUSY = "503 instead of an answer"
    CUT = "the connection ends in the middle of an answer"
    SILENT = "no answer, and the connection stays open"
    DENIED = "403 instead of an answer"
    LOST = "the connection ends before the server has the request"


_ANSWERS = {Fault.BUSY: ("503 Slow Down", "SlowDown"), Fault.DENIED: ("403 Forbidden", "AccessDenied")}


@dataclasses.dataclass
class Proxy:
    """Passes connections on to a server on loopback, and injects faults into requests and answers.

    Attributes:
        fault: what goes wrong now.
        times: how many answers it still happens to; -1 for all.
        only: the pattern of a request's first line that it happens to.
        requests: the first line of each request.
    """

    server: int
    fault: Fault = Fault.NONE
    times: int = -1
    only: str = ""
    requests: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for opened in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
            opened.close()

    def fail(self, fault: Fault, times: int = -1, only: str = "") -> None:
        """Injects a fault from now on."""
        self.fault, self.times, self.only = fault, times, only

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Answers the requests of one connection, each by a new connection to the server."""
        with contextlib.suppress(OSError, ValueError), client:
            while head := _read_head(client):
                line = head.partition(b"\r\n")[0].decode()
                body = _read_body(client, head)
                self.requests.append(line)
                fault = self._fault_of(line)
                if fault is Fault.SILENT:
                    client.recv(1)  # until the client gives up
                    return
                if fault is Fault.LOST:
                    return
                if fault in _ANSWERS:
                    client.sendall(_refusal(*_ANSWERS[fault], has_body=not line.startswith("HEAD")))
                    continue
                with socket.create_connection(("127.0.0.1", self.server)) as server:
                    server.sendall(_closing(head) + body)
                    if not _pass_on(server, client, cut=fault is Fault.CUT):
                        return

    def _fault_of(self, line: str) -> Fault:
        with self._lock:
            if self.fault is Fault.NONE or not self.times or not re.search(self.only, line):
                return Fault.NONE
            self.times -= 1
            return self.fault


def _read_head(client: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        if not (piece := client.recv(1)):
            return b""
        head += piece
    return head


def _read_body(client: socket.socket, head: bytes) -> bytes:
    if b"expect: 100-continue" in head.lower():
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if not re.search(rb"\r\ntransfer-encoding: *chunked", head, re.IGNORECASE):
        return _received(client, _length(head))
    body = b""
    while size := _line(client):
        piece = _received(client, int(size, 16) + 2 if int(size, 16) else 0)  # with an end of line
        body += size + b"\r\n" + piece
        if not piece:  # trailers come, and an empty line
            while trailer := _line(client):
                body += trailer + b"\r\n"
            return body + b"\r\n"
    return body


def _received(client: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        if not (piece := client.recv(min(_PIECE, size - len(found)))):
            raise ConnectionError("the client has gone")
        found += piece
    return bytes(found)


def _line(client: socket.socket) -> bytes:
    """Returns what comes before the next end of line."""
    found = b""
    while not found.endswith(b"\r\n"):
        found += _received(client, 1)
    return found[:-2]


def _length(head: bytes) -> int:
    found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return int(found[1]) if found else 0


def _closing(head: bytes) -> bytes:
    """Returns the head of a request after which the server closes the connection."""
    lines = [line for line in head.split(b"\r\n") if not re.match(rb"(connection|expect):", line, re.IGNORECASE)]
    return b"\r\n".join([lines[0], b"Connection: close", *lines[1:]])


def _refusal(status: str, code: str, has_body: bool) -> bytes:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n".encode()
    return head + text * has_body


def _pass_on(server: socket.socket, client: socket.socket, cut: bool) -> bool:
    """Passes an answer on; returns False if the client's connection ends with it."""
    answer = bytearray()
    while piece := server.recv(_PIECE):
        answer += piece
    head, end, body = bytes(answer).partition(b"\r\n\r\n")
    head = re.sub(rb"(?i)\r\nconnection: close", b"", head)
    if cut and len(body) > 1:
        client.sendall(head + end + body[: len(body) // 2])
        return False
    client.sendall(head + end + body)
    return True


@dataclasses.dataclass
class Store:
    """An S3 server with one bucket, reached through a proxy."""

    proxy: Proxy
    server: int

    def uri(self, path: str, port: int | None = None) -> str:
        query = f"endpoint_override=127.0.0.1:{port or self.proxy.port}&scheme=http&region=us-east-1"
        return f"s3://{BUCKET}/{path}?{query}"

    def put(self, path: str, content: bytes | Path) -> None:
        """Writes an object, past the proxy."""
        content = content if isinstance(content, bytes) else content.read_bytes()
        with self._direct.open_output_stream(f"{BUCKET}/{path}", compression=None) as stream:
            stream.write(content)

    def put_folder(self, path: str, folder: Path) -> None:
        """Writes all files below a folder."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(f"{path}/{file.relative_to(folder).as_posix()}", file)

    def names(self, path: str) -> list[str]:
        """Returns the names of all objects below a folder."""
        found = self._direct.get_file_info(fs.FileSelector(f"{BUCKET}/{path}", recursive=True, allow_not_found=True))
        return sorted(info.path.removeprefix(f"{BUCKET}/{path}/") for info in found if info.is_file)

    def get(self, path: str) -> bytes:
        """Returns the content of an object."""
        with self._direct.open_input_stream(f"{BUCKET}/{path}", compression=None) as stream:
            return stream.read()

    def delete(self, path: str) -> None:
        self._direct.delete_file(f"{BUCKET}/{path}")

    @property
    def _direct(self) -> Any:
        return fs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{self.server}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )

    def make(self) -> None:
        self._direct.create_dir(BUCKET)


@contextlib.contextmanager
def running_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Runs a server and its proxy during the block, with credentials in the environment."""
    moto = imported("moto.server", "moto[server]")
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # otherwise each request is a line
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        reset = urllib.request.Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset, timeout=PATIENCE).close()  # all servers of a process have the same buckets
        proxy = Proxy(port)
        store = Store(proxy, port)
        store.make()
        try:
            yield store
        finally:
            proxy.close()
    finally:
        server.stop()
