"""Columns of declared features, which are read batch by batch: ids, numbers, lists of ids and vectors.

They accept what files hold: numbers and lists as such, and as text. A value may be missing. Letters of shapes: n rows
of a batch, M values of all their lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from din_dist.errors import InputError
from din_dist.features.spec import Kind
from din_dist.tables import arrow_text, json_lines
from din_dist.tables.arrow_text import is_text, without_empty
from din_dist.tables.columns import Column, IdColumn, Rows, is_all_nan, plain, shown_value
from din_dist.tables.values import IdValues, ListValues, NumberValues, VectorValues
from din_dist.text import parse_json

_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_NOT_FINITE = r"^[+-]?(inf|infinity)$"
_MISSING_WORDS = r"^[+-]?nan$"
_LARGEST_FLOAT32, _LARGEST_FLOAT16 = 3.4028234663852886e38, 65504.0
_MOST_IDS = 2**31 - 2


class CategoryColumn(Column):
    """Ids, strings or integers, one a row."""

    def __init__(self, name: str, rows: Rows) -> None:
        super().__init__(name, rows)
        self._ids = IdColumn(name, rows, nullable=True)

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        column = plain(column)
        if is_list(column.type):
            rule = 'kind = "category" takes one id a row'
            raise self.reject(pc.is_valid(column), column, rule, 'Write kind = "categories".')
        if pa.types.is_boolean(column.type) or (pa.types.is_floating(column.type) and not is_all_nan(column)):
            rule = f"ids must be strings or integers, not {column.type}"
            raise self.reject(pc.is_valid(column), column, rule, 'Convert the column, or write kind = "number".')
        self._ids.add(column, from_folder)

    def finish(self, from_text: bool) -> IdValues:
        """Returns the values; see `IdColumn.finish`."""
        codes, ids = _finish_ids(self._ids, from_text, self.name)
        return IdValues(codes + np.int32(1), ids)

    def drain(self, at_end: bool) -> dict[str, np.ndarray]:
        return _drained_ids(self._ids, at_end, self.name)

    def drained_ids(self, from_text: bool) -> pa.Array:
        """Returns the ids of all rows that were drained; see `IdColumn.finish`."""
        return _checked_ids(self._ids, from_text, self.name)


class NumberColumn(Column):
    """Numbers of any type, one a row; NaN and no value are missing."""

    def __init__(self, name: str, rows: Rows) -> None:
        super().__init__(name, rows)
        self._chunks: list[np.ndarray] = []

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        column = plain(column)
        if is_list(column.type):
            rule = 'kind = "number" takes one number a row'
            remedy = 'Write kind = "vector", or kind = "categories" for ids.'
            raise self.reject(pc.is_valid(column), column, rule, remedy)
        numbers = to_floats(self, column, lambda index: index)
        found = numbers.to_numpy(zero_copy_only=False)
        self._require_range(found, column)
        self._chunks.append(found.astype(np.float32))

    def finish(self, from_text: bool) -> NumberValues:
        """Returns the values; that numbers are read from text makes no difference."""
        found = NumberValues(np.concatenate([np.zeros(0, np.float32), *self._chunks]))
        self._chunks.clear()
        return found

    def drain(self, at_end: bool) -> dict[str, np.ndarray]:
        return {"numbers": self.finish(from_text=False).numbers}

    def _require_range(self, numbers: np.ndarray, column: pa.Array) -> None:
        wrong = np.abs(numbers) > _LARGEST_FLOAT32  # false for NaN
        if wrong.any():
            rule = "numbers must be finite and fit float32"
            raise self.reject(pa.array(wrong), column, rule, "Correct the row, or leave the cell empty.")


class WeightColumn(NumberColumn):
    """Weights of events: a number of at least 0 in every row."""

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        rule, remedy = f"every {self._rows.what} needs a weight, one number of at least 0", "Correct the row."
        if is_list(column.type):
            raise self.reject(pc.is_valid(column), column, rule, remedy)
        super().add(column, from_folder)
        wrong = ~(self._chunks[-1] >= 0)  # true for NaN, which stands for a missing one
        if wrong.any():
            raise self.reject(pa.array(wrong), plain(column), rule, remedy)


class Flat(NamedTuple):
    """Lists of a batch: the values of all, and the number of each row's, int64 `[n]`; 0 for a missing list."""

    values: pa.Array
    counts: np.ndarray
    missing: np.ndarray  # bool [n]

    def row_of(self, index: int) -> int:
        """Returns the row of a value."""
        return int(np.searchsorted(np.cumsum(self.counts), index, side="right"))


