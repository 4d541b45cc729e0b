"""The HTTP server: TensorFlow Serving's REST API in front of a batcher, with limits on all that clients can use up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from din_dist.serving.asked import RECOMMEND
from din_dist.serving.given_behaviours import NAMES
from din_dist.serving.http.batcher import Batcher, QueueFull
from din_dist.serving.http.body import (
    Buffers,
    Holding,
    NoRoom,
    TooLarge,
    TooSlow,
    UnknownEncoding,
    encoding_of,
    received,
    unpacked,
)
from din_dist.serving.http.connections import Connection
from din_dist.serving.http.door import Door, json_errors
from din_dist.serving.http.metrics import ServingMetrics
from din_dist.serving.http.parse import (
    DEFAULT_SIGNATURE,
    HISTORY,
    RANK,
    SCORE,
    SCORE_PADDED,
    BadRequest,
    Predict,
    answer,
    load,
    most_parts,
    parse,
    parse_recommend,
    signature_of,
)
from din_dist.serving.http.probes import PATHS, Probes
from din_dist.serving.http.responses import Scores, busy, error
from din_dist.serving.http.served import Served
from din_dist.serving.http.settings import ServeConfig
from din_dist.text import shown

_HEALTH_CONNECTIONS = 32  # at the port for probes; silent ones are closed to make room
_HEALTH_SECONDS = 10.0  # most time for a client there
_GONE = 499  # nginx's code for a client that did not wait for its answer
_QUIET_SECONDS = 0.2  # a client that was just answered sends its next request, if any, within this time
_UNREAD_SECONDS = 1.0  # at shutdown, a client that reads nothing for this long is not waited for
_MOST_LOGGED = 300  # characters of an error in the log
_DTYPES = {"string": "DT_STRING", "integer": "DT_INT64"}


class Server:
    """Serves a model until `stop` is called, then answers the requests that it has accepted.

    Args:
        config: settings and limits.
        served: the model, until `replace` is called.
        metrics: to update.
        say: logs a line for operators.
    """

    def __init__(
        self, config: ServeConfig, served: Served, metrics: ServingMetrics, say: Callable[[str], None]
    ) -> None:
        self._config, self._metrics, self._say = config, metrics, say
        self._serve(served)
        self._stop = asyncio.Event()
        self._idle = asyncio.Event()  # no request is in progress
        self._idle.set()
        self._num_in_progress = self._num_accepted = 0
        self._buffers = Buffers(config.max_buffered_bytes)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._batcher = Batcher(self._executor, config, metrics)
        self._probes = Probes(metrics.registry, self._stop.is_set)
        self._main = self._door(self._app(), config.max_connections, config.client_timeout_seconds)
        self._health = self._door(
            self._health_app(), _HEALTH_CONNECTIONS, min(_HEALTH_SECONDS, config.client_timeout_seconds)
        )
        metrics.in_progress.set_function(lambda: self._num_in_progress)
        metrics.buffered_bytes.set_function(lambda: self._buffers.num_bytes)

    def stop(self) -> None:
        """Makes `run` answer what was accepted and return."""
        self._stop.set()

    def replace(self, served: Served) -> weakref.ref[Served]:
        """Serves another model to the requests that begin from now on.

        Returns:
            the model before, which is gone when its last request is answered.
        """
        former = weakref.ref(self._served)
        self._serve(served)
        return former

    def _serve(self, served: Served) -> None:
        self._served = served
        self._metrics.show_model(self._config.model_name, served.version, served.description["digest"])

    async def run(
        self,
        listener: socket.socket,
        when_ready: Callable[[], None],
        health_listener: socket.socket | None = None,
    ) -> bool:
        """Serves until `stop` is called, and returns true if every accepted request was answered.

        Args:
            listener: a bound socket.
            when_ready: called when clients can connect.
            health_listener: a port for probes and metrics only, which answers even if the first one is busy or full.
        """
        asyncio.get_running_loop().set_exception_handler(self._log_unexpected)
        batching = asyncio.create_task(self._batcher.run())
        stopping = asyncio.create_task(self._stop.wait())
        if health_listener:
            await self._health.open(health_listener)
        await self._main.open(listener)
        self._metrics.connections.set_function(lambda: len(self._main.connections))
        self._metrics.ready.set(1)
        when_ready()
        await asyncio.wait((batching, stopping), return_when=asyncio.FIRST_COMPLETED)
        self._stop.set()
        self._metrics.ready.set(0)
        self._main.stop_listening()
        answered = True
        try:
            async with asyncio.timeout(self._config.shutdown_timeout_seconds):
                await self._drained()
        except TimeoutError:
            answered = False
        await self._main.close()
        if health_listener:
            self._health.stop_listening()
            await self._health.close()
        if batching.done():
            batching.result()  # raises the error that ended it; it should not end by itself
        batching.cancel()
        self._executor.shutdown(wait=answered, cancel_futures=True)
        return answered

    def _log_unexpected(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Logs an error outside requests in the same way as a failed request."""
        failure = context.get("exception")
        self._say(_log_text(context["message"], failure) if failure else shown(context["message"]))

    async def _drained(self) -> None:
        """Waits until no request is in progress, open connections send no more, and answers are read."""
        loop = asyncio.get_running_loop()
        unsent, read_at = 0, loop.time()
        while True:
            await self._idle.wait()
            seen = self._num_accepted
            await asyncio.sleep(_QUIET_SECONDS)
            before, unsent = unsent, self._main.connections.num_unsent
            if unsent != before:
                read_at = loop.time()
            is_quiet = self._idle.is_set() and seen == self._num_accepted
            if is_quiet and (not unsent or loop.time() - read_at > _UNREAD_SECONDS):
                return

    def _door(self, app: web.Application, most: int, timeout: float) -> Door:
        return Door(app, most, timeout, self._metrics, self._say)

    def _health_app(self) -> web.Application:
        app = web.Application(middlewares=[json_errors(f"The paths: {PATHS}.", lambda: False)])
        self._probes.add_to(app)
        return app

    def _app(self) -> web.Application:
        model = f"/v1/models/{self._config.model_name}"
        app = web.Application(middlewares=[json_errors(f"The model: {model}.", self._stop.is_set)])
        self._probes.add_to(app)
        for path in (model, f"{model}/versions/{{version:[0-9]+}}"):
            app.router.add_get(path, self._status)
            app.router.add_get(f"{path}/metadata", self._metadata)
            app.router.add_post(f"{path}:predict", self._predict)
            app.router.add_post(f"{path}:recommend", self._recommend)
        return app

    def _asked(self, request: web.Request) -> Served:
        """Returns the model that is served, which must be the version that the path names, if it names one."""
        served = self._served
        if request.match_info.get("version", str(served.version)) != str(served.version):
            raise web.HTTPNotFound
        return served

    async def _status(self, request: web.Request) -> web.Response:
        version = {
            "version": str(self._asked(request).version),
            "state": "AVAILABLE",
            "status": {"error_code": "OK", "error_message": ""},
        }
        return web.json_response({"model_version_status": [version]})

    async def _metadata(self, request: web.Request) -> web.Response:
        """Answers with the signatures in column form, which are those of the exported model."""
        served = self._asked(request)
        item = _DTYPES[served.vocabulary.item_id_type]
        inputs = {
            SCORE: {"history_item_ids": (item, 1), "history_lengths": ("DT_INT64", 1), "candidate_item_ids": (item, 1)},
            RANK: {"history_item_ids": (item, 1), "candidate_item_ids": (item, 1), "k": ("DT_INT64", 0)},
        }
        named = {NAMES: ("DT_STRING", 1)} if served.vocabulary.histories else {}
        inputs = {name: given | named for name, given in inputs.items()}
        inputs[SCORE_PADDED] = inputs[SCORE] | {HISTORY: (item, 2)} | ({NAMES: ("DT_STRING", 2)} if named else {})
        inputs[DEFAULT_SIGNATURE] = inputs[SCORE]
        labels = served.predictions.labels
        outputs = {name: ("DT_FLOAT", 1) for label in labels for name in (label.logits, label.probability)}
        ranked = outputs | {"item_ids": (item, 1), "places": ("DT_INT64", 1)}
        signatures = {
            name: {
                "inputs": {key: _tensor_info(*kind) for key, kind in inputs[name].items()},
                "outputs": {key: _tensor_info(*kind) for key, kind in (ranked if name == RANK else outputs).items()},
                "method_name": "tensorflow/serving/predict",
            }
            for name in inputs
        }
        return web.json_response(
            {
                "model_spec": {
                    "name": self._config.model_name,
                    "signature_name": "",
                    "version": str(served.version),
                },
                "metadata": {"signature_def": {"signature_def": signatures}, "din_dist": served.description},
            }
        )

    async def _predict(self, request: web.Request) -> web.Response:
        return await self._answered(request, self._parse_predict)

    async def _recommend(self, request: web.Request) -> web.Response:
        return await self._answered(request, self._parse_recommend)

    async def _answered(self, request: web.Request, read: _Read) -> web.Response:
        """Answers a request, and counts and times it, however it ends."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        seen = _RequestFacts(self._asked(request))
        code = _GONE
        try:
            response = await self._predicted(request, seen, read)
            code = response.status
            return response
        finally:
            self._metrics.after_request(seen.signature, code, loop.time() - started, seen.num_instances)

    async def _predicted(self, request: web.Request, seen: _RequestFacts, read: _Read) -> web.Response:
        config = self._config
        try:
            return await self._scored(request, seen, read)
        except BadRequest as refusal:
            return error(400, str(refusal))
        except web.RequestPayloadError:
            return error(400, "The body must be as its headers say: it is cut short, or not in its encoding.")
        except TooSlow:
            response = error(408, f"The body must come within {config.client_timeout_seconds:g} seconds.")
            response.force_close()
            return response
        except TooLarge:
            return error(413, f"The body must have at most {config.max_body_bytes} bytes.")
        except UnknownEncoding:
            return error(415, "The body's Content-Encoding must be gzip or deflate.")
        except QueueFull:
            return busy()
        except NoRoom:
            return error(503, "The server holds as many bytes as it may. Try again later.")
        except TimeoutError:
            return error(503, f"No answer within {config.request_timeout_seconds:g} seconds. Try again later.")
        except Exception as failure:
            self._say(_log_text("a request failed", failure))
            return error(500, "The server failed at this request; its log says how.")

    async def _scored(self, request: web.Request, seen: _RequestFacts, read: _Read) -> web.Response:
        if self._batcher.is_full:
            raise QueueFull
        connection = request.protocol
        assert isinstance(connection, Connection)
        with Holding(self._buffers) as held:
            data = await received(request, self._config.max_body_bytes, self._config.client_timeout_seconds, held)
            connection.client_waits()
            predict = self._parse(data, encoding_of(request), seen, read)
            del data
        with self._in_progress():
            async with asyncio.timeout(self._config.request_timeout_seconds):
                logits = await self._batcher.score(predict, seen.served.score)
            text = json.dumps(answer(predict, logits, seen.served.predictions), allow_nan=False)
            return Scores(text.encode(), self._buffers)

    def _parse(self, data: bytes, encoding: str, seen: _RequestFacts, read: _Read) -> Predict:
        parts = most_parts(seen.served.vocabulary, self._config)
        body = load(unpacked(data, encoding, self._config.max_body_bytes), parts)
        predict = read(body, seen)
        seen.num_instances = len(predict.instances)
        return predict

    def _parse_predict(self, body: object, seen: _RequestFacts) -> Predict:
        seen.signature = signature_of(body)
        return parse(body, seen.served.vocabulary, self._config)

    def _parse_recommend(self, body: object, seen: _RequestFacts) -> Predict:
        seen.signature = RECOMMEND
        return parse_recommend(body, seen.served.vocabulary, self._config)

    @contextlib.contextmanager
    def _in_progress(self) -> Iterator[None]:
        self._num_in_progress += 1
        self._num_accepted += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_in_progress -= 1
            if not self._num_in_progress:
                self._idle.set()


@dataclasses.dataclass(slots=True)
class _RequestFacts:
    """The model that a request is answered with, and what metrics need, as far as it is known."""

    served: Served
    signature: str = "none"
    num_instances: int = 0


_Read = Callable[[object, _RequestFacts], Predict]  # reads a body, and notes what it is


def _log_text(what: str, failure: BaseException) -> str:
    """Returns the stack and the beginning of the message, which is escaped because it may quote a client."""
    stack = "".join(traceback.format_tb(failure.__traceback__))
    return f"{what}:\n{stack}{type(failure).__name__}: {shown(str(failure), _MOST_LOGGED)}"


def _tensor_info(dtype: str, rank: int) -> dict[str, Any]:
    shape = {"dim": [{"size": "-1", "name": ""}] * rank, "unknown_rank": False}
    return {"dtype": dtype, "tensor_shape": shape, "name": ""}
