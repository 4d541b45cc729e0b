"""Columns of ids, times and labels, which are read batch by batch and checked against every rule of their values.

Ids are dictionary-encoded batch by batch, and the dictionaries are unified at the end. So a batch holds each string at
most once. Dense ids follow first appearance in the order of the files. E is the number of events.
"""

from __future__ import annotations

import abc
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from din_dist.errors import InputError
from din_dist.tables.arrow_text import has_empty, is_text, is_utf8, without_empty
from din_dist.tables.formats import INTEGER
from din_dist.tables.storage import File
from din_dist.text import shown

_ENDS_WITH_ZONE = re.compile(r"(Z|[T ].*[+-][0-9]{2}(:?[0-9]{2})?)$")
_DIGITS = r"^[+-]?[0-9]+(\.0*)?$"
NO_TIME = np.iinfo(np.int64).min  # of a nullable column
ROWS_TO_DRAIN = 1 << 20  # of ids
_LABEL_WORDS = {0: ["0", "0.0", "false"], 1: ["1", "1.0", "true"]}


class Rows:
    """The files that were read so far, and how many rows each has: where a row of all files stands.

    Args:
        what: the name of a row, for the texts of errors.
    """

    def __init__(self, what: str = "event") -> None:
        self.count = 0
        self.what = what
        self._files: list[File] = []
        self.starts: list[int] = []

    def begin(self, file: File) -> None:
        """Notes that the next rows are those of `file`."""
        self._files.append(file)
        self.starts.append(self.count)

    def advance(self, num_rows: int) -> None:
        """Notes that so many rows more were read."""
        self.count += num_rows

    def place(self, row: int) -> tuple[File, int]:
        """Returns the file of a row, and the row in it from 1."""
        index = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self._files[index], int(row) - self.starts[index] + 1

    def reject(self, row: int, rule: str, received: str, remedy: str) -> InputError:
        """Returns the error for a row, counted over all files from 0, that breaks a rule."""
        file, number = self.place(row)
        return InputError(f"{file}, row {number}: {rule}. Received: {received}. {remedy}")


class Column(abc.ABC):
    """One column of the log, which is added batch by batch."""

    def __init__(self, name: str, rows: Rows) -> None:
        self.name = name
        self._rows = rows

    @abc.abstractmethod
    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        """Takes the next batch of the column.

        Args:
            column: the values of the batch, of any type.
            from_folder: a folder's name gives them, as text.

        Raises:
            InputError: a value breaks a rule.
        """

    @abc.abstractmethod
    def drain(self, at_end: bool) -> dict[str, np.ndarray]:
        """Returns the next rows' values by name, and forgets them; for logs that do not fit into memory.

        Args:
            at_end: no batch follows, so all that is left is returned. Otherwise some may stay for the next call.
        """

    def reject(self, bad: pa.Array, column: pa.Array, rule: str, remedy: str) -> InputError:
        """Returns the error for the first row where `bad` is true."""
        index = _first(bad)
        return self.reject_value(index, column[index], rule, remedy)

    def reject_value(self, index: int, value: pa.Scalar, rule: str, remedy: str) -> InputError:
        """Returns the error for a value in a row of the batch."""
        received = f"{self.name}={shown_value(value)}" if value.is_valid else f"no {self.name}"
        return self._rows.reject(self._rows.count + index, rule, received, remedy)

    def require_values(self, column: pa.Array) -> None:
        """Refuses a missing value."""
        if column.null_count:
            rule = f"every {self._rows.what} needs its {self.name}"
            raise self.reject(column.is_null(), column, rule, "Fill it in, or drop the row.")

    def require_utf8(self, column: pa.Array) -> None:
        """Refuses text that is not UTF-8, which Arrow believes of every file that claims it."""
        if is_utf8(column):
            return
        index = next(index for index in range(len(column)) if not is_utf8(column.slice(index, 1)))
        received = f"{self.name}={shown(column[index].as_buffer().to_pybytes())}"
        row = self._rows.count + index
        raise self._rows.reject(row, "text must be UTF-8", received, "Convert the file to UTF-8.")


