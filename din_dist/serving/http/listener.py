"""Binds a port early, before anything slow, and accepts connections within the limit of open files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable

from din_dist.errors import InputError

_MOST_AT_ONCE = 32  # connections that are accepted in one turn of the event loop
_OUT_OF_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_PAUSE_SECONDS = 0.2
_KERNEL_BYTES = 1 << 17


def listen(host: str, port: int, flags: str = "--host, --port") -> socket.socket:
    """Returns a bound socket, to which nobody can connect yet.

    Args:
        host: a name or address of this machine.
        port: 0: any free one.
        flags: the names of the flags, for errors.

    Raises:
        InputError: the port is taken, or this machine has no such address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family[0], socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # for each connection; the default is up to 10 MB
                listener.setsockopt(socket.SOL_SOCKET, buffer, _KERNEL_BYTES)
            listener.bind(family[4])
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InputError(
            f"{flags}: must be an address and a free port of this machine. Received: {host} and {port}, "
            f"{error.strerror or error}. Choose others, or port 0 for any free one."
        ) from error
    return listener


class Acceptor:
    """Accepts clients and passes them to `take`.

    asyncio's own server would log and retry a thousand times at once when no more files may be open.

    Args:
        listener: a bound socket.
        take: called with each new connection.
        relieve: called when no more files may be open, to close some connections.
        say: logs a line for operators.
    """

    def __init__(
        self,
        listener: socket.socket,
        take: Callable[[socket.socket], None],
        relieve: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._listener, self._take, self._relieve, self._say = listener, take, relieve, say
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._has_said = False

    def start(self) -> None:
        """Begins to accept connections."""
        self._listener.setblocking(False)
        self._listener.listen(socket.SOMAXCONN)  # a client beyond the backlog retries only after seconds
        self._resume()

    def close(self) -> None:
        """Accepts the clients that have connected so far, because closing would reset them, and closes the port."""
        self._pause()
        with contextlib.suppress(OSError):  # there are no more
            while True:
                self._take_one()
        self._listener.close()

    def _accept(self) -> None:
        try:
            for _ in range(_MOST_AT_ONCE):
                self._take_one()
            self._has_said = False
        except OSError as error:
            if error.errno in _OUT_OF_FILES:
                self._wait(error)
            # Otherwise nobody is left, or the client has left already.

    def _take_one(self) -> None:
        client, _ = self._listener.accept()
        client.setblocking(False)
        self._take(client)

    def _wait(self, error: OSError) -> None:
        """Stops accepting for a moment, because the port stays readable and would be tried without end."""
        if not self._has_said:
            self._say(f"no connection can be accepted for now: {error.strerror}; see ulimit -n and --max_connections")
            self._has_said = True
        self._pause()
        self._relieve()
        self._again = self._loop.call_later(_PAUSE_SECONDS, self._resume)

    def _pause(self) -> None:
        self._loop.remove_reader(self._listener)
        if self._again:
            self._again.cancel()

    def _resume(self) -> None:
        self._loop.add_reader(self._listener, self._accept)
