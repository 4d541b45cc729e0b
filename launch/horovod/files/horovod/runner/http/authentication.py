"""Proof that a message is from somebody who has the job's key.

Whoever starts a job makes the key. It reaches processes by their environment, which no other user can read, and other
hosts by the input of ssh; it never stands in a command line. Each request carries a nonce that is valid once, and a
digest over all that it says; the answer carries a digest over the nonce and what is answered.
"""

import hashlib
import hmac
import os
import re
import secrets
import threading

KEY_VARIABLE = "HOROVOD_SECRET_KEY"
NONCE_HEADER = "X-Horovod-Nonce"
DIGEST_HEADER = "X-Horovod-Digest"
SHORTEST_KEY = 32  # characters
MOST_CLIENTS = 65536  # over the life of a job, each with one entry of a hundred bytes

_NONCE = re.compile(r"([0-9a-f]{32})-([0-9]{1,18})")


def make_key() -> str:
    """Makes a key, as text for an environment variable."""
    return secrets.token_hex(32)


def job_key() -> bytes:
    """Returns the key of the job that this process belongs to.

    Raises:
        RuntimeError: there is none. Nothing is served or asked without.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if len(key) < SHORTEST_KEY:
        raise RuntimeError(
            f"{KEY_VARIABLE} must have at least {SHORTEST_KEY} characters. Received: {len(key)}. "
            "Start the job by horovodrun, which sets it."
        )
    return key.encode()


def digest_of(key: bytes, *parts: bytes) -> str:
    """Returns the HMAC-SHA256 of the parts, each preceded by its length, as hexadecimal text."""
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def request_digest(key: bytes, method: str, path: str, nonce: str, body: bytes) -> str:
    return digest_of(key, b"request", method.encode(), path.encode(), nonce.encode(), body)


def answer_digest(key: bytes, nonce: str, status: int, body: bytes) -> str:
    return digest_of(key, b"answer", nonce.encode(), str(status).encode(), body)


def is_same(one: str, other: str) -> bool:
    """Compares in a time that does not depend on where the two differ."""
    return hmac.compare_digest(one.encode(), other.encode())


class Nonces:
    """The nonces that a server has seen: of each client the last one, as clients count them."""

    def __init__(self, most_clients: int = MOST_CLIENTS) -> None:
        self._last: dict[str, int] = {}
        self._lock = threading.Lock()
        self._most_clients = most_clients

    def accept(self, nonce: str) -> bool:
        """Notes a nonce and returns whether it is new. To be asked only after the digest was found right."""
        match = _NONCE.fullmatch(nonce)
        if not match:
            return False
        client, number = match[1], int(match[2])
        with self._lock:
            if client not in self._last and len(self._last) >= self._most_clients:
                return False
            if number <= self._last.get(client, -1):
                return False
            self._last[client] = number
            return True
