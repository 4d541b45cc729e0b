"""Rows of several columns in files, written and read part by part: for logs that do not fit into memory.

A column of arrays has one file. One of lists has a file of its values' codes, one of the lists' lengths, and one of
weights if it has them. Files hold the bare values. Letters of shapes: n rows, K rows that are asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.lib.format
import pyarrow as pa

from din_dist import progress
from din_dist.tables.values import ListValues

_VALUES_AT_ONCE = 1 << 20  # where a file is copied
_NO_IDS = pa.array([], pa.int64())  # of lists in files: their ids are kept elsewhere


@dataclasses.dataclass(frozen=True)
class Spool:
    """An array in a file.

    Attributes:
        path: the file; none counts as an empty array.
        dtype: of the values.
        width: how many values a row has; 0: one, and the array has one dimension.
    """

    path: Path
    dtype: np.dtype
    width: int = 0

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * (self.width or 1)

    def __len__(self) -> int:
        return self.path.stat().st_size // self._row_bytes if self.path.exists() and self._row_bytes else 0

    def append(self, values: np.ndarray) -> None:
        """Writes the next rows."""
        if len(values):
            with self.path.open("ab") as file:
                values.astype(self.dtype, copy=False).tofile(file)

    def write(self, first: int, values: np.ndarray) -> None:
        """Writes rows from `first` on. Rows before it that were never written are 0."""
        if len(values):
            with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                file.seek(first * self._row_bytes)
                values.astype(self.dtype, copy=False).tofile(file)

    def read(self, first: int, end: int) -> np.ndarray:
        """Returns the rows `first` to `end` - 1."""
        shape = (end - first, self.width) if self.width else (end - first,)
        if end == first:
            return np.zeros(shape, self.dtype)
        count = (end - first) * (self.width or 1)
        found = np.fromfile(self.path, self.dtype, count, offset=first * self._row_bytes)
        if len(found) < count:
            raise OSError(f"{self.path} ends early")
        return found.reshape(shape)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.read(*rows.indices(len(self))[:2])

    def save(self, path: Path) -> None:
        """Writes the array as a .npy file, as `numpy.save` does."""
        length = len(self)
        with path.open("wb") as file:
            _write_header(file, self.dtype, (length, self.width) if self.width else (length,))
            for first in range(0, length, _VALUES_AT_ONCE):
                progress.note()
                self.read(first, min(first + _VALUES_AT_ONCE, length)).tofile(file)


@dataclasses.dataclass(frozen=True)
class OffsetsSpool:
    """The beginnings of lists, int64 `[n + 1]`.

    Attributes:
        counts: the length of each list.
    """

    counts: Spool

    def save(self, path: Path) -> None:
        """Writes the offsets as a .npy file."""
        length, before = len(self.counts), 0
        with path.open("wb") as file:
            _write_header(file, np.dtype(np.int64), (length + 1,))
            np.zeros(1, np.int64).tofile(file)
            for first in range(0, length, _VALUES_AT_ONCE):
                progress.note()
                ends = before + np.cumsum(self.counts.read(first, min(first + _VALUES_AT_ONCE, length)))
                before = int(ends[-1])
                ends.tofile(file)


def save_array(path: Path, array: np.ndarray | Spool | OffsetsSpool) -> None:
    """Writes an array, in memory or in files, as a .npy file."""
    if isinstance(array, np.ndarray):
        np.save(path, array)
    else:
        array.save(path)


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    descr = numpy.lib.format.dtype_to_descr(dtype)
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    numpy.lib.format.write_array_header_1_0(file, fields)


@dataclasses.dataclass(frozen=True)
class RowType:
    """The arrays of a row.

    Attributes:
        arrays: name -> dtype, and the width as of `Spool`.
        lists: name -> whether the lists have weights.
    """

    arrays: Mapping[str, tuple[np.dtype, int]] = dataclasses.field(default_factory=dict)
    lists: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    def spools(self, folder: Path) -> dict[str, Spool]:
        """Returns the files of rows in a folder, by the name of the column; those of lists have an end after it."""
        found = {name: Spool(folder / name, np.dtype(dtype), width) for name, (dtype, width) in self.arrays.items()}
        for name, has_weights in self.lists.items():
            found[f"{name}-codes"] = Spool(folder / f"{name}-codes", np.dtype(np.int32))
            found[f"{name}-counts"] = Spool(folder / f"{name}-counts", np.dtype(np.int64))
            if has_weights:
                found[f"{name}-weights"] = Spool(folder / f"{name}-weights", np.dtype(np.float32))
        return found


@dataclasses.dataclass(frozen=True)
class RowPart:
    """Some rows in memory.

    Attributes:
        arrays: name -> values `[n]` or `[n, width]`.
        lists: name -> the lists of n rows.
    """

    arrays: Mapping[str, np.ndarray]
    lists: Mapping[str, ListValues] = dataclasses.field(default_factory=dict)

    def take(self, rows: np.ndarray) -> RowPart:
        """Returns some rows, int64 `[K]`."""
        return RowPart(
            {name: values[rows] for name, values in self.arrays.items()},
            {name: values.take(rows) for name, values in self.lists.items()},
        )

    def files(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the values for each of the spools of a `RowType`."""
        yield from self.arrays.items()
        for name, values in self.lists.items():
            yield f"{name}-codes", values.codes
            yield f"{name}-counts", np.diff(values.offsets)
            if values.weights is not None:
                yield f"{name}-weights", values.weights


