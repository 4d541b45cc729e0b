"""Reading a log's columns, batch by batch, into dense ids; every rule that a log must keep is checked here.

Arrow does the work: a batch's ids are dictionary-encoded as they come, and the dictionaries are unified at the end, so
that strings are held once per batch at most. Dense ids follow first appearance in the files' order.
"""

from __future__ import annotations

import abc
import contextlib
import csv
import dataclasses
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from din_dist.data.blocks import EventLog, ItemFeature, group_by_user
from din_dist.data.sources import Format, format_of
from din_dist.errors import InputError

ROWS_PER_BATCH = 1 << 18
BYTES_PER_BATCH = 16 << 20  # of text, before decoding
_JSON_ROWS_TO_TYPE = 1000  # rows in which each column must show its type
_ENDS_WITH_ZONE = re.compile(r"(Z|[+-][0-9]{2}:?[0-9]{2})$")
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

    def chosen(self, files: Sequence[Path], form: Format) -> Columns:
        """Without the optional columns that no file has (JSON lines: that none of a file's first 1,000 rows has).

        Raises:
            InputError: a file lacks a column that is required, or that another file has.
        """
        names = {file: column_names(file, form) for file in files}
        anywhere = set().union(*names.values())
        columns = dataclasses.replace(
            self,
            label=self.label if self.label_required or self.label in anywhere else "",
            item_features=tuple(name for name in self.item_features if self.item_features_required or name in anywhere),
        )
        for file, name in itertools.product(files, columns.names):
            count = names[file].count(name)
            if count != 1:
                raise InputError(
                    f"{file}: column {name!r} {'occurs more than once' if count else 'is missing'}. "
                    f"Received: columns {', '.join(names[file])}. "
                    "Correct the file, or name your column (--user_column, --item_column, --timestamp_column, "
                    "--label_column, --item_features)."
                )
        return columns

    @property
    def names(self) -> list[str]:
        label = [self.label] if self.label else []
        return [self.user, self.item, self.timestamp, *label, *self.item_features]


def read_log(files: Sequence[Path], columns: Columns, form: Format | None = None) -> EventLog:
    """Reads the files, one after the other, and sorts each user's events by time; equal times keep the files' order.

    `form` is the format of all of them, by default the one that the first file's name promises.

    Raises:
        InputError: the files break one of the rules; the text names file, row (from 1, without the header) and value.
    """
    form = form or format_of(files[0]) or Format.PARQUET
    columns = columns.chosen(files, form)
    rows = Rows()
    users, items = _IdColumn(columns.user, rows), _IdColumn(columns.item, rows)
    times, labels = TimeColumn(columns.timestamp, rows), _LabelColumn(columns.label, rows)
    features = [_IdColumn(name, rows, nullable=True) for name in columns.item_features]
    for file in files:
        rows.begin(file)
        for batch in _batches(file, form, columns):
            for column in (users, items, times, *([labels] if columns.label else []), *features):
                column.add(batch.column(column.name))
            rows.advance(batch.num_rows)
    if not rows.count:
        raise InputError(f"{files[0]}: a log must have events. Received: no rows in {len(files)} file(s). Give others.")
    from_text = form is Format.CSV
    user_of, user_ids = users.finish(from_text)
    item_of, item_ids = items.finish(from_text)
    item_features = {}
    for feature in features:
        codes, ids = feature.finish(from_text)
        of_item = _one_value_per_item(codes, ids, item_of, item_ids, feature.name, rows)
        item_features[feature.name] = ItemFeature(of_item, ids)
    timestamps = times.finish()
    if columns.presorted:
        order = np.argsort(user_of, kind="stable")
        _check_sorted(user_of, timestamps, order, rows)
    else:
        order = np.lexsort((timestamps, user_of))
    blocks = group_by_user(user_of, item_of + 1, timestamps, labels.finish() if columns.label else None, order)
    return EventLog(user_ids, item_ids, item_features, bool(columns.label), blocks)


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
    def add(self, column: pa.Array) -> None:
        """Takes the next batch's column; raises `InputError` for a value that breaks a rule."""

    def reject(self, bad: pa.Array, column: pa.Array, rule: str, remedy: str) -> InputError:
        """The error for the first of the rows where `bad` is true."""
        index = int(np.argmax(bad.to_numpy(zero_copy_only=False)))
        value = column[index].as_py()
        received = f"{self.name}={value!r}" if value is not None else f"no {self.name}"
        return self._rows.reject(self._rows.count + index, rule, received, remedy)

    def require_values(self, column: pa.Array) -> None:
        if column.null_count:
            rule = f"every event needs a {self.name}"
            raise self.reject(column.is_null(), column, rule, "Fill it in, or drop the row.")


