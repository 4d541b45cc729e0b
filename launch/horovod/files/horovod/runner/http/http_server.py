"""The store by which the workers of a job find each other, served over HTTP to those who have the job's key.

Replaces Horovod's own, which anyone could read and write, and which served the folder that it was started in.
"""

import collections
import logging
import re
import threading
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler
from typing import BinaryIO

from horovod.runner.common.util.hosts import SlotInfo
from horovod.runner.http import authentication
from horovod.runner.http.bounded_server import BoundedServer
from horovod.runner.util.network import find_port
from horovod.runner.util.threads import in_thread

OK = 200
BAD_REQUEST = 400
FORBIDDEN = 403
NOT_FOUND = 404
TOO_LARGE = 413
FULL = 507

MOST_HEADER_BYTES = 8192
MOST_BODY_BYTES = 1 << 20  # the addresses that one of 5,000 ranks has for all others
MOST_VALUES = 65536
MOST_VALUE_BYTES = 256 << 20  # of all values

_PATH = re.compile(r"/([A-Za-z0-9_.-]{1,300})/([A-Za-z0-9_.:-]{1,300})")


class Values:
    """Values by scope and key, bounded in number and size."""

    def __init__(self) -> None:
        self._scopes: collections.defaultdict[str, dict[str, bytes]] = collections.defaultdict(dict)
        self._lock = threading.Lock()
        self._count = self._bytes = 0

    def get(self, scope: str, key: str) -> bytes | None:
        with self._lock:
            return self._scopes[scope].get(key) if scope in self._scopes else None

    def put(self, scope: str, key: str, value: bytes) -> bool:
        """Returns whether there was room for it."""
        with self._lock:
            before = self._scopes[scope].get(key) if scope in self._scopes else None
            count = self._count + (before is None)
            size = self._bytes + len(value) - len(before or b"")
            if count > MOST_VALUES or size > MOST_VALUE_BYTES:
                return False
            self._scopes[scope][key] = value
            self._count, self._bytes = count, size
            return True

    def remove(self, scope: str, key: str) -> None:
        with self._lock:
            self._forget([self._scopes[scope].pop(key)] if key in self._scopes.get(scope, {}) else [])
            if not self._scopes.get(scope, True):
                del self._scopes[scope]

    def remove_scope(self, scope: str) -> None:
        with self._lock:
            self._forget(self._scopes.pop(scope, {}).values())

    def clear(self) -> None:
        with self._lock:
            self._scopes.clear()
            self._count = self._bytes = 0

    def _forget(self, values: Collection[bytes]) -> None:
        self._count -= len(values)
        self._bytes -= sum(map(len, values))


class _Limited:
    """A stream of which no more than so many bytes are read; then it looks ended."""

    def __init__(self, stream: BinaryIO, left: int) -> None:
        self._stream = stream
        self.left = left

    def readline(self, limit: int) -> bytes:
        return self._count(self._stream.readline(min(limit, self.left)))

    def read(self, size: int) -> bytes:
        return self._count(self._stream.read(min(size, self.left)))

    def close(self) -> None:
        self._stream.close()

    def _count(self, piece: bytes) -> bytes:
        self.left -= len(piece)
        return piece


