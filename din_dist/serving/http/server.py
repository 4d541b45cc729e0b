"""The HTTP server: TensorFlow Serving's REST API before a batcher, with bounds on everything a client can use up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import hdrs, web
from prometheus_client import exposition

from din_dist.errors import InputError
from din_dist.serving.http.batcher import Batcher, QueueFull
from din_dist.serving.http.metrics import ServingMetrics
from din_dist.serving.http.parse import (
    DEFAULT_SIGNATURE,
    RANK,
    SCORE,
    SCORE_PADDED,
    BadRequest,
    Vocabulary,
    answer,
    load,
    parse,
    signature_of,
)
from din_dist.serving.http.scoring import Scorer, score_together
from din_dist.serving.http.settings import ServeConfig

_RETRY_SECONDS = "1"
_GONE = 499  # as nginx has it: the client did not wait for its answer
_LINGER_SECONDS = 1.0  # for the rest of a body that was refused, so that the client reads why; and at the end
_QUIET_SECONDS = 0.2  # in which a client that was just answered sends its next request, if it has one
_TOO_MANY = json.dumps({"error": "Too many connections are open. Try again later."}).encode()
_DTYPES = {"string": "DT_STRING", "integer": "DT_INT64"}


@dataclasses.dataclass(frozen=True)
class Served:
    """A model and what clients may know of it."""

    scorer: Scorer
    vocabulary: Vocabulary
    version: int
    description: Mapping[str, Any]


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything that takes time; nobody can connect to it yet.

    Raises:
        InputError: the port is taken, or there is no such address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family[0], socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(family[4])
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InputError(
            f"--host, --port: must be an address and a free port of this machine. Received: {host} and {port}, "
            f"{error.strerror or error}. Choose others, or port 0 for any free one."
        ) from error
    return listener


def _accept_all(listener: socket.socket) -> list[socket.socket]:
    """Those that have connected so far: closing the listener would reset what is left."""
    accepted = []
    with contextlib.suppress(OSError):  # there are no more
        while True:
            accepted.append(listener.accept()[0])
    for one in accepted:
        one.setblocking(False)
    return accepted


class Server:
    """Serves one model until `stop` is called, then answers what it has taken on.

    Args:
        say: for what operators should read.
    """

    def __init__(
        self, config: ServeConfig, served: Served, metrics: ServingMetrics, say: Callable[[str], None]
    ) -> None:
        self._config, self._served, self._metrics, self._say = config, served, metrics, say
        self._stop = asyncio.Event()
        self._idle = asyncio.Event()  # no request is in progress
        self._idle.set()
        self._num_in_progress = self._num_accepted = 0
        metrics.in_progress.set_function(lambda: self._num_in_progress)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._batcher = Batcher(self._score, self._executor, config, metrics)

    def stop(self) -> None:
        self._stop.set()

    async def run(self, listener: socket.socket, when_ready: Callable[[], None]) -> bool:
        """Returns whether everything accepted was answered."""
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # clients' mistakes are no news of the server
        runner = web.AppRunner(
            self._app(),
            handler_cancellation=True,
            keepalive_timeout=self._config.client_timeout_seconds,
            lingering_time=_LINGER_SECONDS,
            shutdown_timeout=_LINGER_SECONDS,
            access_log=None,
        )
        await runner.setup()
        http = runner.server
        assert http is not None
        loop = asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            return _Door(http, self._config.max_connections, self._metrics.connections_refused.inc)

        batching = asyncio.create_task(self._batcher.run())
        stopping = asyncio.create_task(self._stop.wait())
        accepting = await loop.create_server(connection, sock=listener, backlog=self._config.max_connections)
        self._metrics.ready.set(1)
        when_ready()
        await asyncio.wait((batching, stopping), return_when=asyncio.FIRST_COMPLETED)
        self._stop.set()
        self._metrics.ready.set(0)
        pending = _accept_all(listener)
        accepting.close()
        for accepted in pending:
            with contextlib.suppress(OSError):  # it has gone again
                await loop.connect_accepted_socket(connection, accepted)
        answered = True
        try:
            async with asyncio.timeout(self._config.shutdown_timeout_seconds):
                await self._drained()
        except TimeoutError:
            answered = False
        await runner.cleanup()
        if batching.done():
            batching.result()  # raises what ended it, which nothing should
        batching.cancel()
        self._executor.shutdown(wait=answered, cancel_futures=True)
        return answered

    async def _drained(self) -> None:
        """Nothing is in progress, and kept connections have brought nothing more for a moment."""
        while True:
            await self._idle.wait()
            seen = self._num_accepted
            await asyncio.sleep(_QUIET_SECONDS)
            if self._idle.is_set() and seen == self._num_accepted:
                return

    def _score(self, instances: Any) -> list:
        return score_together(self._served.scorer, self._served.vocabulary, instances)

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=self._config.max_body_bytes, middlewares=[self._answer_in_json])
        model = f"/v1/models/{self._config.model_name}"
        versions = (model, f"{model}/versions/{self._served.version}")
        app.router.add_get("/healthz", self._healthy)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._show_metrics)
        for path in versions:
            app.router.add_get(path, self._status)
            app.router.add_get(f"{path}/metadata", self._metadata)
            app.router.add_post(f"{path}:predict", self._predict)
        return app

    @web.middleware
    async def _answer_in_json(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Every error as TensorFlow Serving has it: `{"error": ...}`."""
        try:
            response = await handler(request)
        except web.HTTPNotFound:
            response = _error(404, f"There is nothing at {request.path[:200]}. The model: {self._model_path}.")
        except web.HTTPMethodNotAllowed as error:
            response = _error(405, f"{request.path[:200]} takes {', '.join(sorted(error.allowed_methods))} only.")
            response.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
        except web.HTTPException as error:
            response = _error(error.status, error.reason)
        if self._stop.is_set():
            response.force_close()  # so that the client turns elsewhere
        return response

    @property
    def _model_path(self) -> str:
        return f"/v1/models/{self._config.model_name}"

    async def _healthy(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        if self._stop.is_set():
            return _error(503, "The server is ending.")
        return web.json_response({"status": "ready"})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        text, content_type = exposition.choose_encoder(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=text(self._metrics.registry), headers={hdrs.CONTENT_TYPE: content_type})

    async def _status(self, request: web.Request) -> web.Response:
        version = {
            "version": str(self._served.version),
            "state": "AVAILABLE",
            "status": {"error_code": "OK", "error_message": ""},
        }
        return web.json_response({"model_version_status": [version]})

    async def _metadata(self, request: web.Request) -> web.Response:
        """The signatures in columns, which are the exported model's own."""
        item = _DTYPES[self._served.vocabulary.item_id_type]
        inputs = {
            SCORE: {"history_item_ids": (item, 1), "history_lengths": ("DT_INT64", 1), "candidate_item_ids": (item, 1)},
            RANK: {"history_item_ids": (item, 1), "candidate_item_ids": (item, 1), "k": ("DT_INT64", 0)},
        }
        inputs[SCORE_PADDED] = inputs[SCORE] | {"history_item_ids": (item, 2)}
        inputs[DEFAULT_SIGNATURE] = inputs[SCORE]
        outputs = {"logits": ("DT_FLOAT", 1), "click_probability": ("DT_FLOAT", 1)}
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
                    "version": str(self._served.version),
                },
                "metadata": {"signature_def": {"signature_def": signatures}, "din_dist": self._served.description},
            }
        )

    async def _predict(self, request: web.Request) -> web.Response:
        """Counts and times a request, however it ends."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        seen = _Seen()
        code = _GONE
        try:
            response = await self._predicted(request, seen)
            code = response.status
            return response
        except web.HTTPException as error:
            code = error.status
            raise
        finally:
            self._metrics.after_request(seen.signature, code, loop.time() - started, seen.num_instances)

    async def _predicted(self, request: web.Request, seen: _Seen) -> web.Response:
        if (request.content_length or 0) > self._config.max_body_bytes:
            return self._too_large()
        if self._batcher.is_full:
            return _busy()
        try:
            async with asyncio.timeout(self._config.client_timeout_seconds):
                data = await request.read()
        except TimeoutError:
            response = _error(408, f"The body must come within {self._config.client_timeout_seconds:g} seconds.")
            response.force_close()
            return response
        except web.HTTPRequestEntityTooLarge:
            return self._too_large()
        except web.RequestPayloadError:
            return _error(400, "The body must be as its headers say: it is cut short, or not in its encoding.")
        with self._in_progress():
            return await self._scored(data, seen)

    async def _scored(self, data: bytes, seen: _Seen) -> web.Response:
        try:
            body = load(data)
            seen.signature = signature_of(body)
            predict = parse(body, self._served.vocabulary, self._config)
            seen.num_instances = len(predict.instances)
            async with asyncio.timeout(self._config.request_timeout_seconds):
                logits = await self._batcher.score(predict)
            text = json.dumps(answer(predict, logits), allow_nan=False)
            return web.Response(body=text.encode(), content_type="application/json")
        except BadRequest as error:
            return _error(400, str(error))
        except QueueFull:
            return _busy()
        except TimeoutError:
            return _error(503, f"No answer within {self._config.request_timeout_seconds:g} seconds. Try again later.")
        except Exception:
            self._say(f"a request failed: {traceback.format_exc()}")
            return _error(500, "The server failed at this request; its log says how.")

    def _too_large(self) -> web.Response:
        return _error(413, f"The body must have at most {self._config.max_body_bytes} bytes.")

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
class _Seen:
    """What was found out of a request."""

    signature: str = "none"
    num_instances: int = 0


class _Door(asyncio.Protocol):
    """Hands a connection to `http`, or says that there are too many and hangs up.

    Decided once it is made: of a crowd, all protocols are asked for before the first of them is connected.
    """

    def __init__(self, http: web.Server, most: int, refused: Callable[[], None]) -> None:
        self._http, self._most, self._refused = http, most, refused

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if len(self._http.connections) < self._most:
            handler = self._http()
            transport.set_protocol(handler)
            handler.connection_made(transport)
            return
        self._refused()
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: {_RETRY_SECONDS}"
        transport.write(f"{head}\r\nConnection: close\r\nContent-Length: {len(_TOO_MANY)}\r\n\r\n".encode() + _TOO_MANY)
        transport.close()


def _error(code: int, text: str) -> web.Response:
    headers = {hdrs.RETRY_AFTER: _RETRY_SECONDS} if code in (429, 503) else {}
    return web.json_response({"error": text}, status=code, headers=headers)


def _busy() -> web.Response:
    return _error(429, "Too many requests wait already. Try again later.")


def _tensor_info(dtype: str, rank: int) -> dict[str, Any]:
    shape = {"dim": [{"size": "-1", "name": ""}] * rank, "unknown_rank": False}
    return {"dtype": dtype, "tensor_shape": shape, "name": ""}
