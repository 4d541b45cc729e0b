"""Reading a log's columns, batch by batch, into dense ids; every rule that a log must keep is checked here.

Arrow does the work: a batch's ids are dictionary-encoded as they come, and the dictionaries are unified at the end, so
that strings are held once per batch at most. Dense ids follow first appearance in the files' order.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from din_dist.data import formats
from din_dist.data.blocks import EventLog, ItemFeature, group_by_user
from din_dist.data.formats import Format, format_of, reading
from din_dist.data.sources import partition_of
from din_dist.errors import InputError
from din_dist.text import shown

_ENDS_WITH_ZONE = re.compile(r"(Z|[T ].*[+-][0-9]{2}(:?[0-9]{2})?)$")
_DIGITS = r"^[+-]?[0-9]+(\.0*)?$"
_LABEL_WORDS = {0: ["0", "0.0", "false"], 1: ["1", "1.0", "true"]}


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns to read, and which of them may be absent; as in `DataConfig`."""

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    label: str = "label"  # empty: the log has none
    label_required: bool = False
    item_features: tuple[str, ...] = ("category_id",)
    item_features_required: bool = False
    presorted: bool = False

    def chosen(self, layouts: Mapping[Path, Layout]) -> Columns:
        """Returns them without the optional columns that no file has.

        Raises:
            InputError: a file lacks a column that is required, or that another file has.
        """
        anywhere = set().union(*(layout.names for layout in layouts.values()))
        columns = dataclasses.replace(
            self,
            label=self.label if self.label_required or self.label in anywhere else "",
            item_features=tuple(name for name in self.item_features if self.item_features_required or name in anywhere),
        )
        for (file, layout), name in itertools.product(layouts.items(), columns.names):
            count = layout.names.count(name)
            if count != 1:
                raise InputError(
                    f"{file}: column {name!r} {'occurs more than once' if count else 'is missing'}. "
                    f"Received: {formats.shown_names(layout.names)} "
                    "Correct the file, or name your column (--user_column, --item_column, --timestamp_column, "
                    "--label_column, --item_features)."
                )
        return columns

    @property
    def names(self) -> list[str]:
        label = [self.label] if self.label else []
        return [self.user, self.item, self.timestamp, *label, *self.item_features]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The columns of a file, and where they come from.

    Attributes:
        names: of all columns; one that a file has twice is there twice.
        partition: those that the names of its folders give, with their value; see `partition_of`.
        json_types: of JSON lines, as `late`: columns that begin after the first rows.
    """

    names: tuple[str, ...]
    partition: Mapping[str, str | None]
    json_types: Mapping[str, pa.DataType]
    late: tuple[str, ...] = ()

    @classmethod
    def of(cls, file: Path, form: Format, wanted: Columns) -> Layout | None:
        """Returns the layout of a file; None where it has no rows that could tell it.

        Raises:
            InputError: the file is damaged.
        """
        types: dict[str, pa.DataType] = {}
        late: list[str] = []
        with reading(file, form):
            match form:
                case Format.PARQUET:
                    names = pq.read_schema(file).names
                case Format.CSV:
                    names = formats.csv_names(file)
                case Format.JSON_LINES:
                    types, late = formats.json_types(file, wanted.names)
                    names = list(types)
                    if types.get(wanted.label) == pa.int64():
                        types[wanted.label] = pa.float64()  # 1 and 1.0 are one kind
        if not names and form is Format.JSON_LINES:
            return None
        told = partition_of(file, [name for name in wanted.names if name not in names])
        partition = {name: value for name, value in told.items() if name not in names}
        return cls((*names, *partition), partition, types, tuple(late))


def read_log(files: Sequence[Path], columns: Columns, form: Format | None = None) -> EventLog:
    """Reads the files, one after the other, and sorts each user's events by time; equal times keep the files' order.

    `form` is the format of all of them, by default the one that the first file's name promises.

    Raises:
        InputError: the files break one of the rules; the text names file, row (from 1, without the header) and value.
    """
    form = form or format_of(files[0]) or Format.PARQUET
    found = {file: Layout.of(file, form, columns) for file in files}
    layouts = {file: layout for file, layout in found.items() if layout}
    columns = columns.chosen(layouts) if layouts else columns
    rows = Rows()
    users, items = _IdColumn(columns.user, rows), _IdColumn(columns.item, rows)
    times, labels = TimeColumn(columns.timestamp, rows), _LabelColumn(columns.label, rows)
    features = [_IdColumn(name, rows, nullable=True) for name in columns.item_features]
    for file, layout in layouts.items():
        rows.begin(file)
        for batch in filter(len, _batches(file, form, layout, columns.names)):
            for column in (users, items, times, *([labels] if columns.label else []), *features):
                column.add(batch.column(column.name), column.name in layout.partition)
            rows.advance(batch.num_rows)
    if not rows.count:
        raise InputError(f"{files[0]}: a log must have events. Received: no rows in {len(files)} file(s). Give others.")
    from_partition = set().union(*(layout.partition for layout in layouts.values()))
    is_text = {name: form is Format.CSV or name in from_partition for name in columns.names}
    user_of, user_ids = users.finish(is_text[users.name])
    item_of, item_ids = items.finish(is_text[items.name])
    item_features = {}
    for feature in features:
        codes, ids = feature.finish(is_text[feature.name])
        of_item = _one_value_per_item(codes, ids, item_of, item_ids, feature.name, rows)
        item_features[feature.name] = ItemFeature(of_item, ids)
    timestamps = times.finish()
    if columns.presorted:
        order = np.argsort(user_of, kind="stable")
        _check_sorted(user_of, timestamps, order, rows)
    else:
        order = np.lexsort((timestamps, user_of))
    blocks = group_by_user(user_of, item_of + 1, timestamps, labels.finish() if columns.label else None, order)
    late = set().union(*(layout.late for layout in layouts.values()))
    return EventLog(user_ids, item_ids, item_features, bool(columns.label), blocks, tuple(sorted(late)))


class Rows:
    """Where a row, counted over all files, stands; rows are added as batches are read."""

    def __init__(self) -> None:
        self.count = 0
        self._files: list[Path] = []
        self._starts: list[int] = []

    def begin(self, file: Path) -> None:
        self._files.append(file)
        self._starts.append(self.count)

    def advance(self, num_rows: int) -> None:
        self.count += num_rows

    def place(self, row: int) -> tuple[Path, int]:
        """File, and row in it from 1."""
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._files[index], int(row) - self._starts[index] + 1

    def reject(self, row: int, rule: str, received: str, remedy: str) -> InputError:
        file, number = self.place(row)
        return InputError(f"{file}, row {number}: {rule}. Received: {received}. {remedy}")


class _Column(abc.ABC):
    """One column of the log, added batch by batch."""

    def __init__(self, name: str, rows: Rows) -> None:
        self.name = name
        self._rows = rows

    @abc.abstractmethod
    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        """Takes the next batch's column, `from_folder` if a folder's name gives it.

        Raises:
            InputError: a value breaks a rule.
        """

    def reject(self, bad: pa.Array, column: pa.Array, rule: str, remedy: str) -> InputError:
        """The error for the first of the rows where `bad` is true."""
        index = _first(bad)
        received = f"{self.name}={_shown(column[index])}" if column[index].is_valid else f"no {self.name}"
        return self._rows.reject(self._rows.count + index, rule, received, remedy)

    def require_values(self, column: pa.Array) -> None:
        if column.null_count:
            rule = f"every event needs a {self.name}"
            raise self.reject(column.is_null(), column, rule, "Fill it in, or drop the row.")

    def require_utf8(self, column: pa.Array) -> None:
        """Checks text; Arrow believes files that say they hold UTF-8."""
        if is_utf8(column):
            return
        index = next(index for index in range(len(column)) if not is_utf8(column.slice(index, 1)))
        received = f"{self.name}={shown(column[index].as_buffer().to_pybytes())}"
        row = self._rows.count + index
        raise self._rows.reject(row, "text must be UTF-8", received, "Write the file anew, as UTF-8.")


class _IdColumn(_Column):
    """Ids, strings or integers, to dense codes from 0 by first appearance; -1 where a null is allowed."""

    def __init__(self, name: str, rows: Rows, nullable: bool = False) -> None:
        super().__init__(name, rows)
        self._nullable = nullable
        self._value_type: pa.DataType | None = None
        self._chunks: list[pa.DictionaryArray | int] = []  # a number: of rows without a value
        self._from_folders: dict[int, int] = {}  # chunks with what folders tell, and their first row

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        column = _plain(column)
        if pa.types.is_floating(column.type) and pc.all(pc.is_nan(_widened(column))).as_py() is not False:
            column = pa.nulls(len(column))  # as pandas writes a column without any value
        if not self._nullable:
            self.require_values(column)
        if pa.types.is_integer(column.type):
            value_type = pa.int64()
        elif is_text(column.type) or pa.types.is_null(column.type):
            value_type = pa.large_string()
        else:
            rule = f"ids must be strings or integers, not {column.type}"
            raise self.reject(pc.is_valid(column), column, rule, "Convert the column.")
        if column.null_count == len(column):  # what has no value agrees with every type
            self._chunks.append(len(column))
            return
        if not from_folder and self._value_type not in (None, value_type):
            rule = f"all ids of a column must be of one type, {self._value_type} so far"
            raise self.reject(pc.is_valid(column), column, rule, "Convert the column.")
        if is_text(column.type):
            self.require_utf8(column)
        encoded = column.dictionary_encode()
        if is_text(column.type) and has_empty(encoded.dictionary):
            self.add(without_empty(column), from_folder)
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
        """Codes int32 `[E]` and the ids; ids `from_text` become integers if each is written as one."""
        self._settle_folders()
        known = [chunk for chunk in self._chunks if not isinstance(chunk, int)]
        unified = iter(pa.chunked_array(known).unify_dictionaries().chunks if known else [])
        ids = pa.array([], pa.large_string())
        parts = []
        for chunk in self._chunks:
            if isinstance(chunk, int):
                parts.append(np.full(chunk, -1, np.int32))
            else:
                encoded = next(unified)
                parts.append(encoded.indices.fill_null(-1).to_numpy())
                ids = encoded.dictionary  # the same for all
        self._chunks.clear()
        codes = np.concatenate(parts)
        if (
            from_text
            and len(ids)
            and is_text(ids.type)
            and pc.all(pc.match_substring_regex(ids, formats.INTEGER)).as_py()
        ):
            ids = ids.cast(pa.int64())  # "007" stays a string, and all others with it
        return codes, ids

    def _settle_folders(self) -> None:
        """Reads what folders tell as integers, where files have integers: a folder's name has no type."""
        if self._value_type != pa.int64():
            return
        for place, row in self._from_folders.items():
            chunk = self._chunks[place]
            assert not isinstance(chunk, int)
            (text,) = chunk.dictionary.to_pylist()
            if not re.match(formats.INTEGER, text):
                raise self._rows.reject(
                    row,
                    "all ids of a column must be of one type, int64 in other files",
                    f"{self.name}={shown(text)}, from the name of a folder",
                    "Rename the folder, or make all of them strings.",
                )
            self._chunks[place] = pa.DictionaryArray.from_arrays(chunk.indices, pa.array([int(text)], pa.int64()))