class IdColumn(Column):
    """Ids, strings or integers, which become dense codes from 0 by first appearance.

    Args:
        name: the column's name.
        rows: where rows stand, for the texts of errors.
        nullable: a value may be missing; its code is -1.
    """

    def __init__(self, name: str, rows: Rows, nullable: bool = False) -> None:
        super().__init__(name, rows)
        self._nullable = nullable
        self._value_type: pa.DataType | None = None
        self._chunks: list[pa.DictionaryArray | int] = []  # an integer counts rows without a value
        self._from_folders: dict[int, int] = {}  # by chunk that a folder's name gives: its first row
        self._known: pa.Array | None = None  # the ids of what was drained
        self._num_waiting = 0  # rows

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        self._add(plain(column), from_folder)
        self._num_waiting += len(column)

    def _add(self, column: pa.Array, from_folder: bool) -> None:
        if pa.types.is_floating(column.type) and is_all_nan(column):
            column = pa.nulls(len(column))
        if not self._nullable:
            self.require_values(column)
        if pa.types.is_integer(column.type):
            value_type = pa.int64()
        elif is_text(column.type) or pa.types.is_null(column.type):
            value_type = pa.large_string()
        else:
            rule = f"ids must be strings or integers, not {column.type}"
            raise self.reject(pc.is_valid(column), column, rule, "Convert the column.")
        if column.null_count == len(column):  # a batch without any value agrees with every type
            self._chunks.append(len(column))
            return
        if not from_folder and self._value_type not in (None, value_type):
            rule = f"all ids of a column must be of one type, {self._value_type} so far"
            raise self.reject(pc.is_valid(column), column, rule, "Convert the column.")
        if is_text(column.type):
            self.require_utf8(column)
        encoded = column.dictionary_encode()
        if is_text(column.type) and has_empty(encoded.dictionary):
            self._add(without_empty(column), from_folder)
            return
        if from_folder:
            self._from_folders[len(self._chunks)] = self._rows.count
        else:
            self._value_type = value_type
        try:
            values = encoded.dictionary.cast(value_type)
        except pa.ArrowInvalid as error:
            too_large = pc.greater(column, pa.scalar(2**63 - 1, column.type))
            rule = "integer ids must fit 64 bits, signed"
            raise self.reject(too_large, column, rule, "Make them strings.") from error
        self._chunks.append(pa.DictionaryArray.from_arrays(encoded.indices, values))

    def finish(self, from_text: bool) -> tuple[np.ndarray, pa.Array]:
        """Returns the codes int32 `[E]` and the ids, int64 or large_string, in the order of their codes.

        Args:
            from_text: the ids are read from text; they become integers if each is written as one.
        """
        self._settle_folders()
        codes = self._unified()
        return codes, self.drained_ids(from_text)

    def drain(self, at_end: bool) -> dict[str, np.ndarray]:
        """Returns the codes, int32, if enough rows wait for them: each call looks at all ids that are known."""
        least = max(ROWS_TO_DRAIN, 0 if self._known is None else len(self._known))
        return {"codes": self._unified()} if at_end or self._num_waiting >= least else {}

    def drained_ids(self, from_text: bool) -> pa.Array:
        """Returns the ids of all codes that were returned; see `finish`."""
        ids = pa.array([], pa.large_string()) if self._known is None else self._known
        if from_text and len(ids) and is_text(ids.type) and pc.all(pc.match_substring_regex(ids, INTEGER)).as_py():
            ids = ids.cast(pa.int64())  # "007" stays a string, and all others with it
        return ids

    def _unified(self) -> np.ndarray:
        """Returns the codes of all rows that wait, int32, and notes their ids behind those that are known."""
        encoded = [chunk for chunk in self._chunks if not isinstance(chunk, int)]
        if self._known is not None:
            encoded.insert(0, pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), self._known))
        unified = iter(pa.chunked_array(encoded).unify_dictionaries().chunks if encoded else [])
        if self._known is not None:
            next(unified)
        parts = [np.zeros(0, np.int32)]
        for chunk in self._chunks:
            if isinstance(chunk, int):
                parts.append(np.full(chunk, -1, np.int32))
            else:
                codes = next(unified)
                parts.append(codes.indices.fill_null(-1).to_numpy())
                self._known = codes.dictionary  # the same for all
        self._chunks.clear()
        self._num_waiting = 0
        return np.concatenate(parts)

    def _settle_folders(self) -> None:
        """Reads ids from folders' names as integers if the files have integers, because a name has no type."""
        if self._value_type != pa.int64():
            return
        for place, row in self._from_folders.items():
            chunk = self._chunks[place]
            assert not isinstance(chunk, int)
            (text,) = chunk.dictionary.to_pylist()
            if not re.match(INTEGER, text):
                raise self._rows.reject(
                    row,
                    "all ids of a column must be of one type, int64 in other files",
                    f"{self.name}={shown(text)}, from the name of a folder",
                    "Rename the folder, or make all of them strings.",
                )
            self._chunks[place] = pa.DictionaryArray.from_arrays(chunk.indices, pa.array([int(text)], pa.int64()))