class _IdColumn(_Column):
    """Ids, strings or integers, to dense codes from 0 by first appearance; -1 where a null is allowed."""

    def __init__(self, name: str, rows: Rows, nullable: bool = False) -> None:
        super().__init__(name, rows)
        self._nullable = nullable
        self._chunks: list[pa.DictionaryArray] = []

    def add(self, column: pa.Array) -> None:
        if not self._nullable:
            self.require_values(column)
        if pa.types.is_dictionary(column.type):  # its order and unused entries are an accident of the file
            column = column.dictionary_decode()
        if pa.types.is_integer(column.type):
            value_type = pa.int64()
        elif is_text(column.type) or pa.types.is_null(column.type):
            value_type = pa.large_string()
        else:
            rule = f"ids must be strings or integers, not {column.type}"
            raise self.reject(pc.is_valid(column), column, rule, "Convert the column.")
        if pa.types.is_string_view(column.type):
            column = column.cast(value_type)
        encoded = column.dictionary_encode()
        try:
            values = encoded.dictionary.cast(value_type)
        except pa.ArrowInvalid as error:
            too_large = pc.greater(column, pa.scalar(2**63 - 1, column.type))
            rule = "integer ids must fit 64 bits, signed"
            raise self.reject(too_large, column, rule, "Make them strings.") from error
        if self._chunks and self._chunks[0].type.value_type != value_type:
            rule = f"all ids of a column must be of one type, {self._chunks[0].type.value_type} so far"
            raise self.reject(pc.is_valid(column), column, rule, "Convert the column.")
        self._chunks.append(pa.DictionaryArray.from_arrays(encoded.indices, values))

    def finish(self, from_text: bool) -> tuple[np.ndarray, pa.Array]:
        """Codes int32 `[E]` and the ids; ids `from_text` become integers if each is written as one."""
        chunks = pa.chunked_array(self._chunks).unify_dictionaries().chunks
        self._chunks.clear()
        codes = np.concatenate([chunk.indices.fill_null(-1).to_numpy() for chunk in chunks])
        ids = chunks[0].dictionary
        if from_text and len(ids) and pc.all(pc.match_substring_regex(ids, r"^(0|-?[1-9][0-9]{0,17})$")).as_py():
            ids = ids.cast(pa.int64())  # "007" stays a string, and all others with it
        return codes, ids


