"""The arrays of a checkpoint: a variable is one file, or one file for each shard of its rows.

The manifest's entry of a variable is `{"file", "digest"}`, or `{"num_rows", "shards": [{"file", "digest"}, ...]}`, in
the order of the ranks that held the shards. Rows are read in blocks, so that a reader holds only those that it wants.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.lib.format

from din_dist import progress
from din_dist.distributed.placement import RowShard
from din_dist.files import open_regular, write_in_parts

_FILE_NAME = re.compile(r"[^/\0]+\.npy")
BLOCK_BYTES = 16 << 20


def is_entry(entry: Any) -> bool:
    """Tells whether a part of a manifest is the entry of a variable."""
    if not isinstance(entry, dict):
        return False
    if "shards" not in entry:
        return _is_file(entry)
    shards, num_rows = entry["shards"], entry.get("num_rows")
    return isinstance(shards, list) and bool(shards) and all(map(_is_file, shards)) and type(num_rows) is int


def _is_file(entry: Any) -> bool:
    name, digest = (entry.get("file"), entry.get("digest")) if isinstance(entry, dict) else (None, None)
    return isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None and isinstance(digest, str)


def first_file(folder: Path, entry: Mapping[str, Any]) -> Path:
    """Returns the path that stands for a variable in messages."""
    return folder / entry.get("shards", [entry])[0]["file"]


def write_array(path: Path, values: np.ndarray) -> dict[str, str]:
    """Writes what `np.save` writes, which would hide why it could not; returns the manifest's entry.

    Raises:
        OSError: it could not be written.
    """
    values = np.ascontiguousarray(values).reshape(values.shape)
    with path.open("wb") as file:
        numpy.lib.format.write_array_header_1_0(file, numpy.lib.format.header_data_from_array_1_0(values))
        write_in_parts(file, values)
    with path.open("rb") as file:
        return {"file": path.name, "digest": digest_of(file)}


def read_variable(
    folder: Path,
    entry: Mapping[str, Any],
    shape: tuple[int, ...] | None = None,
    dtype: np.dtype | None = None,
    shard: RowShard | None = None,
) -> np.ndarray:
    """Returns a variable, or the rows of `shard` of it, whatever its files hold.

    Args:
        folder: of the checkpoint.
        entry: of the manifest.
        shape: of the whole variable. None: as it was saved.
        dtype: None: as it was saved.
        shard: the rows that are wanted, of a table of `shape`. Each rank compares the digests of some files only, so
            all ranks must agree that they have read what was saved. None: all rows.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file holds something else than was saved.
    """
    if "shards" not in entry and shard is None:
        return _read_array(folder / entry["file"], entry["digest"], shape, dtype)
    files = entry.get("shards", [entry])
    if shape is None or dtype is None:
        dtype, (_, *row_shape) = _head_of(folder / files[0]["file"])
        shape = (entry["num_rows"], *row_shape)
    if entry.get("num_rows", shape[0]) != shape[0]:
        raise ValueError(f"a table of {entry['num_rows']} rows for one of {shape[0]}")
    wanted = shard or RowShard(shape[0], 0, 1)
    found = np.empty((wanted.size, *shape[1:]), dtype)
    for place, file in enumerate(files):
        held = RowShard(shape[0], place, len(files))
        digest = file["digest"] if wanted.owner(place) == wanted.rank else None
        _read_rows(folder / file["file"], digest, held, wanted, found)
    return found


def _read_rows(path: Path, digest: str | None, held: RowShard, wanted: RowShard, found: np.ndarray) -> None:
    """Puts the rows of `wanted` that the file of `held` has into `found`; compares the digest unless it is None."""
    with open_regular(path) as file:
        if digest is not None and digest_of(file) != digest:
            raise ValueError("its content changed")
        _check_head(_read_head(file), (held.size, *found.shape[1:]), found.dtype)
        row_bytes = found.dtype.itemsize * int(np.prod(found.shape[1:]))
        at_once = max(1, BLOCK_BYTES // max(1, row_bytes))
        for begin in range(0, held.size, at_once):
            count = min(at_once, held.size - begin)
            values = np.frombuffer(file.read(count * row_bytes), found.dtype).reshape(count, *found.shape[1:])
            rows = held.row(np.arange(begin, begin + count))
            own = wanted.owner(rows) == wanted.rank
            found[wanted.local(rows[own])] = values[own]
            progress.note()


def _head_of(path: Path) -> tuple[np.dtype, tuple[int, ...]]:
    with open_regular(path) as file:
        shape, _, dtype = _read_head(file)
    if not shape:
        raise ValueError("a number for a table")
    return dtype, shape


def _read_array(path: Path, digest: str, shape: tuple[int, ...] | None, dtype: np.dtype | None) -> np.ndarray:
    """Returns the array in `path`, which must have this digest, and this shape and type if they are given."""
    with open_regular(path) as file:
        if digest_of(file) != digest:
            raise ValueError("its content changed")
        found = _read_head(file)
        if shape is not None:  # before memory is taken for it
            _check_head(found, shape, np.dtype(dtype))
        file.seek(0)
        return numpy.lib.format.read_array(file, allow_pickle=False)


def _read_head(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    file.seek(0)
    if numpy.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another format of arrays")
    try:
        return numpy.lib.format.read_array_header_1_0(file)
    except Exception as error:  # NumPy reads it with Python's own parser, whose errors are of many kinds
        raise ValueError("the head of its array cannot be read") from error


def _check_head(found: tuple[tuple[int, ...], bool, np.dtype], shape: tuple[int, ...], dtype: np.dtype) -> None:
    if found != (shape, False, dtype):
        raise ValueError(f"an array of {found[2]}{list(found[0])} for {dtype}{list(shape)}")


def digest_of(file: BinaryIO) -> str:
    """Returns the digest of a whole file, 32 hexadecimal digits."""
    return hashlib.file_digest(file, "blake2b").hexdigest()[:32]  # type: ignore[arg-type]