class ListColumn(Column):
    """Lists of ids, and their weights if a second column holds them.

    Args:
        name: the column's name.
        rows: where rows stand, for the texts of errors.
        separator: what separates the ids of a list that is written as text; empty: it is a JSON array.
        weights: the column of the weights; empty for none.
    """

    def __init__(self, name: str, rows: Rows, separator: str = "", weights: str = "") -> None:
        super().__init__(name, rows)
        self._separator = separator
        self._value_rows = ValueRows(rows)
        self._ids = IdColumn(name, self._value_rows, nullable=True)
        self._counts: list[np.ndarray] = []
        self._weight_column = _Floats(weights, rows, separator) if weights else None
        self._weights: list[np.ndarray] = []

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        self.add_weighted(column, None)

    def add_weighted(self, column: pa.Array, weights: pa.Array | None) -> None:
        """Takes the next batch of the column, and of the one with the weights.

        Raises:
            InputError: a value breaks a rule.
        """
        column = plain(column)
        flat = lists_of(self, column, self._separator, [pa.int64(), pa.string()], 'Write kind = "category"')
        kept = pc.is_valid(flat.values)
        if is_text(flat.values.type):
            kept = pc.and_(kept, pc.not_equal(pc.binary_length(flat.values), 0)).fill_null(False)
        keep = kept.to_numpy(zero_copy_only=False)
        if self._weight_column is not None and weights is not None:
            self._weights.append(self._weights_of(flat, column, weights)[keep])
        row_of_value = np.repeat(np.arange(len(flat.counts)), flat.counts)[keep]
        self._counts.append(np.bincount(row_of_value, minlength=len(flat.counts)).astype(np.int64))
        self._value_rows.begin_batch(row_of_value)
        self._ids.add(flat.values.filter(kept))
        self._value_rows.advance(int(keep.sum()))

    def finish(self, from_text: bool) -> ListValues:
        """Returns the values. Ids become integers if they are split from text and each is written as one.

        Args:
            from_text: makes no difference, because JSON arrays tell integers from text.
        """
        codes, ids = _finish_ids(self._ids, bool(self._separator), self.name)
        offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *self._counts]))])
        weights = None
        if self._weight_column is not None:
            weights = np.concatenate([np.zeros(0, np.float32), *self._weights])
        return ListValues(codes + np.int32(1), offsets.astype(np.int64), ids, weights)

    def drain(self, at_end: bool) -> dict[str, np.ndarray]:
        """Returns the codes and the weights of values, and the number of each list's values, int64."""
        found = {"counts": np.concatenate([np.zeros(0, np.int64), *self._counts])}
        if self._weight_column is not None:
            found["weights"] = np.concatenate([np.zeros(0, np.float32), *self._weights])
        self._counts.clear()
        self._weights.clear()
        return found | _drained_ids(self._ids, at_end, self.name)

    def drained_ids(self, from_text: bool) -> pa.Array:
        """Returns the ids of all lists that were drained; see `finish`."""
        return _checked_ids(self._ids, bool(self._separator), self.name)

    def _weights_of(self, flat: Flat, column: pa.Array, weights: pa.Array) -> np.ndarray:
        """Returns the weight of each value, float32 `[M]`."""
        assert self._weight_column is not None
        found, numbers = self._weight_column.read(weights, _LARGEST_FLOAT32)
        wrong = found.counts != flat.counts
        if wrong.any():
            index = int(np.argmax(wrong))
            raise self._rows.reject(
                self._rows.count + index,
                f"{self._weight_column.name} must have one weight for each of {self.name}",
                f"{found.counts[index]} weights and {flat.counts[index]} values",
                "Correct the row.",
            )
        return numbers.astype(np.float32)


class VectorColumn(Column):
    """Lists of numbers, all of one length.

    Args:
        name: the column's name.
        rows: where rows stand, for the texts of errors.
        separator: what separates the numbers of a vector that is written as text; empty: it is a JSON array.
    """

    def __init__(self, name: str, rows: Rows, separator: str = "") -> None:
        super().__init__(name, rows)
        self._floats = _Floats(name, rows, separator)
        self._dimension = 0
        self._chunks: list[np.ndarray | int] = []  # a number counts rows without a vector

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        flat, numbers = self._floats.read(column, _LARGEST_FLOAT16)
        given = np.flatnonzero(~flat.missing)
        if not len(given):
            self._chunks.append(len(flat.counts))
            return
        self._dimension = self._dimension or int(flat.counts[given[0]])
        wrong = given[flat.counts[given] != self._dimension]
        if len(wrong) or not self._dimension:
            row = int(wrong[0] if len(wrong) else given[0])
            raise self._rows.reject(
                self._rows.count + row,
                "all vectors must have one length" + (f", {self._dimension} so far" if self._dimension else ", not 0"),
                f"{self.name} with {flat.counts[row]} numbers",
                "Correct the row, or leave the cell empty.",
            )
        vectors = np.full((len(flat.counts), self._dimension), np.nan, np.float16)
        vectors[given] = numbers.reshape(-1, self._dimension)
        self._chunks.append(vectors)

    def finish(self, from_text: bool) -> VectorValues:
        """Returns the values; that numbers are read from text makes no difference."""
        parts = [
            np.full((chunk, self._dimension), np.nan, np.float16) if isinstance(chunk, int) else chunk
            for chunk in self._chunks
        ]
        self._chunks.clear()
        return VectorValues(np.concatenate([np.zeros((0, self._dimension), np.float16), *parts]))

    def drain(self, at_end: bool) -> dict[str, np.ndarray]:
        """Returns the vectors, as soon as their length is known."""
        return {"vectors": self.finish(from_text=False).vectors} if at_end or self._dimension else {}


