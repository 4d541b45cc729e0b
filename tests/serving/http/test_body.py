"""Bodies as bytes: packed and unpacked, bounded alone and all together."""

from __future__ import annotations

import gzip
import zlib

import pytest

from din_dist.serving.http.body import Buffers, Holding, NoRoom, TooLarge, UnknownEncoding, unpacked
from din_dist.serving.http.parse import BadRequest

TEXT = b'{"instances": []}' * 50


PACKED = gzip.compress(TEXT, mtime=0)  # the same bytes, and so the same names of tests, in every process


def deflated(data: bytes, form: int) -> bytes:
    packer = zlib.compressobj(wbits=form)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("", TEXT),
        ("identity", TEXT),
        ("gzip", PACKED),
        (" GZip ", PACKED),
        ("x-gzip", b"".join(gzip.compress(part, mtime=0) for part in (TEXT[:100], b"", TEXT[100:]))),
        ("deflate", zlib.compress(TEXT)),
        ("deflate", deflated(TEXT, -15)),
    ],
)
def test_what_is_packed_is_unpacked(encoding: str, data: bytes) -> None:
    assert unpacked(data, encoding, len(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("gzip", b""),
        ("gzip", TEXT),
        ("gzip", PACKED[:-1]),
        ("gzip", PACKED + b"more"),
        ("gzip", gzip.compress(b"", mtime=0) * 50_000),  # copying what follows each of them would take minutes
        ("deflate", TEXT),
        ("deflate", zlib.compress(TEXT)[:-5]),
    ],
)
def test_what_is_not_packed_as_it_says(encoding: str, data: bytes) -> None:
    with pytest.raises(BadRequest, match="must be as its headers say: it is cut short, or not in its encoding"):
        unpacked(data, encoding, 1 << 20)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "\x1b[31m"])
def test_other_encodings(encoding: str) -> None:
    with pytest.raises(UnknownEncoding):
        unpacked(TEXT, encoding, 1 << 20)


@pytest.mark.parametrize("most", [1, len(TEXT) - 1])
def test_no_more_is_unpacked_than_a_body_may_have(most: int) -> None:
    for encoding, data in (("gzip", PACKED), ("deflate", zlib.compress(TEXT))):
        with pytest.raises(TooLarge):
            unpacked(data, encoding, most)
    two = gzip.compress(TEXT[:400]) + gzip.compress(TEXT[400:])
    with pytest.raises(TooLarge):
        unpacked(two, "gzip", most)


def test_all_together_have_a_bound() -> None:
    buffers = Buffers(100)
    with Holding(buffers) as one, Holding(buffers) as other:
        one.take(60)
        with pytest.raises(NoRoom):
            other.take(41)
        other.take(40)
        assert buffers.num_bytes == 100
    assert buffers.num_bytes == 0
    with pytest.raises(NoRoom), Holding(buffers) as one:
        one.take(50)
        one.take(51)
    assert buffers.num_bytes == 0
