"""Tables of any size in Parquet, CSV or JSON lines: read a few thousand rows at a time, written with columns added.

Every rule that the ids of a table must keep is checked here. Letters of shapes: R rows of a batch, V values in all of
their lists.
"""

from __future__ import annotations

import abc
import bz2
import contextlib
import csv
import dataclasses
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from din_dist.errors import InputError
from din_dist.tables.columns import Rows, TimeColumn, is_text, is_utf8
from din_dist.tables.formats import (
    COMPRESSIONS,
    INTEGER,
    Format,
    blocks_of_lines,
    compression_of,
    csv_fault,
    csv_names,
    csv_reader,
    format_of,
    is_64_bits,
    reading,
    shown_names,
)
from din_dist.text import parse_json, printable, shown

BATCH_BYTES = 8 << 20  # about what a batch of rows may take, as it is read
MOST_ROWS = 8192  # in a batch
_ROW_GROUP_ROWS = 1 << 16
_ROW_GROUP_BYTES = 32 << 20
_SPECIAL_IN_CSV = '[",\r\n]'
_SPECIAL_IN_JSON = r'[\x00-\x1f"\\]'


@dataclasses.dataclass(frozen=True)
class Field:
    """A column that holds ids: one a row, or a list of them."""

    name: str
    integers: bool  # else strings
    is_list: bool = False


@dataclasses.dataclass(frozen=True)
class Ids:
    """What a column holds in a batch: `values` `[V]`, int64 or string, none missing.

    `offsets`, int64 `[R + 1]`: where each row's list begins; None where a row has one id.
    """

    values: pa.Array
    offsets: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """int64 `[R]`."""
        return np.ones(len(self.values), np.int64) if self.offsets is None else np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class Added:
    """A column to write: `values` `[V]` with `offsets` as in `Ids`."""

    name: str
    values: pa.Array
    offsets: np.ndarray | None = None

    def array(self) -> pa.Array:
        return self.values if self.offsets is None else pa.LargeListArray.from_arrays(self.offsets, self.values)

    def type(self) -> pa.DataType:
        return self.values.type if self.offsets is None else pa.list_(self.values.type)


