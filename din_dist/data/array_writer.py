"""Writes arrays that do not fit into memory, part by part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.lib.format

from din_dist.data.checksums import write_checksums
from din_dist.files import published_folder


class ArrayWriter:
    """Writes a .npy file of unknown length. Its header has room for the length, which is filled in at the end."""

    def __init__(self, path: Path, dtype: type) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        """Writes the next values."""
        values.astype(self._dtype, copy=False).tofile(self._file)
        self._length += len(values)

    def _write_header(self) -> None:
        fields = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        numpy.lib.format.write_array_header_1_0(self._file, fields)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()


class ArrayWriters:
    """Writes several arrays at once, each to FOLDER/NAME.npy, whose file begins with its first values.

    Args:
        folder: of the files.
        dtypes: name -> dtype of the array. Arrays without one are int64.
    """

    def __init__(self, folder: Path, dtypes: Mapping[str, type]) -> None:
        self._folder, self._dtypes = folder, dtypes
        self._files = contextlib.ExitStack()
        self._writers: dict[str, ArrayWriter] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Writes the next values of an array."""
        if name not in self._writers:
            writer = ArrayWriter(self._folder / f"{name}.npy", self._dtypes.get(name, np.int64))
            self._writers[name] = self._files.enter_context(writer)
        self._writers[name].append(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)


NextParts = Iterable[tuple[str, np.ndarray]]  # name and values of the next part of each array


def publish_arrays(folder: Path, dtypes: Mapping[str, type], parts: NextParts) -> None:
    """Publishes a folder with several arrays and their checksums.

    Args:
        folder: of the files.
        dtypes: as of `ArrayWriters`.
        parts: of the arrays.

    Raises:
        OSError: the folder cannot be written.
    """
    with published_folder(folder) as aside:
        with ArrayWriters(aside, dtypes) as arrays:
            for name, values in parts:
                arrays.append(name, values)
        write_checksums(aside)


def arrays_in_memory(dtypes: Mapping[str, type], parts: NextParts) -> dict[str, np.ndarray]:
    """Returns the arrays that `publish_arrays` writes, by name."""
    found: dict[str, list[np.ndarray]] = {}
    for name, values in parts:
        found.setdefault(name, []).append(values.astype(dtypes.get(name, np.int64), copy=False))
    return {name: np.concatenate(values) for name, values in found.items()}