class TimeColumn(_Column):
    """Integers as they are; dates and times become microseconds since 1970, UTC.

    All must be of one kind; if there was a column `before`, also of its kind.
    """

    def __init__(self, name: str, rows: Rows, before: TimeColumn | None = None) -> None:
        super().__init__(name, rows)
        self._chunks: list[np.ndarray] = []
        self._dates: bool | None = before._dates if before else None  # None before the first one
        self._zoned: bool | None = before._zoned if before else None  # likewise: whether dates have a time zone

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        column = _plain(column)
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
        self._chunks.append(values.to_numpy())

    def finish(self) -> np.ndarray:
        """int64 `[E]`."""
        return _joined(self._chunks)

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
        """The error for a date with a time zone where others have none, or the reverse."""
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
        """Floats from 2^53 on (float32: 2^24) are the neighbours of the integers that were meant."""
        limit = 2.0 ** {16: 11, 32: 24, 64: 53}[column.type.bit_width]
        numbers = _widened(column).cast(pa.float64())
        large = pc.and_(pc.greater_equal(pc.abs(numbers), limit), pc.is_finite(numbers))
        if pc.any(large).as_py():
            rule = f"a timestamp that is a {column.type} must be below {limit:.0f}, from where on digits are lost"
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


class _LabelColumn(_Column):
    """0 or 1, as integers, floats, booleans or text."""

    def __init__(self, name: str, rows: Rows) -> None:
        super().__init__(name, rows)
        self._chunks: list[np.ndarray] = []

    def add(self, column: pa.Array, from_folder: bool = False) -> None:
        column = _plain(column)
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
            fill_in = "Fill it in, drop the row, or give --label_column= to take every event for a positive."
            raise self.reject(bad, column, "a label must be 0 or 1", fill_in if missing else "Correct the row.")
        self._chunks.append(ones.cast(pa.uint8()).to_numpy())

    def finish(self) -> np.ndarray:
        """uint8 `[E]`."""
        return _joined(self._chunks)