@dataclasses.dataclass(frozen=True)
class Survey:
    """One file, read through once: so every row is known to have all columns."""

    columns: tuple[str, ...]
    num_rows: int
    num_bytes: int  # uncompressed

    @property
    def rows_per_batch(self) -> int:
        """The same whoever reads, and from wherever: scores depend on it in their last digit."""
        return max(1, min(MOST_ROWS, BATCH_BYTES * self.num_rows // max(1, self.num_bytes)))


class Table(abc.ABC):
    """One file, read from some row on. Rows are counted from 0 here, and from 1 in messages."""

    def __init__(self, path: Path, list_separator: str = "") -> None:
        self.path, self._separator = path, list_separator
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._held: list[pa.RecordBatch] = []
        self._position = 0
        self._times_before: dict[str, TimeColumn] = {}  # by column

    suffix: str  # of what is written

    @abc.abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Their names; of JSON lines those in the first row, if there is one."""

    @abc.abstractmethod
    def survey(self) -> Survey:
        """Reads it through.

        Raises:
            InputError: it is damaged, or a row does not fit.
        """

    @abc.abstractmethod
    def _open(self, first_row: int) -> tuple[int, Iterator[pa.RecordBatch]]:
        """Batches from a row at or before `first_row` on, and that row."""

    @abc.abstractmethod
    def ids(self, rows: pa.Table, first_row: int, fields: Sequence[Field]) -> list[Ids]:
        """The columns of a batch that begins at `first_row`.

        Raises:
            InputError: an id is missing or of another type; the text names file and row.
        """

    @abc.abstractmethod
    def times(self, rows: pa.Table, first_row: int, name: str) -> np.ndarray:
        """A column of times as int64 `[R]`, in the unit in which prepared data has them.

        Raises:
            InputError: one is missing, or is no time.
        """

    def _times(self, column: pa.Array, first_row: int, name: str) -> np.ndarray:
        rows = Rows()
        rows.begin(self.path)
        rows.advance(first_row)
        times = TimeColumn(name, rows, self._times_before.get(name))
        times.add(column)
        self._times_before[name] = times
        return times.finish()

    @abc.abstractmethod
    def write(self, stream: BinaryIO, results: Iterator[tuple[pa.Table, list[Added]]], added: Sequence[Added]) -> None:
        """Writes batches with the columns added; `added` are empty ones, which tell their types."""

    def read(self, first_row: int, num_rows: int, rows_per_batch: int) -> Iterator[pa.Table]:
        """Rows from `first_row` on, always `rows_per_batch` of them but for the last batch.

        Raises:
            InputError: the file ends before.
        """
        if self._batches is None or first_row < self._position:
            self._held.clear()
            self._position, self._batches = self._open(first_row)
        self._take(first_row - self._position)
        for start in range(0, num_rows, rows_per_batch):
            yield pa.Table.from_batches(self._take(min(rows_per_batch, num_rows - start)))

    def _take(self, num_rows: int) -> list[pa.RecordBatch]:
        taken = []
        while num_rows:
            if not self._held:
                batch = next(cast(Iterator[pa.RecordBatch], self._batches), None)
                if batch is None:
                    raise InputError(
                        f"{self.path}: must stay as it is while it is read. Received: fewer rows than at the start. "
                        "Give --overwrite to begin anew."
                    )
                self._held.append(batch)
            batch = self._held.pop()
            if len(batch) > num_rows:
                self._held.append(batch.slice(num_rows))
                batch = batch.slice(0, num_rows)
            num_rows -= len(batch)
            self._position += len(batch)
            taken.append(batch)
        return taken

    def _typed(self, column: pa.Array, field: Field, first_row: int) -> Ids:
        """A column as it came, checked."""
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
            raise self._reject(first_row, f"{field.name} must be a list", f"{_shown(column, 0)} ({column.type})")
        self._require(column, field, lambda index: first_row + index)
        offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
        offsets -= offsets[0]

        def row(index: int) -> int:
            return first_row + int(np.searchsorted(offsets, index, side="right")) - 1

        return Ids(self._values(values, field, row), offsets)

    def _lists_in_text(self, column: pa.Array, field: Field, first_row: int) -> Ids:
        raise self._reject(
            first_row, f"{field.name} must be a list", f"{_shown(column, 0)}", "Write lists, or give --list_separator."
        )

    def _values(self, values: pa.Array, field: Field, row: Callable[[int], int]) -> pa.Array:
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        kind = values.type
        self._require(values, field, row)
        if not len(values):
            return pa.array([], pa.int64() if field.integers else pa.string())
        if field.integers and is_text(kind) and self._from_text:
            good = pc.match_substring_regex(values, INTEGER)
            if not pc.all(good).as_py():  # Arrow would take 0x10 for 16
                index = int(np.argmin(good.to_numpy(zero_copy_only=False)))
                raise self._other_type(row(index), field, _shown(values, index))
            return values.cast(pa.int64())
        if is_text(kind) and not is_utf8(values):
            index = next(index for index in range(len(values)) if not is_utf8(values.slice(index, 1)))
            raise self._reject(row(index), "text must be UTF-8", shown(values[index].as_buffer().to_pybytes()))
        if not (pa.types.is_integer(kind) if field.integers else is_text(kind)):
            raise self._other_type(row(0), field, f"{_shown(values, 0)} ({kind})")
        try:
            return values.cast(pa.int64() if field.integers else pa.string())
        except pa.ArrowInvalid:
            index = int(np.argmax(values.to_numpy(zero_copy_only=False) > 2**63 - 1))
            raise self._reject(row(index), "ids must fit 64 bits, signed", _shown(values, index)) from None

    _from_text = False  # whether integers come as text

    def _require(self, values: pa.Array, field: Field, row: Callable[[int], int]) -> None:
        if values.null_count:
            index = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
            raise self._missing(row(index), field)

    def _missing(self, row: int, field: Field) -> InputError:
        what = f"a {field.name} without a missing id" if field.is_list else f"a {field.name}"
        empty = " A user without a history has an empty list." if field.is_list else ""
        return self._reject(row, f"every row needs {what}", "none", f"Fill it in, or drop the row.{empty}")

    def _other_type(self, row: int, field: Field, received: str) -> InputError:
        kind = "integers" if field.integers else "strings"
        return self._reject(row, f"{field.name} must hold {kind}, as in the log of the model", received)

    def _reject(
        self, row: int, rule: str, received: str, remedy: str = "Correct it, or convert the column."
    ) -> InputError:
        return InputError(f"{self.path}, row {row + 1}: {rule}. Received: {received}. {remedy}")


def open_table(path: Path, list_separator: str = "") -> Table:
    match format_of(path):
        case Format.PARQUET:
            return _Parquet(path, list_separator)
        case Format.CSV:
            return _Csv(path, list_separator)
        case Format.JSON_LINES:
            return _JsonLines(path, list_separator)
    raise ValueError(path)


def _shown(values: pa.Array, index: int) -> str:
    value = repr(values[index].as_py()) if index < len(values) else "nothing"
    return value if len(value) < 100 else f"{value[:100]}..."


def _split(column: pa.Array, separator: str) -> pa.Array:
    """Text to lists; empty text is an empty list."""
    empty = pc.equal(column, "").to_numpy(zero_copy_only=False)
    lists = pc.split_pattern(column, separator)
    if not empty.any():
        return lists
    kept = np.ones(len(lists.values), bool)
    kept[lists.offsets.to_numpy()[:-1][empty]] = False
    counts = np.where(empty, 0, np.diff(lists.offsets.to_numpy()))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return pa.LargeListArray.from_arrays(offsets, lists.values.filter(pa.array(kept)))


def _require_content(path: Path) -> None:
    """An empty file has no columns."""
    if not path.stat().st_size:
        raise InputError(
            f"{path}: a table must at least name its columns. Received: an empty file. Give another, or delete it."
        )


class _Parquet(Table):
    suffix = ".parquet"

    def columns(self) -> tuple[str, ...]:
        return self.survey().columns

    def survey(self) -> Survey:
        _require_content(self.path)
        with reading(self.path, Format.PARQUET), pq.ParquetFile(self.path) as file:
            found = file.metadata
            num_bytes = sum(found.row_group(number).total_byte_size for number in range(found.num_row_groups))
            return Survey(tuple(file.schema_arrow.names), found.num_rows, num_bytes)

    def _open(self, first_row: int) -> tuple[int, Iterator[pa.RecordBatch]]:
        with reading(self.path, Format.PARQUET), pq.ParquetFile(self.path) as file:
            found = file.metadata
            ends = np.cumsum([found.row_group(number).num_rows for number in range(found.num_row_groups)])
        skipped = int(np.searchsorted(ends, first_row, side="right"))
        start = int(ends[skipped - 1]) if skipped else 0
        return start, self._read_groups(range(skipped, len(ends)))

    def _read_groups(self, groups: range) -> Iterator[pa.RecordBatch]:
        rows_per_batch = self.survey().rows_per_batch
        with (
            reading(self.path, Format.PARQUET),
            # Buffered: else whole columns of a row group are in memory.
            pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file,
        ):
            yield from file.iter_batches(rows_per_batch, row_groups=list(groups))

    def ids(self, rows: pa.Table, first_row: int, fields: Sequence[Field]) -> list[Ids]:
        with reading(self.path, Format.PARQUET):
            return [self._typed(_whole(rows.column(field.name)), field, first_row) for field in fields]

    def times(self, rows: pa.Table, first_row: int, name: str) -> np.ndarray:
        with reading(self.path, Format.PARQUET):
            return self._times(_whole(rows.column(name)), first_row, name)

    def write(self, stream: BinaryIO, results: Iterator[tuple[pa.Table, list[Added]]], added: Sequence[Added]) -> None:
        with pq.ParquetFile(self.path) as file:
            schema = file.schema_arrow
        for column in added:
            schema = schema.append(pa.field(column.name, column.type()))
        with pq.ParquetWriter(stream, schema) as writer:
            group: list[pa.Table] = []
            for rows, columns in results:
                for column in columns:
                    rows = rows.append_column(column.name, column.array().cast(column.type()))
                group.append(rows)
                full = sum(map(len, group)) >= _ROW_GROUP_ROWS
                if full or sum(table.nbytes for table in group) >= _ROW_GROUP_BYTES:
                    writer.write_table(pa.concat_tables(group).cast(schema))
                    group.clear()
            if group:
                writer.write_table(pa.concat_tables(group).cast(schema))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    whole = column.combine_chunks()
    return whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole


class _TextTable(Table):
    """A file of text, compressed or not; what is written is as the input is."""

    @property
    def suffix(self) -> str:  # type: ignore[override]
        ending = self.path.suffix.lower()
        return self._plain_suffix + (ending if ending in COMPRESSIONS else "")

    _plain_suffix: str

    def write(self, stream: BinaryIO, results: Iterator[tuple[pa.Table, list[Added]]], added: Sequence[Added]) -> None:
        with _compressed(stream, compression_of(self.path)) as target:
            target.write(self._header(added))
            for rows, columns in results:
                lines = self._lines(rows, columns)
                target.write(memoryview(_text_of(lines)))

    def _header(self, added: Sequence[Added]) -> bytes:
        return b""

    @abc.abstractmethod
    def _lines(self, rows: pa.Table, columns: list[Added]) -> pa.Array:
        """Each row with its end of line, as large_string."""


def _compressed(stream: BinaryIO, compression: str | None) -> contextlib.AbstractContextManager[Any]:
    """Returns what compresses into `stream`: the same rows make the same bytes."""
    match compression:
        case None:
            return contextlib.nullcontext(stream)
        case "gzip":
            return gzip.GzipFile("", "wb", fileobj=stream, mtime=0)  # without a name and a time
        case "bz2":
            return bz2.BZ2File(stream, "wb")
        case "xz":
            return lzma.LZMAFile(stream, "wb")
        case _:
            return pa.CompressedOutputStream(pa.PythonFile(_Kept(stream), "w"), compression)


class _Kept:
    """A stream that Arrow, which closes what it writes to, leaves open."""

    def __init__(self, stream: BinaryIO) -> None:
        self.write, self.flush, self.closed = stream.write, stream.flush, False

    def close(self) -> None:
        """Does nothing."""


def _text_of(lines: pa.Array) -> memoryview:
    """All of the strings' bytes, end to end."""
    if not len(lines):
        return memoryview(b"")
    _, offsets, text = lines.buffers()
    width = np.int64 if pa.types.is_large_string(lines.type) else np.int32
    ends = np.frombuffer(offsets, width)[lines.offset : lines.offset + len(lines) + 1]
    return memoryview(text)[ends[0] : ends[-1]] if text is not None else memoryview(b"")


class _Csv(_TextTable):
    _plain_suffix = ".csv"
    _from_text = True

    def columns(self) -> tuple[str, ...]:
        _require_content(self.path)
        return tuple(self._names())

    def _names(self) -> list[str]:
        with reading(self.path, Format.CSV):
            return csv_names(self.path)

    def survey(self) -> Survey:
        names = list(self.columns())
        num_rows = num_bytes = 0
        for batch in self._all(names):
            num_rows += len(batch)
            num_bytes += batch.nbytes
        return Survey(tuple(names), num_rows, num_bytes)

    def _all(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        if len(set(names)) < len(names):
            raise InputError(
                f"{self.path}: columns must have different names. Received: {shown_names(names)} Correct the header."
            )
        with reading(self.path, Format.CSV, lambda: csv_fault(self.path, names)):
            yield from csv_reader(self.path, names)

    def _open(self, first_row: int) -> tuple[int, Iterator[pa.RecordBatch]]:
        return 0, self._all(self._names())

    def ids(self, rows: pa.Table, first_row: int, fields: Sequence[Field]) -> list[Ids]:
        found = []
        for field in fields:
            column = _whole(rows.column(field.name))
            if field.is_list and self._separator:  # the only way to write an empty list
                column = column.fill_null("")
            found.append(self._typed(column, field, first_row))
        return found

    def times(self, rows: pa.Table, first_row: int, name: str) -> np.ndarray:
        return self._times(_whole(rows.column(name)), first_row, name)

    def _lists_in_text(self, column: pa.Array, field: Field, first_row: int) -> Ids:
        """Cells that hold JSON arrays."""
        self._require(column, field, lambda index: first_row + index)
        cells = pc.replace_substring_regex(column, r"[\r\n]", " ")
        value = pa.list_(pa.int64() if field.integers else pa.string())
        try:
            lists = _parse_json(_join('{"v":', cells, "}"), pa.schema({"v": value}))
        except pa.ArrowException:
            for row, cell in enumerate(column.to_pylist()):
                if problem := _problem(_loaded(cell), field):
                    raise self._reject(
                        first_row + row,
                        f"{field.name} must be a JSON array of {'integers' if field.integers else 'strings'}",
                        problem if _loaded(cell) is not None else repr(cell[:100]),
                        "Correct the cell, or give --list_separator for lists like a;b;c.",
                    ) from None
            raise
        return self._typed(lists.column("v").combine_chunks(), field, first_row)

    def _header(self, added: Sequence[Added]) -> bytes:
        names = [*self._names(), *(column.name for column in added)]
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(names)
        return line.getvalue().encode()

    def _lines(self, rows: pa.Table, columns: list[Added]) -> pa.Array:
        cells = [_quoted(_whole(column).fill_null("")) for column in rows.columns]
        cells += [_quoted(_as_text(column, quote=False)) for column in columns]
        return _join(_join(*cells, separator=","), "\n")


def _quoted(cells: pa.Array) -> pa.Array:
    special = pc.match_substring_regex(cells, _SPECIAL_IN_CSV)
    if not pc.any(special).as_py():
        return cells
    doubled = pc.replace_substring(cells, '"', '""')
    return pc.if_else(special, _join('"', doubled, '"'), cells.cast(pa.large_string()))


class _JsonLines(_TextTable):
    _plain_suffix = ".jsonl"
    _LINE = "line"

    def columns(self) -> tuple[str, ...]:
        first = next((batch.column(0)[0].as_py() for batch in self._all() if len(batch)), None)
        return () if first is None else tuple(self._object(first, 0))

    def survey(self) -> Survey:
        num_rows = num_bytes = 0
        for batch in self._all():
            num_rows += len(batch)
            num_bytes += batch.nbytes
        return Survey(self.columns(), num_rows, num_bytes)

    def _open(self, first_row: int) -> tuple[int, Iterator[pa.RecordBatch]]:
        return 0, self._all()

    def _all(self) -> Iterator[pa.RecordBatch]:
        """Lines that are not blank, as text."""
        if not self.path.stat().st_size:
            return
        row = 0
        with reading(self.path, Format.JSON_LINES, lambda: f", row {row + 1}"):
            for block in blocks_of_lines(self.path):
                lines = self._lines_of(block, row)
                row += len(lines)
                yield lines

    def _lines_of(self, text: bytes, row: int) -> pa.RecordBatch:
        """`text` ends with an end of line."""
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        lines = pa.BinaryArray.from_buffers(pa.binary(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(text)])
        try:
            lines = lines.cast(pa.string())
        except pa.ArrowInvalid:
            for line in lines.to_pylist():
                try:
                    row += bool(line.decode().strip())
                except UnicodeDecodeError as error:
                    at = repr(line[max(0, error.start - 20) : error.start + 20])
                    raise self._reject(row, "text must be UTF-8", at, "Write the file as UTF-8.") from None
            raise
        lines = pc.utf8_trim(lines, characters=" \t\r\n")
        return pa.record_batch({self._LINE: lines.filter(pc.not_equal(lines, ""))})

    def _object(self, line: str, row: int) -> dict[str, Any]:
        fields = _loaded(line)
        if not isinstance(fields, dict):
            remedy = "Correct the line; if the file was cut off, write it again."
            raise self._reject(row, "each line must be one JSON object", printable(line[:100]), remedy)
        return fields

    def ids(self, rows: pa.Table, first_row: int, fields: Sequence[Field]) -> list[Ids]:
        lines = _whole(rows.column(self._LINE))
        types = {}
        for field in fields:
            kind = pa.int64() if field.integers else pa.string()
            types[field.name] = pa.list_(kind) if field.is_list and not self._separator else kind
            if field.is_list and self._separator:
                types[field.name] = pa.string()
        try:
            found = _parse_json(lines, pa.schema(types))
        except pa.ArrowException as error:
            raise self._rejected_lines(lines, first_row, fields, error) from None
        return [self._typed(_whole(found.column(field.name)), field, first_row) for field in fields]

    def times(self, rows: pa.Table, first_row: int, name: str) -> np.ndarray:
        lines = _whole(rows.column(self._LINE))
        for kind in (pa.int64(), pa.float64(), pa.string()):  # text: dates
            with contextlib.suppress(pa.ArrowException):
                found = _parse_json(lines, pa.schema({name: kind}))
                return self._times(_whole(found.column(name)), first_row, name)
        raise self._rejected_times(lines, first_row, name)

    def _rejected_times(self, lines: pa.Array, first_row: int, name: str) -> InputError:
        """Slowly: which of the lines Arrow did not take."""
        first: type | None = None
        for row, line in enumerate(lines.to_pylist(), start=first_row):
            value = self._object(line, row).get(name)
            if value is None:
                continue
            kind = str if isinstance(value, str) else float
            if type(value) not in (str, int, float) or not is_64_bits(value) or kind is not (first or kind):
                rule = "a timestamp must be an integer (64 bits, any unit) or a date, the same in all rows"
                return self._reject(row, rule, f"{name}={shown(value)}")
            first = kind
        return self._reject(first_row, "from here on each line must be one JSON object", "another text")

    def _rejected_lines(
        self, lines: pa.Array, first_row: int, fields: Sequence[Field], error: pa.ArrowException
    ) -> InputError:
        """Slowly: which of the lines Arrow did not take."""
        for row, line in enumerate(lines.to_pylist(), start=first_row):
            values = self._object(line, row)
            for field in fields:
                value = values.get(field.name)
                is_text_list = field.is_list and bool(self._separator) and isinstance(value, str)
                if value is not None and not is_text_list and (problem := _problem(value, field)):
                    if field.is_list and not isinstance(value, list):
                        return self._reject(row, f"{field.name} must be a list", problem)
                    return self._other_type(row, field, problem)
        detail = " ".join(str(error).split())[:200]
        return self._reject(first_row, "from here on each line must be one JSON object", detail, "Correct the file.")

    def _lines(self, rows: pa.Table, columns: list[Added]) -> pa.Array:
        lines = _whole(rows.column(self._LINE)).cast(pa.large_binary())
        self._check_names(lines, columns)
        parts = [pc.binary_slice(lines, 0, -1).cast(pa.large_string())]  # without the closing brace
        for column in columns:
            parts += [f",{json.dumps(column.name)}:", _as_text(column, quote=True)]
        return _join(*parts, "}\n")

    def _check_names(self, lines: pa.Array, columns: list[Added]) -> None:
        """A row may have what the first one has not."""
        for column in columns:
            named = pc.match_substring(lines, json.dumps(column.name))
            for line in lines.filter(named).to_pylist() if pc.any(named).as_py() else ():
                if column.name in self._object(line.decode(), 0):
                    row = printable(line.decode()[:100])
                    raise InputError(
                        f"{self.path}: {column.name!r} is to be added. Received: the row {row}. Rename or drop what it "
                        "has."
                    )


def _join(*parts: pa.Array | str, separator: str = "") -> pa.Array:
    """Row by row, one text of all; Arrow wants them to be of one type."""
    kind = pa.large_string()
    large = [pa.scalar(part, kind) if isinstance(part, str) else part.cast(kind) for part in (*parts, separator)]
    return pc.binary_join_element_wise(*large)


def _parse_json(lines: pa.Array, schema: pa.Schema) -> pa.Table:
    """One object a line. Arrow would also take two objects of one line for two rows."""
    text = pa.py_buffer(_text_of(_join(lines, "\n")))
    found = pyarrow.json.read_json(
        pa.BufferReader(text),
        pyarrow.json.ReadOptions(block_size=text.size + 1, use_threads=False),
        pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    if len(found) != len(lines):
        raise pa.ArrowInvalid(f"{len(found)} objects in {len(lines)} lines")
    return found


def _loaded(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _problem(value: Any, field: Field) -> str:
    """What of a value is not as it should be; empty: nothing. A missing id is another matter."""
    kind = int if field.integers else str
    if field.is_list and not isinstance(value, list):
        return repr(value)[:100]
    for part in value if field.is_list else [value]:
        fits = type(part) is kind and is_64_bits(part)
        if part is not None and not fits:
            return f"{part!r} ({type(part).__name__})"[:100]
    return ""


def _as_text(column: Added, quote: bool) -> pa.Array:
    """Numbers and ids as JSON has them; lists in brackets. `quote`: also what is no list."""
    text = column.values
    if pa.types.is_string(text.type):
        if quote or column.offsets is not None:
            text = _json_strings(text)
    else:
        text = text.cast(pa.string())
    if column.offsets is None:
        return text
    lists = pa.LargeListArray.from_arrays(column.offsets, text.cast(pa.large_string()))
    return _join("[", pc.binary_join(lists, pa.scalar(",", pa.large_string())), "]")


def _json_strings(values: pa.Array) -> pa.Array:
    special = pc.match_substring_regex(values, _SPECIAL_IN_JSON)
    if pc.any(special).as_py():
        return pa.array([json.dumps(value, ensure_ascii=False) for value in values.to_pylist()], pa.string())
    return _join('"', values, '"')
