"""What the launcher and the agents of its workers say to each other: objects of JSON, a line each, over TCP.

agent:     {"token": ..., "host": ..., "local_rank": ..., "rank": ...}   once, first
launcher:  {"stop": n}         the job is to stop; n = 2: at once, without a checkpoint
launcher:  {"given_up": true}  the job goes on without this worker, which was silent for too long
agent:     {"ended": code}     with what its trainer ended, or is about to
both:      {}                  a sign of life, each `BEAT_SECONDS`
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Self

ADDRESS_VARIABLE = "DIN_DIST_LAUNCHER"
JOB_VARIABLE = "DIN_DIST_JOB"  # tells the workers of one job from those of another
BEATS_VARIABLE = "DIN_DIST_BEATS_FD"  # of a trainer: where its signs of life go
BEAT_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Address:
    """How an agent finds its launcher, in an environment variable."""

    host: str  # empty: where Horovod's driver is, which knows by which of its addresses the workers reach it
    port: int
    token: str
    stall_timeout_seconds: float

    def to_environment(self) -> dict[str, str]:
        return {ADDRESS_VARIABLE: f"{self.host}:{self.port}:{self.token}:{self.stall_timeout_seconds:g}"}

    @classmethod
    def from_environment(cls) -> Self:
        host, port, token, stall_timeout_seconds = os.environ[ADDRESS_VARIABLE].split(":")
        return cls(host or os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(port), token, float(stall_timeout_seconds))


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


class Lines:
    """Puts what comes in pieces together to lines."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, piece: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return lines
