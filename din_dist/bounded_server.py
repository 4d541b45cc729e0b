"""An HTTP server that strangers cannot fill: it keeps few connections at a time, each for a short time.

Our build of Horovod has a copy of this file (see launch/horovod/build_horovod.sh). So it imports only the standard
library.
"""

from __future__ import annotations

import collections
import contextlib
import socket
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class BoundedServer(ThreadingHTTPServer):
    """A server that answers each connection in a thread of its own.

    A connection has `patience_seconds` to make its request and to take the answer. When there are more than
    `most_connections`, the oldest makes room for the new one. `exempt` is for clients that have proven themselves.
    """

    most_connections = 64
    patience_seconds = 10.0
    request_queue_size = 1024  # connections that the kernel keeps until they are accepted
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        """Listens at `address`; port 0 means any free port."""
        self._lock = threading.Lock()
        self._accepted: collections.OrderedDict[Any, float] = collections.OrderedDict()  # connection -> when
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Binds like any TCP server. The base class would ask a name server for its own name."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._accepted[request] = time.monotonic()
            surplus = len(self._accepted) - self.most_connections
            oldest = [self._accepted.popitem(last=False)[0] for _ in range(surplus)]
        for connection in oldest:
            _hang_up(connection)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.exempt(request)
        super().shutdown_request(request)

    def exempt(self, connection: Any) -> None:
        """Lets a connection last as long as its handler wants, and frees its place."""
        with self._lock:
            self._accepted.pop(connection, None)

    def service_actions(self) -> None:
        """Closes connections that have lasted too long; the base class calls this twice a second."""
        until = time.monotonic() - self.patience_seconds
        with self._lock:
            late = [connection for connection, accepted in self._accepted.items() if accepted < until]
        for connection in late:
            _hang_up(connection)

    def handle_error(self, request: object, client_address: object) -> None:
        """Logs nothing, because scanners and broken connections say nothing about the job."""


def _hang_up(connection: socket.socket) -> None:
    """Wakes the thread that reads or writes, which then ends. Skips the farewell of TLS, which could block."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