ValueColumn = CategoryColumn | NumberColumn | ListColumn | VectorColumn


def value_column(kind: Kind, name: str, rows: Rows, separator: str, weights: str) -> ValueColumn:
    """Returns the reader of a feature's column.

    Args:
        kind: of the values, other than times.
        name: of the column.
        rows: where rows stand, for the texts of errors.
        separator: separates the values of a list or vector that is written as text.
        weights: the column of the weights of lists.
    """
    match kind:
        case Kind.CATEGORY:
            return CategoryColumn(name, rows)
        case Kind.NUMBER:
            return NumberColumn(name, rows)
        case Kind.CATEGORIES:
            return ListColumn(name, rows, separator, weights)
        case _:
            return VectorColumn(name, rows, separator)


class _Floats(Column):
    """Lists of numbers, of which none is missing."""

    def __init__(self, name: str, rows: Rows, separator: str) -> None:
        super().__init__(name, rows)
        self._separator = separator

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        raise NotImplementedError

    def drain(self, at_end: bool) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def read(self, column: pa.Array, largest: float) -> tuple[Flat, np.ndarray]:
        """Returns the lists of a batch, and their numbers, float64 `[M]`, none of which is larger than `largest`."""
        column = plain(column)
        flat = lists_of(self, column, self._separator, [pa.float64()], 'Write kind = "number"')
        values = to_floats(self, plain(flat.values), flat.row_of)
        numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
        wrong = ~(np.abs(numbers) <= largest)
        if wrong.any():
            index = int(np.argmax(wrong))
            raise self._rows.reject(
                self._rows.count + flat.row_of(index),
                f"{self.name} must hold numbers up to {largest:g}, none of them missing, NaN or infinite",
                shown_value(flat.values[index]),
                "Correct the row, or leave the whole cell empty.",
            )
        return flat, numbers


class ValueRows(Rows):
    """Places of values: a value that breaks a rule stands in the row of its list."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows.what)
        self._of_file = rows
        self._row_of_value = np.zeros(0, np.int64)

    def begin_batch(self, row_of_value: np.ndarray) -> None:
        """Takes the row of each value of the next batch, counted from the batch's first row."""
        self._row_of_value = row_of_value

    def reject(self, row: int, rule: str, received: str, remedy: str) -> InputError:
        row_in_batch = int(self._row_of_value[row - self.count])
        return self._of_file.reject(self._of_file.count + row_in_batch, rule, received, remedy)


def is_list(kind: pa.DataType) -> bool:
    """Tells whether a type is one of Arrow's types of lists."""
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def lists_of(column: Column, values: pa.Array, separator: str, kinds: list[pa.DataType], remedy: str) -> Flat:
    """Returns the lists of a batch.

    Args:
        column: refuses a row.
        values: any type `[n]`, without a dictionary.
        separator: what separates the values of a list that is written as text; empty: it is a JSON array.
        kinds: the types that the values of a JSON array may have, in the order in which they are tried.
        remedy: what to write where the column holds no lists.

    Raises:
        InputError: a row holds no list.
    """
    if is_text(values.type):
        column.require_utf8(values)
        values = without_empty(values)
        values = pc.split_pattern(values, separator) if separator else _parsed(column, values, kinds, remedy)
    elif pa.types.is_null(values.type):
        values = values.cast(pa.list_(kinds[-1]))
    if not is_list(values.type):
        rule = f"{column.name} must hold lists, not {values.type}"
        raise column.reject(pc.is_valid(values), values, rule, f"{remedy}, or lists.")
    if not pa.types.is_large_list(values.type):
        values = values.cast(pa.large_list(values.type.value_type))
    counts = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return Flat(plain(values.flatten()), counts, values.is_null().to_numpy(zero_copy_only=False))