class KVStoreHandler(BaseHTTPRequestHandler):
    """One request: a value is read, written or given up."""

    timeout = 5  # seconds for which a client may say nothing

    def setup(self) -> None:
        super().setup()
        self.rfile = _Limited(self.rfile, MOST_HEADER_BYTES)

    def do_GET(self) -> None:
        if place := self._authenticate(b""):
            self._answer(self._get(*place))

    def do_PUT(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 9 or int(length) > MOST_BODY_BYTES:
            self._answer(TOO_LARGE)
            return
        self.rfile.left = int(length)
        body = self.rfile.read(int(length))
        if len(body) == int(length) and (place := self._authenticate(body)):
            self._answer(self._put(*place, body))

    def do_DELETE(self) -> None:
        if place := self._authenticate(b""):
            self._answer(self._delete(*place))

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: there are many requests, and strangers must not fill logs."""

    def _authenticate(self, body: bytes) -> tuple[str, str] | None:
        """Returns the scope and key that are asked for; None where the request was refused."""
        server = self.server
        self._nonce = self.headers.get(authentication.NONCE_HEADER, "")
        expected = authentication.request_digest(server.key, self.command, self.path, self._nonce, body)
        given = self.headers.get(authentication.DIGEST_HEADER, "")
        if not authentication.is_same(expected, given) or not server.nonces.accept(self._nonce):
            self._nonce = ""
            self._answer(FORBIDDEN)
            return None
        server.exempt(self.connection)
        match = _PATH.fullmatch(self.path)
        if not match:
            self._answer(BAD_REQUEST)
            return None
        return match[1], match[2]

    def _answer(self, answer: int | bytes) -> None:
        """Sends a status, or the bytes of a value."""
        status, body = (answer, b"") if isinstance(answer, int) else (OK, answer)
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        if nonce := getattr(self, "_nonce", ""):  # to members only
            digest = authentication.answer_digest(self.server.key, nonce, status, body)
            self.send_header(authentication.DIGEST_HEADER, digest)
        self.end_headers()
        self.wfile.write(body)

    def _get(self, scope: str, key: str) -> int | bytes:
        value = self.server.values.get(scope, key)
        return NOT_FOUND if value is None else value

    def _put(self, scope: str, key: str, value: bytes) -> int:
        return OK if self.server.values.put(scope, key, value) else FULL

    def _delete(self, scope: str, key: str) -> int:
        self.server.values.remove(scope, key)
        return OK


class RendezvousHandler(KVStoreHandler):
    def _delete(self, scope: str, key: str) -> int:
        """Notes that a rank needs a scope no more. The values of a scope go with its last rank."""
        server = self.server
        if scope not in server.scope_size:  # it is not of the plan, but a client's own
            return super()._delete(scope, key)
        with server.finished_list_lock:
            server.finished_list[scope].append(key)
            if server.scope_size[scope] == len(server.finished_list[scope]):
                server.values.remove_scope(scope)
                server.finished_list.clear()
        return OK


class RendezvousHTTPServer(BoundedServer):
    def __init__(self, addr: tuple[str, int], handler: type[KVStoreHandler], key: bytes) -> None:
        self.key = key
        self.nonces = authentication.Nonces()
        self.values = Values()
        self.finished_list_lock = threading.Lock()
        self.finished_list = collections.defaultdict(list)
        self.scope_size = {}  # how many ranks a scope of the plan has
        super().__init__(addr, handler)

    def init(self, host_alloc_plan: list[SlotInfo]) -> None:
        self.values.clear()
        with self.finished_list_lock:
            self.finished_list.clear()
        self.scope_size.clear()
        for slot_info in host_alloc_plan:
            self.scope_size["global"] = slot_info.size
            self.scope_size["local_" + slot_info.hostname] = slot_info.local_size
            self.scope_size["cross_" + str(slot_info.local_rank)] = slot_info.cross_size


class RendezvousServer:
    def __init__(self, verbose: int = 0) -> None:
        self._httpd = None
        self._listen_thread = None
        self._verbose = verbose

    def start(self, address: str, handler_cls: type[KVStoreHandler] = RendezvousHandler) -> int:
        """Serves at this address alone; returns the port. `init` is to follow.

        Raises:
            RuntimeError: there is no key of a job, by which to know its members.
        """
        key = authentication.job_key()
        self._httpd, port = find_port(lambda addr: RendezvousHTTPServer(addr, handler_cls, key), address)
        if self._verbose:
            logging.info("Rendezvous INFO: HTTP rendezvous server started.")
        self._listen_thread = in_thread(target=self._httpd.serve_forever)
        return port

    def init(self, host_alloc_plan: list[SlotInfo]) -> None:
        self._httpd.init(host_alloc_plan)

    def stop(self) -> None:
        self._httpd.shutdown()
        self._listen_thread.join()
