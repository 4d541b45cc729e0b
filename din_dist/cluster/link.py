"""The protocol between the launcher and the agents of its workers: messages over TCP, one a line.

launcher:  CHALLENGE           32 hexadecimal digits, once, first
agent:     NONCE               the same, once, in answer
agent:     {"host": ..., "local_rank": ..., "rank": ...}   once, then
launcher:  {"stop": n}         the job must stop; n = 2: at once, without a checkpoint
launcher:  {"given_up": true}  the job continues without this worker, which was silent for too long
agent:     {"parted": true}    the launcher was silent for too long, so the agent stops the trainer
agent:     {"ended": code}     the exit code with which its trainer has ended, or is about to end
both:      {}                  a heartbeat, every `BEAT_SECONDS`; the launcher's first one accepts the agent

All but the first two lines are JSON after a digest that proves the job's key. The digest covers the challenge, the
nonce, the side that sends the line and the line's number. So a line cannot be replayed, and a changed one is rejected.
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
    """Returns 32 random hexadecimal digits."""
    return secrets.token_hex(16).encode()


class Seal:
    """Adds a digest to each line of one side, and checks the digests of the other side, in order."""

    def __init__(self, side: Side, key: str, challenge: bytes, nonce: bytes) -> None:
        """Starts a session.

        Raises:
            ValueError: challenge or nonce has another form.
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
        """Returns the message in the other side's next line.

        Raises:
            ValueError: the sender does not know the key, or the line was changed on its way.
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
    """Introduces an agent to the launcher at the other end of `link`, and waits until the launcher accepts it.

    Raises:
        OSError: no answer came, for example because many agents connect at once.
        ValueError: the other end is not the launcher.
    """
    lines = Lines()
    challenge, nonce = lines.read_one(link), new_nonce()
    seal = Seal("agent", key, challenge, nonce)
    link.sendall(nonce + b"\n" + seal.encode(hello))
    seal.decode(lines.read_one(link))
    return seal, lines


class Lines:
    """Joins received pieces into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, piece: bytes) -> list[bytes]:
        """Returns the lines that a piece completes.

        Raises:
            ValueError: a line is too long.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            raise ValueError("a line without an end")
        return lines

    def read_one(self, link: socket.socket) -> bytes:
        """Waits for a line and keeps the bytes after it.

        Raises:
            OSError: no line came.
            ValueError: the line is too long.
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