def _parsed(column: Column, cells: pa.Array, kinds: list[pa.DataType], remedy: str) -> pa.Array:
    """Returns the lists of JSON arrays in text."""
    text = pc.replace_substring_regex(cells.fill_null("null"), r"[\r\n]", " ")
    for kind in kinds:
        try:
            found = json_lines.parse_lines(arrow_text.join('{"v":', text, "}"), pa.schema({"v": pa.list_(kind)}))
            return found.column("v").combine_chunks()
        except pa.ArrowException:
            continue
    words = "numbers" if kinds == [pa.float64()] else "strings or of integers"
    wrong = [cell is not None and not _is_array(cell, words) for cell in cells.to_pylist()]
    if not any(wrong):
        wrong = [cell is not None for cell in cells.to_pylist()]
        rule = f"the JSON arrays of {column.name} must all be of one type"
    else:
        rule = f"{column.name} must be a JSON array of {words}"
    hint = f'Correct the cell, give separator = ";" for a;b;c, or {remedy[0].lower()}{remedy[1:]}.'
    raise column.reject(pa.array(wrong), cells, rule, hint)


def _is_array(cell: str, words: str) -> bool:
    try:
        found = parse_json(cell)
    except ValueError:
        return False
    if found is None:
        return True
    if not isinstance(found, list):
        return False
    types = {type(value) for value in found if value is not None}
    return types <= {int, float} if words == "numbers" else types in (set(), {int}, {str})


def to_floats(column: Column, values: pa.Array, row_of: Callable[[int], int]) -> pa.Array:
    """Returns numbers of any type as float64; those that are missing as NaN.

    Args:
        column: refuses a row.
        values: numbers, or text that writes them.
        row_of: the row of each value, counted from the batch's first row.

    Raises:
        InputError: a value is no number.
    """
    kind = values.type
    if is_text(kind):
        trimmed = pc.utf8_trim_whitespace(values) if arrow_text.is_utf8(values) else values
        lower = pc.ascii_lower(trimmed)
        missing = pc.or_(pc.equal(pc.binary_length(trimmed), 0), pc.match_substring_regex(lower, _MISSING_WORDS))
        trimmed = pc.if_else(missing, pa.scalar(None, kind), trimmed)
        good = pc.or_(pc.match_substring_regex(trimmed, _NUMBER), pc.match_substring_regex(lower, _NOT_FINITE))
        wrong = pc.invert(good.fill_null(True)).to_numpy(zero_copy_only=False)
        if wrong.any():
            raise _no_number(column, values, int(np.argmax(wrong)), row_of)
        return pc.replace_substring(trimmed, "+", "").cast(pa.float64()).fill_null(math.nan)
    known = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if pa.types.is_null(kind) or pa.types.is_boolean(kind):
        return values.cast(pa.uint8()).cast(pa.float64()).fill_null(math.nan)
    if not known:
        index = int(np.argmax(values.is_valid().to_numpy(zero_copy_only=False)))
        raise _no_number(column, values, index, row_of)
    return values.cast(pa.float64(), safe=False).fill_null(math.nan)


def _no_number(column: Column, values: pa.Array, index: int, row_of: Callable[[int], int]) -> InputError:
    text = is_text(values.type)
    rule = f"{column.name} must hold numbers" if text else f"{column.name} must hold numbers, not {values.type}"
    remedy = 'Correct the row, or write kind = "category".'
    return column.reject_value(row_of(index), values[index], rule, remedy)


def _finish_ids(column: IdColumn, from_text: bool, name: str) -> tuple[np.ndarray, pa.Array]:
    try:
        codes, ids = column.finish(from_text)
    except (pa.ArrowException, MemoryError) as error:
        raise _too_many(name, "more") from error
    return codes, _checked_number(ids, name)


def _drained_ids(column: IdColumn, at_end: bool, name: str) -> dict[str, np.ndarray]:
    """Returns codes by the rule of `IdValues`."""
    try:
        return {array: codes + np.int32(1) for array, codes in column.drain(at_end).items()}
    except (pa.ArrowException, MemoryError) as error:
        raise _too_many(name, "more") from error


def _checked_ids(column: IdColumn, from_text: bool, name: str) -> pa.Array:
    return _checked_number(column.drained_ids(from_text), name)


def _checked_number(ids: pa.Array, name: str) -> pa.Array:
    if len(ids) > _MOST_IDS:
        raise _too_many(name, f"{len(ids):,}")
    return ids


def _too_many(name: str, received: str) -> InputError:
    return InputError(
        f"{name}: a column of ids may have {_MOST_IDS:,} different values. Received: {received}. Make them coarser."
    )
