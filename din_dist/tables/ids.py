"""The ids in a batch of rows, one a row or a list a row, and the rules that they must keep.

Letters of shapes: R rows of a batch, V values in all of their lists. Rows are counted from 0 here, from 1 in messages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from din_dist.errors import InputError
from din_dist.tables import arrow_text, json_lines
from din_dist.tables.arrow_text import is_text, is_utf8
from din_dist.tables.formats import INTEGER, is_64_bits
from din_dist.text import parse_json, shown

_RowOf = Callable[[int], int]  # the row of a value, by the value's index


@dataclasses.dataclass(frozen=True)
class Field:
    """A column that holds ids: one a row, or a list a row."""

    name: str
    integers: bool  # otherwise strings
    is_list: bool = False


@dataclasses.dataclass(frozen=True)
class Ids:
    """The ids of a column in a batch.

    Attributes:
        values: int64 or string `[V]`, none missing.
        offsets: int64 `[R + 1]`, where each row's list begins; None if each row has one id.
    """

    values: pa.Array
    offsets: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """The number of ids of each row, int64 `[R]`."""
        return np.ones(len(self.values), np.int64) if self.offsets is None else np.diff(self.offsets)


class IdRules:
    """Checks the ids of one file, and brings them into the form of `Ids`.

    Args:
        path: the file, for the texts of errors.
        list_separator: what separates the ids of a list that is written as text. Empty: no list is written so.
        in_text: integers are written as text, and lists as JSON arrays, as in CSV.
    """

    def __init__(self, path: Path, list_separator: str = "", in_text: bool = False) -> None:
        self._path, self._separator, self._in_text = path, list_separator, in_text

    def check(self, column: pa.Array, field: Field, first_row: int) -> Ids:
        """Returns the ids of a column.

        Args:
            column: any type `[R]`, as the file has it.
            field: the ids that the column must hold.
            first_row: the row of the file at which the batch begins.

        Raises:
            InputError: an id is missing or of another type; the text names file and row.
        """
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if not field.is_list:
            return Ids(self._values(column, field, lambda index: first_row + index))
        if is_text(column.type):
            if not self._separator:
                return self._lists_in_text(column, field, first_row)
            self._require(column, field, lambda index: first_row + index)
            column = _split(column, self._separator)
        if pa.types.is_fixed_size_list(column.type) or pa.types.is_list_view(column.type):
            column = column.cast(pa.list_(column.type.value_type))
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise self.reject(first_row, f"{field.name} must be a list", f"{_shown(column, 0)} ({column.type})")
        self._require(column, field, lambda index: first_row + index)
        offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
        offsets -= offsets[0]

        def row(index: int) -> int:
            return first_row + int(np.searchsorted(offsets, index, side="right")) - 1

        return Ids(self._values(values, field, row), offsets)

    def _lists_in_text(self, column: pa.Array, field: Field, first_row: int) -> Ids:
        """Returns the ids of lists that are written as JSON arrays."""
        if not self._in_text:
            remedy = "Write lists, or give --list_separator."
            raise self.reject(first_row, f"{field.name} must be a list", f"{_shown(column, 0)}", remedy)
        self._require(column, field, lambda index: first_row + index)
        cells = pc.replace_substring_regex(column, r"[\r\n]", " ")
        value = pa.list_(pa.int64() if field.integers else pa.string())
        try:
            lists = json_lines.parse_lines(arrow_text.join('{"v":', cells, "}"), pa.schema({"v": value}))
        except pa.ArrowException:
            for row, cell in enumerate(column.to_pylist()):
                if problem := problem_of(_loaded(cell), field):
                    raise self.reject(
                        first_row + row,
                        f"{field.name} must be a JSON array of {'integers' if field.integers else 'strings'}",
                        problem if _loaded(cell) is not None else repr(cell[:100]),
                        "Correct the cell, or give --list_separator for lists like a;b;c.",
                    ) from None
            raise
        return self.check(lists.column("v").combine_chunks(), field, first_row)

    def _values(self, values: pa.Array, field: Field, row: _RowOf) -> pa.Array:
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        kind = values.type
        self._require(values, field, row)
        if not len(values):
            return pa.array([], pa.int64() if field.integers else pa.string())
        if field.integers and is_text(kind) and self._in_text:
            good = pc.match_substring_regex(values, INTEGER)
            if not pc.all(good).as_py():  # Arrow would take 0x10 for 16
                index = int(np.argmin(good.to_numpy(zero_copy_only=False)))
                raise self.other_type(row(index), field, _shown(values, index))
            return values.cast(pa.int64())
        if is_text(kind) and not is_utf8(values):
            index = next(index for index in range(len(values)) if not is_utf8(values.slice(index, 1)))
            raise self.reject(row(index), "text must be UTF-8", shown(values[index].as_buffer().to_pybytes()))
        if not (pa.types.is_integer(kind) if field.integers else is_text(kind)):
            raise self.other_type(row(0), field, f"{_shown(values, 0)} ({kind})")
        try:
            return values.cast(pa.int64() if field.integers else pa.string())
        except pa.ArrowInvalid:
            index = int(np.argmax(values.to_numpy(zero_copy_only=False) > 2**63 - 1))
            raise self.reject(row(index), "ids must fit 64 bits, signed", _shown(values, index)) from None

    def _require(self, values: pa.Array, field: Field, row: _RowOf) -> None:
        if values.null_count:
            index = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
            needed = f"its {field.name} without a missing id" if field.is_list else f"its {field.name}"
            empty = " A user without a history has an empty list." if field.is_list else ""
            remedy = f"Fill it in, or drop the row.{empty}"
            raise self.reject(row(index), f"every row needs {needed}", "none", remedy)

    def other_type(self, row: int, field: Field, received: str) -> InputError:
        """Returns the error for an id of another type than the field's."""
        kind = "integers" if field.integers else "strings"
        return self.reject(row, f"{field.name} must hold {kind}, as in the log of the model", received)

    def reject(
        self, row: int, rule: str, received: str, remedy: str = "Correct it, or convert the column."
    ) -> InputError:
        """Returns the error for a row that breaks a rule."""
        return InputError(f"{self._path}, row {row + 1}: {rule}. Received: {received}. {remedy}")


def problem_of(value: Any, field: Field) -> str:
    """Returns the part of a JSON value that a field cannot hold, as text, or "". A missing id is another rule's."""
    kind = int if field.integers else str
    if field.is_list and not isinstance(value, list):
        return repr(value)[:100]
    for part in value if field.is_list else [value]:
        fits = type(part) is kind and is_64_bits(part)
        if part is not None and not fits:
            return f"{part!r} ({type(part).__name__})"[:100]
    return ""


def _loaded(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _shown(values: pa.Array, index: int) -> str:
    value = repr(values[index].as_py()) if index < len(values) else "nothing"
    return value if len(value) < 100 else f"{value[:100]}..."


def _split(column: pa.Array, separator: str) -> pa.Array:
    """Splits text into lists; empty text is an empty list."""
    empty = pc.equal(column, "").to_numpy(zero_copy_only=False)
    lists = pc.split_pattern(column, separator)
    if not empty.any():
        return lists
    kept = np.ones(len(lists.values), bool)
    kept[lists.offsets.to_numpy()[:-1][empty]] = False
    counts = np.where(empty, 0, np.diff(lists.offsets.to_numpy()))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return pa.LargeListArray.from_arrays(offsets, lists.values.filter(pa.array(kept)))