class TimeColumn(Column):
    """Integers as they are; dates and times become microseconds since 1970, UTC. All must be of one kind.

    Args:
        name: the column's name.
        rows: where rows stand, for the texts of errors.
        before: a column that is read before, whose kind this one must have.
        nullable: a value may be missing; its time is `NO_TIME`.
    """

    def __init__(self, name: str, rows: Rows, before: TimeColumn | None = None, nullable: bool = False) -> None:
        super().__init__(name, rows)
        self._chunks: list[np.ndarray] = []
        self._before = before
        self._nullable = nullable
        self._dates: bool | None = None  # None before the first one
        self._zoned: bool | None = None  # dates have a time zone; None before the first

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        column = plain(column)
        if self._before and self._dates is None:
            self._dates, self._zoned = self._before._dates, self._before._zoned
        missing = None
        if self._nullable:
            column = _without_nan(without_empty(column) if is_text(column.type) else column)
            missing = column.is_null().to_numpy(zero_copy_only=False)
            if missing.all():
                self._chunks.append(np.full(len(column), NO_TIME))
                return
            column = column.fill_null(column.drop_null()[0])
        self.require_values(column)
        kind = column.type
        dates = pa.types.is_temporal(kind) and not pa.types.is_time(kind) and not pa.types.is_duration(kind)
        numbers = pc.match_substring_regex(column, _DIGITS) if is_text(kind) else None
        if numbers is not None and not pc.all(numbers).as_py():
            self.require_utf8(column)
            self.require_values(without_empty(column))
            dates = not pc.any(numbers).as_py()
        if self._dates is not None and dates is not self._dates:
            rule = f"all timestamps must be of one kind, {'dates' if self._dates else 'integers'} so far"
            raise self.reject(pc.is_valid(column), column, rule, "Convert the column.")
        self._dates = dates
        if dates:
            values = self._microseconds(column)
        elif numbers is not None:
            values = self._integers_in_text(column, numbers)
        elif pa.types.is_floating(kind):
            values = self._integers_in_floats(column)
        elif pa.types.is_integer(kind) or pa.types.is_decimal(kind):
            values = self._cast(column, column)
        else:
            raise self._not_integer(pc.is_valid(column), column)
        times = values.to_numpy()
        self._chunks.append(times if missing is None else np.where(missing, NO_TIME, times))

    def finish(self) -> np.ndarray:
        """Returns the times, int64 `[E]`."""
        return _joined(self._chunks)

    def drain(self, at_end: bool) -> dict[str, np.ndarray]:
        return {"times": _joined(self._chunks)} if self._chunks else {}

    def _microseconds(self, column: pa.Array) -> pa.Array:
        if is_text(column.type):
            first_zoned = _ENDS_WITH_ZONE.search(column[0].as_py()) is not None
        else:
            first_zoned = pa.types.is_timestamp(column.type) and column.type.tz is not None
        if self._zoned is None:
            self._zoned = first_zoned
        elif self._zoned is not first_zoned and not is_text(column.type):
            raise self._other_zone(pc.is_valid(column), column)
        kind = column.type if pa.types.is_timestamp(column.type) else None
        to = pa.timestamp("us", kind.tz if kind else "UTC" if self._zoned else None)
        rounds = is_text(column.type) or (kind is not None and kind.unit == "ns")
        try:
            return column.cast(to, safe=not rounds).cast(pa.int64())  # a time that does not fit must not wrap
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            bad = pa.array([not _is_cast(value, to) for value in column])
            other = pa.timestamp("us", None if self._zoned else "UTC")
            if is_text(column.type) and _is_cast(column[_first(bad)], other):
                raise self._other_zone(bad, column) from error
            raise self._not_integer(bad, column) from error

    def _other_zone(self, bad: pa.Array, column: pa.Array) -> InputError:
        """Returns the error for a date with a time zone where others have none, or the reverse."""
        so_far = "one" if self._zoned else "none"
        rule = f"all timestamps must have a time zone, or none of them; those before have {so_far}"
        return self.reject(bad, column, rule, "Write all of them with a zone, or all without.")

    def _integers_in_text(self, column: pa.Array, numbers: pa.Array) -> pa.Array:
        if not pc.all(numbers).as_py():  # Arrow would take 0x10 for 16
            bad = pc.invert(numbers)
            if any(_is_cast(column[_first(bad)], pa.timestamp("us", zone)) for zone in (None, "UTC")):
                rule = "all timestamps must be of one kind, and other rows have integers"
                raise self.reject(bad, column, rule, "Convert the column.")
            raise self._not_integer(bad, column)
        return self._cast(pc.replace_substring_regex(column, r"^\+|\.0*$", ""), column)

    def _integers_in_floats(self, column: pa.Array) -> pa.Array:
        """Converts floats to integers. From 2^53 on (float32: 2^24) a float may be a neighbour of the one meant."""
        limit = 2.0 ** {16: 11, 32: 24, 64: 53}[column.type.bit_width]
        numbers = _widened(column).cast(pa.float64())
        large = pc.and_(pc.greater_equal(pc.abs(numbers), limit), pc.is_finite(numbers))
        if pc.any(large).as_py():
            rule = f"a timestamp of type {column.type} must be below {limit:.0f}: larger ones lose digits"
            raise self.reject(large, column, rule, "Write integers.")
        return self._cast(numbers, column)

    def _cast(self, column: pa.Array, original: pa.Array) -> pa.Array:
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            bad = [not _is_cast(value, pa.int64()) for value in column]
            raise self._not_integer(pa.array(bad), original) from error

    def _not_integer(self, bad: pa.Array, column: pa.Array) -> InputError:
        rule = "a timestamp must be an integer (64 bits, any unit) or a date"
        return self.reject(bad, column, rule, "Correct the row.")