def _one_value_per_item(
    codes: np.ndarray, ids: pa.Array, item_of: np.ndarray, item_ids: pa.Array, name: str, rows: Rows
) -> np.ndarray:
    """int32 `[I + 1]`: each item's dense id of the feature; rows that say nothing (-1) agree with all others."""
    told = np.flatnonzero(codes >= 0)
    of_item = np.full(len(item_ids), -1, np.int32)
    of_item[item_of[told[::-1]]] = codes[told[::-1]]  # the last assignment stays: that of the first row
    differing = told[of_item[item_of[told]] != codes[told]]
    if len(differing):
        second = differing[0]
        item = item_of[second]
        first = told[np.argmax(item_of[told] == item)]
        file, number = rows.place(first)
        raise rows.reject(
            second,
            f"an item must have one {name}",
            f"item {item_ids[item].as_py()!r} as {ids[codes[first]].as_py()!r} ({file}, row {number}) "
            f"and here as {ids[codes[second]].as_py()!r}",
            "Correct one of the two rows.",
        )
    return np.concatenate([[0], of_item + 1]).astype(np.int32)


def _check_sorted(users: np.ndarray, timestamps: np.ndarray, order: np.ndarray, rows: Rows) -> None:
    sorted_times = timestamps[order]
    earlier = (np.diff(sorted_times) < 0) & (np.diff(users[order]) == 0)
    if earlier.any():
        index = np.flatnonzero(earlier)
        index = index[np.argmin(order[index + 1])]  # the first in the files' order
        file, number = rows.place(order[index])
        raise rows.reject(
            order[index + 1],
            "with --presorted each user's events must be in time order",
            f"timestamp {sorted_times[index + 1]} after {sorted_times[index]} ({file}, row {number})",
            "Sort the log, or drop --presorted.",
        )


