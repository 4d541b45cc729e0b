"""Serves a registry to Prometheus over HTTP or HTTPS, with or without passwords.

`prometheus_client.start_http_server` is not enough. It has no basic authentication, and it never drops silent clients.
A client that does not finish its TLS handshake blocks all others there.
"""

from __future__ import annotations

import base64
import errno
import hmac
import socket
import ssl
import threading
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import MetricsHandler

from din_dist.bounded_server import BoundedServer
from din_dist.config import TelemetryConfig
from din_dist.errors import InputError

_CLIENT_SECONDS = 10.0  # a client that is silent for longer is disconnected


class MetricsServer:
    """Answers at `port` (0: a free one, see `port`) of `settings.metrics_host` until it is closed.

    Raises:
        InputError: the port is taken, the host is not this machine, or the files for TLS or authentication are
            unusable.
    """

    def __init__(self, settings: TelemetryConfig, registry: CollectorRegistry, port: int) -> None:
        context = _tls_context(settings) if settings.metrics_tls_certificate else None
        logins = _logins(settings.metrics_password_file) if settings.metrics_password_file else None

        class Handler(MetricsHandler):
            timeout = _CLIENT_SECONDS

            def do_GET(self) -> None:
                given = self.headers.get("Authorization", "").encode()
                if logins is None or sum(hmac.compare_digest(given, login) for login in logins):
                    super().do_GET()
                    return
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="din_dist metrics"')
                self.send_header("Content-Length", "0")
                self.end_headers()

        try:
            self._server = BoundedServer((settings.metrics_host, port), Handler.factory(registry))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise InputError(
                    "--metrics_host: must be a name or address of this machine. Received: "
                    f"{settings.metrics_host}, {error.strerror or error}. For example 0.0.0.0 for all of its cards."
                ) from error
            raise InputError(
                f"--metrics_port: each rank of a machine needs a free port on {settings.metrics_host}. Received: "
                f"{port}, {error.strerror or error}. Choose another, or 0 for any free one."
            ) from error
        if context:
            # The handshake runs in the client's own thread. In the accepting thread, a silent client would block all.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _tls_context(settings: TelemetryConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.metrics_tls_certificate, settings.metrics_tls_key)
    except OSError as error:  # of which ssl.SSLError is one
        raise InputError(
            "--metrics_tls_certificate, --metrics_tls_key: must be a PEM certificate and its key. Received: "
            f"{settings.metrics_tls_certificate} and {settings.metrics_tls_key}, {error.strerror or error}. Correct "
            "the files."
        ) from error
    return context


def _logins(path: str) -> list[bytes]:
    """Returns the valid values of the header `Authorization`, one for each line of the password file."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(
            f"--metrics_password_file: must be a file that can be read. Received: {path}, {error.strerror}. "
            "Correct the path."
        ) from error
    entries = [line.strip() for line in lines if line.strip()]
    if not entries or not all(b":" in entry.strip(b":") for entry in entries):
        raise InputError(
            f"--metrics_password_file: must have a line user:password for each login. Received: {path}, "
            f"{len(entries)} line(s), not all of that form. Correct the file."
        )
    return [b"Basic " + base64.b64encode(entry) for entry in entries]