def _without_nan(column: pa.Array) -> pa.Array:
    """Returns floats with nulls in place of NaN, as pandas writes a missing integer, and other columns as they are."""
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(_widened(column)), pa.scalar(None, column.type), column)


class LabelColumn(Column):
    """Labels, 0 or 1, written as integers, floats, booleans or text.

    Args:
        is_alone: the log has no other labels, so that every event might be taken for a positive.
    """

    def __init__(self, name: str, rows: Rows, is_alone: bool = True) -> None:
        super().__init__(name, rows)
        self._is_alone = is_alone
        self._chunks: list[np.ndarray] = []

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        column = plain(column)
        if pa.types.is_boolean(column.type):
            ones, zeros = column, pc.invert(column)
        elif is_text(column.type):
            words = pc.ascii_lower(column)
            zeros, ones = (pc.is_in(words, pa.array(_LABEL_WORDS[label], words.type)) for label in (0, 1))
        elif pa.types.is_decimal(column.type):
            zeros, ones = (_decimals_equal(column, label) for label in (0, 1))
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            numbers = _widened(column)
            zeros, ones = (pc.equal(numbers, pa.scalar(label, numbers.type)) for label in (0, 1))
        else:
            zeros = ones = pa.array(np.zeros(len(column), bool))
        known = pc.fill_null(pc.or_(zeros, ones), False)
        if not pc.all(known).as_py():
            if is_text(column.type):
                self.require_utf8(column)
                column = without_empty(column)
            bad = pc.invert(known)
            missing = not column[_first(bad)].is_valid
            fill_in = "Fill it in, or drop the row."
            if self._is_alone:
                fill_in = "Fill it in, drop the row, or give --label_column= to take every event for a positive."
            raise self.reject(bad, column, "a label must be 0 or 1", fill_in if missing else "Correct the row.")
        self._chunks.append(ones.cast(pa.uint8()).to_numpy())

    def finish(self) -> np.ndarray:
        """Returns the labels, uint8 `[E]`."""
        return _joined(self._chunks)

    def drain(self, at_end: bool) -> dict[str, np.ndarray]:
        return {"labels": _joined(self._chunks)} if self._chunks else {}


def _joined(chunks: list[np.ndarray]) -> np.ndarray:
    """Returns all chunks in one array, and frees the chunks."""
    whole = np.concatenate(chunks)
    chunks.clear()
    return whole


def shown_value(value: pa.Scalar) -> str:
    """Returns a value for an error's text."""
    try:
        return shown(value.as_py())
    except (ValueError, OverflowError):  # a date out of Python's range, or a list of text that is not UTF-8
        return f"{value.type} {value.value}" if hasattr(value, "value") else f"{value.type}"


def _first(bad: pa.Array) -> int:
    """Returns the first index at which an array of booleans is true."""
    return int(np.argmax(bad.fill_null(False).to_numpy(zero_copy_only=False)))


def plain(column: pa.Array) -> pa.Array:
    """Returns a column without a dictionary: its order and its unused entries are accidents of the file."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        return column.cast(pa.large_string())
    if pa.types.is_decimal(column.type) and column.type.bit_width < 128:  # which Arrow cannot compare or convert
        return column.cast(pa.decimal128(38, column.type.scale))
    return column


def _widened(column: pa.Array) -> pa.Array:
    """Returns float16 as float64, because Arrow cannot compute with it, and other numbers as they are."""
    return column.cast(pa.float64()) if pa.types.is_float16(column.type) else column


def is_all_nan(column: pa.Array) -> bool:
    """Tells whether a column of floats has no value but NaN: so pandas writes a column without any value."""
    return pc.all(pc.is_nan(_widened(column))).as_py() is not False


def _decimals_equal(column: pa.Array, number: int) -> pa.Array:
    """Compares decimals with a number exactly; as a float, 1.00000000000000000001 would equal 1."""
    encoded = column.dictionary_encode()
    equal = [value.as_py() == number for value in encoded.dictionary]
    return pa.array(equal, pa.bool_()).take(encoded.indices)


def _is_cast(value: pa.Scalar, kind: pa.DataType) -> bool:
    try:
        value.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True