def _joined(chunks: list[np.ndarray]) -> np.ndarray:
    """One array of all, and the memory of the chunks given back."""
    whole = np.concatenate(chunks)
    chunks.clear()
    return whole


def _shown(value: pa.Scalar) -> str:
    try:
        return shown(value.as_py())
    except (ValueError, OverflowError):  # a date that Python does not know, or a list of text that is no UTF-8
        return f"{value.type} {value.value}" if hasattr(value, "value") else f"{value.type}"


def _first(bad: pa.Array) -> int:
    """Returns where an array of booleans is true for the first time."""
    return int(np.argmax(bad.fill_null(False).to_numpy(zero_copy_only=False)))


def _plain(column: pa.Array) -> pa.Array:
    """Returns a column without a dictionary, whose order and unused entries are an accident of the file."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        return column.cast(pa.large_string())
    if pa.types.is_decimal(column.type) and column.type.bit_width < 128:  # which Arrow cannot compare or convert
        return column.cast(pa.decimal128(38, column.type.scale))
    return column


def has_empty(column: pa.Array) -> bool:
    return pc.min(pc.binary_length(column)).as_py() == 0


def without_empty(column: pa.Array) -> pa.Array:
    """Returns text with nulls in place of empty values: they are no values."""
    if not has_empty(column):
        return column
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)


def _widened(column: pa.Array) -> pa.Array:
    """Returns float16, with which Arrow cannot compute, as float64, and other numbers as they are."""
    return column.cast(pa.float64()) if pa.types.is_float16(column.type) else column


def _decimals_equal(column: pa.Array, number: int) -> pa.Array:
    """Compares exactly; as floats, 1.00000000000000000001 would be 1."""
    encoded = column.dictionary_encode()
    equal = [value.as_py() == number for value in encoded.dictionary]
    return pa.array(equal, pa.bool_()).take(encoded.indices)


def is_utf8(column: pa.Array) -> bool:
    """Tells whether all of a column's text is; Arrow believes files that say so."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_cast(value: pa.Scalar, kind: pa.DataType) -> bool:
    try:
        value.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _batches(file: Path, form: Format, layout: Layout, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields the columns `names`, those that a file has in its folders' names as text."""
    inside = [name for name in names if name not in layout.partition]
    for batch in _batches_inside(file, form, layout, inside):
        for name in names:
            if name in layout.partition:
                batch = batch.append_column(name, pa.repeat(pa.scalar(layout.partition[name], pa.string()), len(batch)))
        yield batch


def _batches_inside(file: Path, form: Format, layout: Layout, names: list[str]) -> Iterator[pa.RecordBatch]:
    match form:
        case Format.PARQUET:
            with reading(file, form), pq.ParquetFile(file) as parquet:
                yield from parquet.iter_batches(formats.ROWS_PER_BATCH, columns=names)
        case Format.CSV:
            with reading(file, form, lambda: formats.csv_fault(file, names)):
                yield from formats.csv_reader(file, names)
        case Format.JSON_LINES:
            types = {name: layout.json_types[name] for name in names}
            with reading(file, form, lambda: formats.json_fault(file, types)):
                yield from formats.json_reader(file, types)
