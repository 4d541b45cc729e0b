"""Connections: limits their number, closes idle ones to make room, and disconnects clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

from aiohttp import web

from din_dist.serving.http.metrics import ServingMetrics
from din_dist.serving.http.responses import RETRY_SECONDS, error

LINGER_SECONDS = 1.0  # time to read the rest of a refused body, so that the client sees why; and at shutdown
_MOST_GIVE_WAY = 16  # connections that are closed at once to make room
_PATIENCE_SECONDS = 1.0  # a client that keeps the server waiting for longer may be closed to make room
_RECEIVED_AT_ONCE = 1 << 16
_MAX_HEADERS, _MAX_HEADER_BYTES, _MAX_HEAD_BYTES = 100, 8190, 1 << 16
_NO_HTTP = (
    f"A request must be HTTP/1.1, with at most {_MAX_HEADERS} headers of {_MAX_HEADER_BYTES} bytes each, and "
    f"{_MAX_HEAD_BYTES} in all."
)


def _raw_response(status: str, text: str) -> bytes:
    """Returns the bytes of an answer to a client whose request was not parsed."""
    body = json.dumps({"error": text})
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nRetry-After: {RETRY_SECONDS}\r\nConnection: close"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


_TOO_MANY = _raw_response("503 Service Unavailable", "Too many connections are open. Try again later.")
_HEAD_TOO_LARGE = _raw_response("431 Request Header Fields Too Large", _NO_HTTP)


class Connection(web.RequestHandler):
    """One client's connection. It knows which of the two sides waits for the other.

    Attributes:
        waits_since: when the server began to wait for the client's next request, or for the client to read its answer.
            None while the client waits for the server.
        unsent_since: since when some bytes are unsent; None if all were sent.
        is_known: true if a request over this connection was answered with 200.
    """

    __slots__ = ("_connections", "_held_back", "_num_head_bytes", "_pipe", "is_known", "unsent_since", "waits_since")

    def __init__(self, connections: Connections, http: web.Server, timeout: float) -> None:
        settings: dict[str, Any] = {"access_log": None}
        super().__init__(
            http,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=timeout,
            lingering_time=LINGER_SECONDS,
            max_headers=_MAX_HEADERS,
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
            read_bufsize=_RECEIVED_AT_ONCE,
            auto_decompress=False,  # `body.unpacked` does it, with a limit
            **settings,
        )
        self._connections = connections
        self._pipe: asyncio.Transport | None = None
        self._held_back = self.is_known = False
        self._num_head_bytes = 0
        self.waits_since: float | None = self._loop.time()
        self.unsent_since: float | None = None

    def server_waits(self, is_known: bool | None = None) -> None:
        """Notes that it is the client's turn, and whether the client is known from now on."""
        self.waits_since = self._loop.time()
        if is_known is not None:
            self.is_known = is_known
        self._read_on()

    def client_waits(self) -> None:
        """Notes that it is the server's turn."""
        self.waits_since = None

    @property
    def num_unsent(self) -> int:
        """The number of bytes that the client has yet to read, without those in the kernel's buffers."""
        return self._pipe.get_write_buffer_size() if self._pipe else 0

    def abort(self) -> None:
        """Closes the connection at once and drops unsent bytes."""
        if self._pipe:
            self._pipe.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._pipe = transport
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.forget(self)
        self._pipe = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Passes data on. To bound the memory, reads no more until the client is answered and reads that answer."""
        super().data_received(data)
        if not self._pipe:
            return
        has_no_head = self._waiter is not None and not self._waiter.done()  # aiohttp waits for the rest of the head
        self._num_head_bytes = self._num_head_bytes + len(data) if has_no_head else 0
        if self._num_head_bytes > _MAX_HEAD_BYTES:
            self._pipe.write(_HEAD_TOO_LARGE)
            self.force_close()
        elif data and not self._held_back and (self.waits_since is None or self.writing_paused):
            self._held_back = True
            self._pipe.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read_on()

    def _read_on(self) -> None:
        if self._held_back and self._pipe and self.waits_since is not None and not self.writing_paused:
            self._held_back = False
            self._pipe.resume_reading()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answers invalid HTTP with one sentence; aiohttp would repeat the input at several times its length."""
        if status == 400 and request.writer.output_size == 0:
            response = error(400, _NO_HTTP)
            response.force_close()
            return response
        return super().handle_error(request, status, exc, message)


class Connections:
    """All connections of one port.

    Args:
        http: aiohttp's server.
        most: the most connections. More clients get 503, unless others can be closed for them.
        timeout: seconds that an answer may stay unread, and that a connection may stay idle.
        metrics: to update.
    """

    def __init__(self, http: web.Server, most: int, timeout: float, metrics: ServingMetrics) -> None:
        self._http, self._most, self._timeout, self._metrics = http, most, timeout, metrics
        self._loop = asyncio.get_running_loop()
        self._open: set[Connection] = set()
        self._making: set[asyncio.Task] = set()
        self._full_until = 0.0

    @property
    def num_unsent(self) -> int:
        """The number of bytes that clients have yet to read."""
        return sum(connection.num_unsent for connection in self._open)

    def __len__(self) -> int:
        return len(self._open)

    def take(self, client: socket.socket) -> None:
        """Serves a client that has connected, or answers that too many are connected."""
        if len(self._open) >= self._most:
            self.make_room()
        if len(self._open) >= self._most:
            self._refuse(client)
            return
        connection = Connection(self, self._http, self._timeout)
        self._open.add(connection)
        making = self._loop.create_task(self._make(connection, client))
        self._making.add(making)
        making.add_done_callback(self._making.discard)

    async def _make(self, connection: Connection, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, client)
        except OSError:  # the client has left already
            self.forget(connection)
            client.close()

    def make_room(self) -> None:
        """Closes the connections that have kept the server waiting for the longest.

        Those are several unknown clients or, if there are none, one known client. A client that waits for the server
        is never closed. Without this, silent connections could keep all other clients out.
        """
        now = self._loop.time()
        if now < self._full_until:
            return
        found = [one for one in self._open if now - (one.waits_since or now) > _PATIENCE_SECONDS]
        found.sort(key=lambda one: one.waits_since or now)
        strangers = [one for one in found if not one.is_known or one.num_unsent]
        for connection in strangers[:_MOST_GIVE_WAY] or found[:1]:
            self._drop(connection, "room")
        if not found:
            self._full_until = now + _PATIENCE_SECONDS / 10  # a search over all of them for each client takes long

    def forget(self, connection: Connection) -> None:
        """Removes a connection that is gone."""
        self._open.discard(connection)

    async def watch(self) -> None:
        """Closes connections of clients that do not read their answers, until it is cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            now = self._loop.time()
            for connection in tuple(self._open):
                if not connection.num_unsent:
                    connection.unsent_since = None
                elif connection.unsent_since is None:
                    connection.unsent_since = now
                elif now - connection.unsent_since > self._timeout:
                    self._drop(connection, "unread")

    def _drop(self, connection: Connection, reason: str) -> None:
        self._metrics.connections_dropped.labels(reason).inc()
        self.forget(connection)
        connection.abort()

    def _refuse(self, client: socket.socket) -> None:
        self._metrics.connections_refused.inc()
        for act in (
            lambda: client.recv(_RECEIVED_AT_ONCE),  # closing a connection with unread bytes resets it
            lambda: client.send(_TOO_MANY),
        ):
            with contextlib.suppress(OSError):
                act()
        client.close()