class RowReader:
    """Reads the rows of a folder from the first to the last.

    Args:
        folder: of the files.
        kind: what a row has.
    """

    def __init__(self, folder: Path, kind: RowType) -> None:
        self._kind, self._spools = kind, kind.spools(folder)
        self._row = 0
        self._values = dict.fromkeys(kind.lists, 0)  # that were read of each column of lists

    def next(self, num_rows: int) -> RowPart:
        """Returns the next rows."""
        progress.note()
        rows = self._row, self._row + num_rows
        self._row = rows[1]
        arrays = {name: self._spools[name].read(*rows) for name in self._kind.arrays}
        return RowPart(arrays, {name: self._list(name, *rows) for name in self._kind.lists})

    def parts(self, num_rows: int, at_once: int) -> Iterator[tuple[slice, RowPart]]:
        """Yields the next `num_rows` rows, at most `at_once` at a time, and where they stand among these."""
        for first in range(0, num_rows, at_once):
            end = min(first + at_once, num_rows)
            yield slice(first, end), self.next(end - first)

    def _list(self, name: str, first: int, end: int) -> ListValues:
        counts = self._spools[f"{name}-counts"].read(first, end)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        values = self._values[name], self._values[name] + int(offsets[-1])
        self._values[name] = values[1]
        weights = self._spools.get(f"{name}-weights")
        codes = self._spools[f"{name}-codes"].read(*values)
        return ListValues(codes, offsets, _NO_IDS, weights.read(*values) if weights else None)


class RowWriter:
    """Writes rows to a folder one after the other; arguments as of `RowReader`."""

    def __init__(self, folder: Path, kind: RowType) -> None:
        self._spools = kind.spools(folder)

    def append(self, part: RowPart) -> None:
        """Writes the next rows."""
        for name, values in part.files():
            self._spools[name].append(values)


class RegionWriter:
    """Writes rows to several regions of the same files, of which each is filled from its begin on.

    Args:
        folder: of the files.
        kind: what a row has.
        num_rows: int64, the number of rows of each region.
        num_values: of each column of lists, the number of values of each region, int64.
    """

    def __init__(self, folder: Path, kind: RowType, num_rows: np.ndarray, num_values: Mapping[str, np.ndarray]) -> None:
        self._spools = kind.spools(folder)
        begins = np.cumsum(num_rows) - num_rows
        self._next = {name: begins.copy() for name in self._spools}
        for name, counts in num_values.items():
            for end in ("codes", "weights"):
                if f"{name}-{end}" in self._spools:
                    self._next[f"{name}-{end}"] = np.cumsum(counts) - counts

    def add(self, regions: np.ndarray, part: RowPart) -> None:
        """Writes rows, each to its region, int64 `[n]`. Rows of one region keep their order."""
        order = np.argsort(regions, kind="stable")
        present, starts = np.unique(regions[order], return_index=True)
        ends = [*starts[1:], len(order)]
        for region, first, end in zip(present.tolist(), starts.tolist(), ends, strict=True):
            for name, values in part.take(order[first:end]).files():
                self._spools[name].write(int(self._next[name][region]), values)
                self._next[name][region] += len(values)
