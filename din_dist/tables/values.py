"""Values of a column in memory, one a row: ids, numbers, lists of ids or vectors, each of which may be missing.

Letters of shapes: n rows, K rows that are asked for, M values of all lists, D numbers of a vector.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np
import pyarrow as pa

from din_dist.text import shown

_AT_ONCE = 1 << 24  # numbers of vectors that are compared at once


class ColumnValues(abc.ABC):
    """The values of n rows."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @property
    @abc.abstractmethod
    def given(self) -> np.ndarray:
        """The rows that have a value, bool `[n]`."""

    @abc.abstractmethod
    def take(self, rows: np.ndarray) -> Self:
        """Returns the values of some rows, int64 `[K]`; -1 stands for a missing value."""

    @abc.abstractmethod
    def differ(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Returns which pairs of rows have different values, bool `[K]`.

        Args:
            left: int64 `[K]`, rows that have a value.
            right: likewise.
        """

    @abc.abstractmethod
    def shown(self, row: int) -> str:
        """Returns the value of a row for an error's text."""


@dataclasses.dataclass(frozen=True, eq=False)
class IdValues(ColumnValues):
    """Ids.

    Attributes:
        codes: int32 `[n]`, 1 + the index of each id; 0 where it is missing.
        ids: int64 or large_string, the ids.
    """

    codes: np.ndarray
    ids: pa.Array

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def given(self) -> np.ndarray:
        return self.codes > 0

    def take(self, rows: np.ndarray) -> IdValues:
        return IdValues(np.where(rows < 0, 0, _taken(self.codes, rows)).astype(np.int32), self.ids)

    def differ(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return self.codes[left] != self.codes[right]

    def shown(self, row: int) -> str:
        return shown(self.ids[int(self.codes[row]) - 1].as_py())


@dataclasses.dataclass(frozen=True, eq=False)
class NumberValues(ColumnValues):
    """Numbers, float32 `[n]`; NaN where they are missing."""

    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def given(self) -> np.ndarray:
        return ~np.isnan(self.numbers)

    def take(self, rows: np.ndarray) -> NumberValues:
        return NumberValues(np.where(rows < 0, np.nan, _taken(self.numbers, rows)).astype(np.float32))

    def differ(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return self.numbers[left] != self.numbers[right]

    def shown(self, row: int) -> str:
        return f"{self.numbers[row]:g}"


@dataclasses.dataclass(frozen=True, eq=False)
class ListValues(ColumnValues):
    """Lists of ids. A missing list is empty.

    Attributes:
        codes: int32 `[M]`, 1 + the index of each id.
        offsets: int64 `[n + 1]`, where each list begins.
        ids: int64 or large_string, the ids.
        weights: float32 `[M]`; None without.
    """

    codes: np.ndarray
    offsets: np.ndarray
    ids: pa.Array
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def given(self) -> np.ndarray:
        return np.diff(self.offsets) > 0

    def take(self, rows: np.ndarray) -> ListValues:
        places, offsets = places_of(self.offsets, rows)
        weights = None if self.weights is None else self.weights[places]
        return ListValues(self.codes[places], offsets, self.ids, weights)

    def differ(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        counts = np.diff(self.offsets)
        found = counts[left] != counts[right]
        alike = np.flatnonzero(~found)
        one, ends = places_of(self.offsets, left[alike])
        other, _ = places_of(self.offsets, right[alike])
        unequal = self.codes[one] != self.codes[other]
        if self.weights is not None:
            unequal |= self.weights[one] != self.weights[other]
        found[alike] = np.diff(np.concatenate([[0], np.cumsum(unequal)])[ends]) > 0
        return found

    def shown(self, row: int) -> str:
        places = slice(*self.offsets[row : row + 2])
        values = self.ids.take(pa.array(self.codes[places] - 1)).to_pylist()
        return shown(values if self.weights is None else list(zip(values, self.weights[places].tolist(), strict=True)))


@dataclasses.dataclass(frozen=True, eq=False)
class VectorValues(ColumnValues):
    """Vectors, float16 `[n, D]`; NaN where they are missing."""

    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def given(self) -> np.ndarray:
        if not self.vectors.shape[1]:
            return np.zeros(len(self), bool)
        return ~np.isnan(self.vectors[:, 0])

    def take(self, rows: np.ndarray) -> VectorValues:
        if not len(self):
            return VectorValues(np.full((len(rows), self.vectors.shape[1]), np.nan, np.float16))
        found = self.vectors[rows]
        found[rows < 0] = np.nan
        return VectorValues(found)

    def differ(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        step = max(1, _AT_ONCE // max(1, self.vectors.shape[1]))
        parts = [
            np.any(self.vectors[left[first : first + step]] != self.vectors[right[first : first + step]], axis=1)
            for first in range(0, len(left), step)
        ]
        return np.concatenate([np.zeros(0, bool), *parts])

    def shown(self, row: int) -> str:
        return shown(self.vectors[row].tolist())


def places_of(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the values of some rows' lists stand, int64, and the offsets of these lists, int64 `[K + 1]`.

    Args:
        offsets: int64 `[n + 1]`, where each list begins.
        rows: int64 `[K]`; -1 stands for an empty list.
    """
    known = np.maximum(rows, 0)
    if len(offsets) == 1:
        return np.zeros(0, np.int64), np.zeros(len(rows) + 1, np.int64)
    counts = np.where(rows < 0, 0, offsets[known + 1] - offsets[known])
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return np.arange(ends[-1]) + np.repeat(offsets[known] - ends[:-1], counts), ends


def _taken(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return array[rows] if len(array) else np.zeros(len(rows), array.dtype)


def joined(parts: Sequence[ColumnValues]) -> ColumnValues:
    """Returns the rows of all parts, of one column: those of the first part come first.

    Args:
        parts: at least one; their ids are the same.
    """
    first = parts[0]
    if isinstance(first, IdValues):
        return IdValues(np.concatenate([part.codes for part in parts]), first.ids)  # type: ignore[attr-defined]
    if isinstance(first, NumberValues):
        return NumberValues(np.concatenate([part.numbers for part in parts]))  # type: ignore[attr-defined]
    if isinstance(first, VectorValues):
        return VectorValues(np.concatenate([part.vectors for part in parts]))  # type: ignore[attr-defined]
    lists = [part for part in parts if isinstance(part, ListValues)]
    counts = np.concatenate([np.diff(part.offsets) for part in lists])
    weights = [part.weights for part in lists if part.weights is not None]
    return ListValues(
        np.concatenate([part.codes for part in lists]),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        lists[0].ids,
        np.concatenate(weights) if weights else None,
    )
