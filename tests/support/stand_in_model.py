"""Runs the HTTP server in a thread around a model of three lines, for tests of everything but the model.

with running(max_candidates=4) as server:
    status, answer = server.predict({"instances": [...]})
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from din_dist.serving.http.listener import listen
from din_dist.serving.http.metrics import ServingMetrics
from din_dist.serving.http.parse import Vocabulary
from din_dist.serving.http.served import Served
from din_dist.serving.http.server import Server
from din_dist.serving.http.settings import ServeConfig

_T = TypeVar("_T")

POISON = "poison"  # an id that breaks the call it is in
NO_NUMBER = "no number"  # a candidate without a logit
STRINGS = Vocabulary("string", {"category_id": "string", "shelf": "integer"}, max_history_length=5)
INTEGERS = Vocabulary("integer", {}, max_history_length=5)


def logit(history: Sequence, candidate: object, features: Sequence = ()) -> float:
    """Returns the stand-in's logit, which depends on the arguments alone and on the order of the history."""
    if candidate == NO_NUMBER:
        return float("nan")
    words = "|".join(map(str, [*history, "/", candidate, "/", *features]))
    return float(np.float32(zlib.crc32(words.encode()) / 2**30 - 2))


class StandIn:
    """Answers as a `Bundle` does.

    Args:
        shift: added to each logit, so that it tells one version from another.

    Attributes:
        gate: calls wait until it is set.
        entered: released by each call as it begins.
        sizes: the number of candidates of each call.
    """

    def __init__(self, shift: float = 0.0) -> None:
        self._shift = shift
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.sizes: list[int] = []

    def score(self, history_item_ids: Any, history_lengths: Any, candidate_item_ids: Any) -> np.ndarray:
        return self.rank_histories(
            history_item_ids, history_lengths, candidate_item_ids, np.ones(len(candidate_item_ids), np.int64)
        )

    def rank_histories(
        self, history_item_ids: Any, history_lengths: Any, candidate_item_ids: Any, candidate_counts: Any
    ) -> np.ndarray:
        self._enter(history_item_ids, candidate_item_ids)
        histories = np.split(history_item_ids, np.cumsum(history_lengths)[:-1])
        groups = np.split(candidate_item_ids, np.cumsum(candidate_counts)[:-1])
        assert sum(map(len, histories)) == sum(history_lengths) == len(history_item_ids)
        pairs = [(history, candidate) for history, group in zip(histories, groups, strict=True) for candidate in group]
        return np.array([logit(history, candidate) + self._shift for history, candidate in pairs], np.float32)

    def score_with_features(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        candidate_item_ids: Any,
        history_features: Mapping[str, Any],
        candidate_features: Mapping[str, Any],
    ) -> np.ndarray:
        self._enter(history_item_ids, candidate_item_ids)
        ends = np.cumsum(history_lengths)
        return np.array(
            [
                logit(
                    history_item_ids[end - length : end],
                    candidate_item_ids[place],
                    [values[end - length : end].tolist() for _, values in sorted(history_features.items())]
                    + [values[place] for _, values in sorted(candidate_features.items())],
                )
                for place, (end, length) in enumerate(zip(ends, history_lengths, strict=True))
            ],
            np.float32,
        )

    def _enter(self, history_item_ids: Any, candidate_item_ids: Any) -> None:
        self.entered.release()
        assert self.gate.wait(30)
        self.sizes.append(len(candidate_item_ids))
        if POISON in list(candidate_item_ids) + list(history_item_ids):
            raise RuntimeError("the model broke: \x1b[31m\nserving since noon")


class Running:
    """A server that answers predictions at `port`, and probes and metrics at `health_port`."""

    def __init__(self, model: StandIn, vocabulary: Vocabulary, **settings: Any) -> None:
        self.model, self.said = model, []  # type: ignore[var-annotated]
        self.config = ServeConfig(export_dir="none", port=0, **settings)
        listener = listen(self.config.host, 0)
        health_listener = listen(self.config.host, 0)
        self.port, self.health_port = listener.getsockname()[1], health_listener.getsockname()[1]
        self.serving_metrics = ServingMetrics({})
        ready = threading.Event()
        self.answered: bool | None = None
        first = [Served(model, vocabulary, 7, {"digest": "abc"})]  # the server alone is to hold it

        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            self.server = Server(self.config, first.pop(), self.serving_metrics, self.said.append)
            self.answered = await self.server.run(listener, ready.set, health_listener)

        self.thread = threading.Thread(target=asyncio.run, args=(serve(),))
        self.thread.start()
        assert ready.wait(10)

    def stop(self) -> None:
        """Asks the server to stop, as a signal does."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self.loop.call_soon_threadsafe(self.server.stop)

    def stop_amid(self, act: Callable[[], bool]) -> None:
        """Asks the server to stop, then calls `act` at every turn of the event loop until it returns False."""
        over = threading.Event()

        def turn() -> None:
            if act():
                self.loop.call_soon(turn)
            else:
                over.set()

        self.loop.call_soon_threadsafe(lambda: (self.server.stop(), turn()))
        assert over.wait(10)

    def in_loop(self, act: Callable[[], _T]) -> _T:
        """Calls `act` in the event loop and returns its result."""

        async def acted() -> _T:
            return act()

        return asyncio.run_coroutine_threadsafe(acted(), self.loop).result(10)

    def replace(self, model: StandIn, version: int, vocabulary: Vocabulary = STRINGS) -> weakref.ref[Served]:
        """Serves another version; returns the one before."""
        served = Served(model, vocabulary, version, {"digest": f"digest {version}"})
        return self.in_loop(lambda: self.server.replace(served))

    def block(self, seconds: float) -> None:
        """Blocks the event loop for so many seconds, from now on."""
        begun = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (begun.set(), time.sleep(seconds)))
        assert begun.wait(10)

    def connect(self, port: int = 0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=30)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Sends one request; returns the status and JSON of its answer. A `body` that is not bytes is sent as JSON."""
        with contextlib.closing(self.connect()) as connection:
            return ask(connection, method, path, body, **headers)

    def predict(self, body: Any, **headers: str) -> tuple[int, Any]:
        """Asks for predictions; see `ask`."""
        return self.ask("POST", "/v1/models/din_dist:predict", body, **headers)

    def metrics(self) -> dict[str, float]:
        """Returns the server's own metrics, without their prefix din_dist_serving_."""
        with contextlib.closing(self.connect(self.health_port)) as connection:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("din_dist_serving_"))
        return {name.removeprefix("din_dist_serving_"): float(value) for name, value in pairs}


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Any]:
    """Sends one request on an open connection; see `Running.ask`. Header names have _ in place of -."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@contextlib.contextmanager
def running(vocabulary: Vocabulary = STRINGS, **settings: Any) -> Iterator[Running]:
    """Runs a server for a block; `settings` are those of `ServeConfig`."""
    server = Running(StandIn(), vocabulary, **settings)
    try:
        yield server
    finally:
        server.model.gate.set()
        server.stop()
        server.thread.join(30)
        assert not server.thread.is_alive()
