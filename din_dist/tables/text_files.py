"""Files of text, compressed or not, read in blocks: no line and no header can fill the memory."""

from __future__ import annotations

import lzma
from collections.abc import Iterator

import pyarrow as pa

from din_dist.errors import InputError
from din_dist.tables.formats import compression_of
from din_dist.tables.storage import File, stream_of
from din_dist.text import shown

BYTES_PER_BATCH = 16 << 20  # before decoding
BLOCK_BYTES = 4 << 20
MOST_LINE_BYTES = 64 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def open_stream(file: File) -> pa.NativeFile:
    """Opens a file's content, decompressed and without a byte order mark.

    Raises:
        InputError: the text is UTF-16.
    """
    stream = _decompressed(file)
    head = stream.read(len(BYTE_ORDER_MARK))
    if head == BYTE_ORDER_MARK:
        return stream
    stream.close()
    if head.startswith(_UTF_16_MARKS) or b"\0" in head[:2]:
        raise InputError(f"{file}: text must be UTF-8. Received: UTF-16. Convert the file to UTF-8.")
    return _decompressed(file)


def _decompressed(file: File) -> pa.NativeFile:
    compression = compression_of(file)
    if compression == "xz":  # which Arrow does not know
        return pa.PythonFile(lzma.open(stream_of(file)), "r")
    return pa.input_stream(stream_of(file), compression=compression)


def blocks_of_lines(file: File) -> Iterator[bytes]:
    """Yields a file's content in blocks of some MiB that end with an end of line; a missing last one is added.

    Raises:
        ValueError: a line is longer than `MOST_LINE_BYTES`.
    """
    with open_stream(file) as stream:
        rest = stream.read(BLOCK_BYTES)
        while rest:
            head, found, tail = rest.rpartition(b"\n")
            if found:
                yield head + found
                rest = tail
            if len(rest) > MOST_LINE_BYTES:
                raise ValueError(f"a line of more than {MOST_LINE_BYTES >> 20} MiB")
            block = stream.read(BLOCK_BYTES)
            if not block:
                break
            rest += block
        if rest:
            yield rest + b"\n"


def not_utf8(place: str, text: bytes, error: UnicodeDecodeError) -> InputError:
    """Returns the error for text that is not UTF-8, with what stands around the first wrong byte."""
    received = shown(text[max(0, error.start - 20) : error.start + 20])
    return InputError(f"{place}: text must be UTF-8. Received: {received}. Convert the file to UTF-8.")
