"""Bodies of requests as bytes: received within a time, unpacked, and bounded, each alone and all together."""

from __future__ import annotations

import asyncio
import zlib
from typing import Self

from aiohttp import StreamReader, hdrs, web

from din_dist.serving.http.parse import BadRequest

_GZIP, _ZLIB, _DEFLATE = 31, 15, -15  # as zlib has it: with which header, if any
_MOST_MEMBERS = 100  # of one gzip body: what follows a member is copied for it


class TooLarge(Exception):
    """A body has more bytes than one may have."""


class TooSlow(Exception):
    """A body did not come in time."""


class UnknownEncoding(Exception):
    """A body is packed in a way that is not known here."""


class NoRoom(Exception):
    """All requests together hold as many bytes as they may."""


class Buffers:
    """Counts the bytes of bodies that arrive and of answers that are not yet read, over all connections."""

    def __init__(self, most: int) -> None:
        self.most, self.num_bytes = most, 0

    def take(self, count: int) -> None:
        """Raises `NoRoom`, and takes nothing, where there would be too many."""
        if self.num_bytes + count > self.most:
            raise NoRoom
        self.num_bytes += count

    def give(self, count: int) -> None:
        """Takes note that `count` bytes are gone."""
        self.num_bytes -= count


class Holding:
    """The bytes of one body so far, which are given back at the end of the block."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers, self._num_bytes = buffers, 0

    def take(self, count: int) -> None:
        """Raises `NoRoom` as `Buffers` does."""
        self._buffers.take(count)
        self._num_bytes += count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._buffers.give(self._num_bytes)


async def received(request: web.Request, most: int, seconds: float, held: Holding) -> bytes:
    """Returns the body as it was sent, of at most `most` bytes.

    Raises:
        TooLarge, NoRoom: it is larger, or all bodies together are.
        TooSlow: it takes longer than `seconds`.
        aiohttp.web.RequestPayloadError: it is not as its headers say.
    """
    if (request.content_length or 0) > most:
        raise TooLarge
    if request.content.is_eof():  # all is here, as of most
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
    """Returns the body that a `Content-Encoding` stands for.

    Raises:
        TooLarge: it has more than `most` bytes; no more than that are ever made.
        UnknownEncoding: neither gzip nor deflate.
        BadRequest: it is not packed as the header says.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnknownEncoding
    form = _GZIP
    if encoding == "deflate":  # with zlib's header by the standard, without it by old habit
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
    """Returns the name in the header, or nothing."""
    return request.headers.get(hdrs.CONTENT_ENCODING, "")
