"""Answers: scores, whose bytes are counted until they are read, and errors in TensorFlow Serving's form."""

from __future__ import annotations

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

from din_dist.serving.http.body import Buffers

RETRY_SECONDS = "1"


def error(code: int, text: str) -> web.Response:
    """Returns an error in TensorFlow Serving's form, `{"error": text}`."""
    headers = {hdrs.RETRY_AFTER: RETRY_SECONDS} if code in (429, 503) else {}
    return web.json_response({"error": text}, status=code, headers=headers)


def busy() -> web.Response:
    """Returns the error for a request that finds the queue full (429)."""
    return error(429, "Too many requests wait already. Try again later.")


class Scores(web.Response):
    """An answer with scores. `buffers` counts its bytes until they are in the kernel's buffers or read.

    Args:
        body: JSON.
        buffers: counts the bytes.

    Raises:
        NoRoom: all answers together would be too large.
    """

    def __init__(self, body: bytes, buffers: Buffers) -> None:
        buffers.take(len(body))
        self._buffers, self._num_held = buffers, len(body)
        super().__init__(body=body, content_type="application/json")

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        try:
            return await super().prepare(request)
        except BaseException:
            self._release()
            raise

    async def write_eof(self, data: bytes = b"") -> None:
        try:
            await super().write_eof(data)
        finally:
            self._release()

    def _release(self) -> None:
        self._buffers.give(self._num_held)
        self._num_held = 0
