"""What the launcher and the agents of its workers say to each other, over TCP: a line each.

launcher:  CHALLENGE           32 hexadecimal digits, once, first
agent:     NONCE               likewise
agent:     {"host": ..., "local_rank": ..., "rank": ...}   once, then
launcher:  {"stop": n}         the job is to stop; n = 2: at once, without a checkpoint
launcher:  {"given_up": true}  the job goes on without this worker, which was silent for too long
agent:     {"parted": true}    the launcher was silent for too long: the trainer is stopped
agent:     {"ended": code}     with what its trainer ended, or is about to
both:      {}                  a sign of life, each `BEAT_SECONDS`; by the launcher's first one the agent is known there

All but the first two lines are JSON, after a digest that proves the job's key. It covers the challenge, the nonce, who
speaks and the line's number, so that a line is of use to nobody else and but once, and one that changed on its way is
found out.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import socket
from typing import Any, Literal

BEAT_SECONDS = 1.0
LONGEST_LINE = 4096  # bytes

_NONCE = re.compile(rb"[0-9a-f]{32}")

Side = Literal["launcher", "agent"]


def new_nonce() -> bytes:
    return secrets.token_hex(16).encode()


class Seal:
    """Proves the lines of one side, and checks those of the other, in their order."""

    def __init__(self, side: Side, key: str, challenge: bytes, nonce: bytes) -> None:
        """
        Raises:
            ValueError: challenge or nonce are none.
        """
        if not (_NONCE.fullmatch(challenge) and _NONCE.fullmatch(nonce)):
            raise ValueError("a link begins with two nonces")
        self._key, self._session = key.encode(), challenge + nonce
        self._side: Side = side
        self._other: Side = "agent" if side == "launcher" else "launcher"
        self._sent = self._received = 0

    def encode(self, message: dict[str, Any]) -> bytes:
        """Returns the next line of this side."""
        text = json.dumps(message).encode()
        line = self._digest(self._side, self._sent, text) + b" " + text + b"\n"
        self._sent += 1
        return line

    def decode(self, line: bytes) -> dict[str, Any]:
        """Returns what the other side says in its next line.

        Raises:
            ValueError: it was not said by who knows the key, or is not what was said.
        """
        digest, _, text = line.rstrip(b"\n").partition(b" ")
        if not hmac.compare_digest(digest, self._digest(self._other, self._received, text)):
            raise ValueError("a line without proof of the job's key")
        self._received += 1
        message: dict[str, Any] = json.loads(text)
        return message

    def _digest(self, side: Side, number: int, text: bytes) -> bytes:
        said = b" ".join([side.encode(), self._session, str(number).encode(), text])
        return hmac.new(self._key, said, hashlib.sha256).hexdigest().encode()


def introduce(link: socket.socket, key: str, hello: dict[str, Any]) -> tuple[Seal, Lines]:
    """Introduces an agent to who should be its launcher, at the other end of `link`, until it is known there.

    Raises:
        OSError: no answer, as from a launcher that many others connect to just then.
        ValueError: it is not the launcher.
    """
    lines = Lines()
    challenge, nonce = lines.read_one(link), new_nonce()
    seal = Seal("agent", key, challenge, nonce)
    link.sendall(nonce + b"\n" + seal.encode(hello))
    seal.decode(lines.read_one(link))
    return seal, lines


class Lines:
    """Puts what comes in pieces together to lines."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, piece: bytes) -> list[bytes]:
        """Returns the lines that a piece completes.

        Raises:
            ValueError: a line has no end.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            raise ValueError("a line without an end")
        return lines

    def read_one(self, link: socket.socket) -> bytes:
        """Waits for a line and keeps what comes after it.

        Raises:
            OSError: none came.
            ValueError: it has no end.
        """
        while b"\n" not in self._rest:
            piece = link.recv(LONGEST_LINE)
            if not piece:
                raise ConnectionError("the link was closed")
            self._rest += piece
            if len(self._rest) > 2 * LONGEST_LINE:
                raise ValueError("a line without an end")
        line, _, self._rest = self._rest.partition(b"\n")
        return line
