"""Serves an application at a port, with bounded connections and errors in JSON."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any

from aiohttp import hdrs, web

from din_dist.serving.http.connections import LINGER_SECONDS, Connection, Connections
from din_dist.serving.http.listener import Acceptor
from din_dist.serving.http.metrics import ServingMetrics
from din_dist.serving.http.responses import Scores, error


class Door:
    """Serves an application at one port.

    Args:
        app: the application.
        most: the most connections; see `Connections`.
        timeout: seconds; see `Connections`.
        metrics: to update.
        say: logs a line for operators.
    """

    def __init__(
        self, app: web.Application, most: int, timeout: float, metrics: ServingMetrics, say: Callable[[str], None]
    ) -> None:
        self._most, self._timeout, self._metrics, self._say = most, timeout, metrics, say
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # mistakes of clients do not belong in the log
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=LINGER_SECONDS, access_log=None)

    async def open(self, listener: socket.socket) -> None:
        """Begins to serve clients that connect to `listener`."""
        await self._runner.setup()
        assert self._runner.server is not None
        self.connections = Connections(self._runner.server, self._most, self._timeout, self._metrics)
        self._acceptor = Acceptor(listener, self.connections.take, self.connections.make_room, self._say)
        self._acceptor.start()
        self._watching = asyncio.create_task(self.connections.watch())

    def stop_listening(self) -> None:
        """Closes the port. Clients that have connected already are still served."""
        self._acceptor.close()

    async def close(self) -> None:
        """Closes all connections."""
        self._watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching
        await self._runner.cleanup()


def json_errors(hint: str, is_ending: Callable[[], bool]) -> Any:
    """Returns a middleware that answers errors in TensorFlow Serving's form and notes whose turn it is.

    Args:
        hint: the valid paths, for answers with 404.
        is_ending: true: close each connection after its answer, so that clients turn to other servers.
    """

    @web.middleware
    async def answer(request: web.Request, handler: Any) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        if request.content.is_eof():
            connection.client_waits()
        else:
            connection.server_waits()
        response: web.StreamResponse
        try:
            response = await handler(request)
        except web.HTTPNotFound:
            response = error(404, f"There is nothing at {request.path[:200]}. {hint}")
        except web.HTTPMethodNotAllowed as refusal:
            response = error(405, f"{request.path[:200]} takes {', '.join(sorted(refusal.allowed_methods))} only.")
            response.headers[hdrs.ALLOW] = refusal.headers[hdrs.ALLOW]
        except web.HTTPException as refusal:
            response = error(refusal.status, refusal.reason)
        if not isinstance(response, Scores):
            # From Python 3.12 on, a client's pipelined requests that never wait would starve all other clients.
            await asyncio.sleep(0)
        connection.server_waits(is_known=response.status == 200)
        if is_ending():
            response.force_close()
        return response

    return answer
