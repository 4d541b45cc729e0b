"""Requests to a server in tests, and their answers.

with in_background(server, 3, score(row(["a", "b"], "x"))) as answers:
    status, answer = answers[0].result()
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tests.support.patience import PATIENCE
from tests.support.stand_in_model import Running

PATH = "/v1/models/din_dist"


def row(history: Sequence[str] = ("a", "b"), candidate: str = "x", **more: Any) -> dict[str, Any]:
    return {"history_item_ids": list(history), "candidate_item_id": candidate, **more}


def score(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"instances": list(rows or [row()])}


def logits(answer: Any) -> list[float]:
    return [one["logits"] for one in answer["predictions"]]


@contextlib.contextmanager
def in_background(server: Running, count: int, body: Any) -> Iterator[list[concurrent.futures.Future]]:
    """`count` requests at once, each on its own connection."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        yield [pool.submit(server.predict, body) for _ in range(count)]


def wait_until(holds: Any) -> None:
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)
