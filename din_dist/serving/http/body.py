"""Receives and unpacks the bodies of requests, with limits on time, on the size of one and on the size of all."""

from __future__ import annotations

import asyncio
import zlib
from typing import Self

from aiohttp import StreamReader, hdrs, web

from din_dist.serving.http.parse import BadRequest

_GZIP, _ZLIB, _DEFLATE = 31, 15, -15  # zlib's `wbits`, which say which header the data has
_MOST_MEMBERS = 100  # members of one gzip body; each copies the bytes after it


class TooLarge(Exception):
    """A body has more bytes than allowed."""


class TooSlow(Exception):
    """A body did not arrive in time."""


class UnknownEncoding(Exception):
    """A body has an unsupported Content-Encoding."""


class NoRoom(Exception):
    """All requests together would hold more bytes than allowed."""


class Buffers:
    """Counts the bytes of arriving bodies and of unread answers over all connections."""

    def __init__(self, most: int) -> None:
        self.most, self.num_bytes = most, 0

    def take(self, count: int) -> None:
        """Counts `count` more bytes.

        Raises:
            NoRoom: there would be too many; nothing is counted.
        """
        if self.num_bytes + count > self.most:
            raise NoRoom
        self.num_bytes += count

    def give(self, count: int) -> None:
        """Counts `count` bytes less."""
        self.num_bytes -= count


class Holding:
    """The bytes of one body so far, which are released at the end of the block."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers, self._num_bytes = buffers, 0

    def take(self, count: int) -> None:
        """Counts `count` more bytes.

        Raises:
            NoRoom: there would be too many over all connections.
        """
        self._buffers.take(count)
        self._num_bytes += count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._buffers.give(self._num_bytes)


async def received(request: web.Request, most: int, seconds: float, held: Holding) -> bytes:
    """Returns the body as it was sent.

    Args:
        request: whose body is received.
        most: the most bytes.
        seconds: the most time.
        held: counts the bytes.

    Raises:
        TooLarge: the body has more than `most` bytes.
        NoRoom: all bodies together are too large.
        TooSlow: the body takes longer than `seconds`.
        aiohttp.web.RequestPayloadError: the body does not match its headers.
    """
    if (request.content_length or 0) > most:
        raise TooLarge
    if request.content.is_eof():  # most bodies are here at once
        return await _read(request.content, most, held)
    try:
        async with asyncio.timeout(seconds):
            return await _read(request.content, most, held)
    except TimeoutError:
        raise TooSlow from None


async def _read(content: StreamReader, most: int, held: Holding) -> bytes:
    data = bytearray()
    while not content.at_eof():
        if data:
            await asyncio.sleep(0)  # a body of many small chunks is read without waiting for any
        chunk = await content.readany()
        held.take(len(chunk))
        data += chunk
        if len(data) > most:
            raise TooLarge
    return bytes(data)


def unpacked(data: bytes, encoding: str, most: int) -> bytes:
    """Returns the decoded body.

    Args:
        data: the body as received.
        encoding: the value of `Content-Encoding`.
        most: the most bytes to decode.

    Raises:
        TooLarge: it has more than `most` bytes; decoding stops there.
        UnknownEncoding: the encoding is neither gzip nor deflate.
        BadRequest: the body is not in the encoding of its header.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnknownEncoding
    form = _GZIP
    if encoding == "deflate":  # the standard wants zlib's header, but some clients leave it out
        form = _ZLIB if data[:1] and data[0] & 0xF == 8 else _DEFLATE
    found = bytearray()
    for _ in range(_MOST_MEMBERS):
        unpack = zlib.decompressobj(form)
        try:
            found += unpack.decompress(data, most + 1 - len(found))
        except zlib.error:
            break
        if len(found) > most:
            raise TooLarge
        if not unpack.eof:
            break
        data = unpack.unused_data
        if not data:
            return bytes(found)
    raise BadRequest("The body must be as its headers say: it is cut short, or not in its encoding.")


def encoding_of(request: web.Request) -> str:
    """Returns the value of `Content-Encoding`, or an empty string."""
    return request.headers.get(hdrs.CONTENT_ENCODING, "")