class TimeColumn(_Column):
    """Integers as they are; dates and times become microseconds since 1970, UTC."""

    def __init__(self, name: str, rows: Rows) -> None:
        super().__init__(name, rows)
        self._chunks: list[np.ndarray] = []
        self._dates = False

    def add(self, column: pa.Array) -> None:
        self.require_values(column)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        dates = pa.types.is_temporal(column.type) and not pa.types.is_time(column.type)
        text = is_text(column.type)
        if text:
            numbers = pc.match_substring_regex(column, r"^[+-]?[0-9]+(\.0*)?$")
            dates = not pc.any(numbers).as_py()
        if self._chunks and dates is not self._dates:
            rule = f"all timestamps must be of one kind, {'dates' if self._dates else 'integers'} so far"
            raise self.reject(pc.is_valid(column), column, rule, "Convert the column.")
        self._dates = dates
        if dates:
            values = self._microseconds(column)
        elif text:
            values = self._cast(pc.replace_substring_regex(column, r"^\+|\.0*$", ""), column)
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            values = self._cast(column, column)
        else:
            raise self._not_integer(pc.is_valid(column), column)
        self._chunks.append(values.to_numpy())

    def finish(self) -> np.ndarray:
        """int64 `[E]`."""
        return _joined(self._chunks)

    def _microseconds(self, column: pa.Array) -> pa.Array:
        zone = column.type.tz if pa.types.is_timestamp(column.type) else None
        if is_text(column.type) and _ENDS_WITH_ZONE.search(column[0].as_py()):
            zone = "UTC"
        kind = pa.timestamp("us", zone)
        try:
            return column.cast(kind, safe=False).cast(pa.int64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            bad = [not _is_cast(value, kind) for value in column]
            raise self._not_integer(pa.array(bad), column) from error

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

    def add(self, column: pa.Array) -> None:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_boolean(column.type):
            ones, zeros = column, pc.invert(column)
        elif is_text(column.type):
            words = pc.utf8_lower(column)
            zeros, ones = (pc.is_in(words, pa.array(_LABEL_WORDS[label], words.type)) for label in (0, 1))
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            zeros, ones = (pc.equal(column, pa.scalar(label, column.type)) for label in (0, 1))
        else:
            zeros = ones = pa.array(np.zeros(len(column), bool))
        known = pc.fill_null(pc.or_(zeros, ones), False)
        if not pc.all(known).as_py():
            raise self.reject(pc.invert(known), column, "a label must be 0 or 1", "Correct the row.")
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


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_cast(value: pa.Scalar, kind: pa.DataType) -> bool:
    try:
        value.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


# --- The three formats. ---


@contextlib.contextmanager
def reading(file: Path, form: Format, locate: Callable[[], str] = str) -> Iterator[None]:
    """Turns whatever a reader raises about a damaged file into one line; `locate` finds the row, once it is needed."""
    try:
        if not file.stat().st_size:
            raise InputError(f"{file}: a log must have events. Received: an empty file. Give another, or delete it.")
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        detail = " ".join(str(error).split())[:300]
        raise InputError(
            f"{file}{locate()}: must be {form} from end to end. Received: {detail}. "
            "Correct the row; if the file was cut off, write it again."
        ) from error


def column_names(file: Path, form: Format) -> list[str]:
    with reading(file, form):
        match form:
            case Format.PARQUET:
                return pq.read_schema(file).names
            case Format.CSV:
                with open_text(file) as stream:
                    return next(csv.reader([stream.readline().decode("utf-8-sig")]), [])
            case _:
                return list(_json_types(file))


def _batches(file: Path, form: Format, columns: Columns) -> Iterator[pa.RecordBatch]:
    match form:
        case Format.PARQUET:
            with reading(file, form), pq.ParquetFile(file) as parquet:
                yield from parquet.iter_batches(ROWS_PER_BATCH, columns=columns.names)
        case Format.CSV:
            with reading(file, form, lambda: csv_row_of_wrong_width(file, columns.names)):
                yield from csv_reader(file, columns.names)
        case _:
            with reading(file, form):
                found = _json_types(file, columns.names)
            types = {name: found[name] for name in columns.names}
            with reading(file, form, lambda: _json_row_of_wrong_type(file, types)):
                yield from _json_reader(file, types)


def open_text(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb"))


def csv_reader(file: Path, names: list[str], threads: bool = True, **options: Any) -> Iterator[pa.RecordBatch]:
    """Every column as text: what a file's first rows look like is no promise about the rest."""
    return pyarrow.csv.open_csv(
        file,
        pyarrow.csv.ReadOptions(block_size=BYTES_PER_BATCH, use_threads=threads),
        pyarrow.csv.ParseOptions(newlines_in_values=True, **options),
        pyarrow.csv.ConvertOptions(
            include_columns=names,
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        ),
    )


def csv_row_of_wrong_width(file: Path, names: list[str]) -> str:
    found: list[int] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        found.append(row.number)
        return "error"

    with contextlib.suppress(pa.ArrowException, OSError):
        for _ in csv_reader(file, names, threads=False, invalid_row_handler=note):
            pass
    return f", row {found[0] - 1}" if found and found[0] else ""  # Arrow counts the header


def _json_types(file: Path, needed: Sequence[str] = ()) -> dict[str, pa.DataType]:
    """The columns that the first rows show, with the type of the first value that is not null.

    Goes on reading as long as one of the `needed` columns shows no value.
    """
    types: dict[str, pa.DataType] = {}
    arrow = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64(), type(None): pa.null()}
    for row, fields in _json_rows(file):
        if row > _JSON_ROWS_TO_TYPE and all(types.get(name, pa.null()) != pa.null() for name in needed):
            break
        for name, value in fields.items():
            if types.get(name, pa.null()) == pa.null():
                types[name] = arrow.get(type(value), pa.null())
    return types


def _json_reader(file: Path, types: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    return pyarrow.json.open_json(
        pa.input_stream(str(file), compression="detect"),
        pyarrow.json.ReadOptions(block_size=BYTES_PER_BATCH),
        pyarrow.json.ParseOptions(explicit_schema=pa.schema(types.items()), unexpected_field_behavior="ignore"),
    )


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Slowly: row from 1, and what is in it; blank lines are no rows."""
    with open_text(file) as stream:
        for row, line in enumerate((line for line in stream if line.strip()), start=1):
            try:
                fields = json.loads(line)
            except ValueError:
                fields = None
            if not isinstance(fields, dict):
                raise InputError(
                    f"{file}, row {row}: each line must be one JSON object. "
                    f"Received: {line.decode(errors='replace').strip()[:100]}. "
                    "Correct the line; if the file was cut off, write it again."
                )
            yield row, fields


def _json_row_of_wrong_type(file: Path, types: dict[str, pa.DataType]) -> str:
    python: dict[pa.DataType, list[type]] = {
        pa.string(): [str],
        pa.bool_(): [bool],
        pa.int64(): [int],
        pa.float64(): [int, float],
    }
    with contextlib.suppress(OSError, EOFError, zlib.error):  # cut off: there is no such row
        for row, fields in _json_rows(file):
            for name, kind in types.items():
                value = fields.get(name)
                if value is not None and type(value) not in python.get(kind, []):
                    return f", row {row} ({name}={value!r})"
    return ""
