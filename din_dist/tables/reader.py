"""Reads the rows of a table of any size, from any row on, and their ids and times.

Letters of shapes: R rows of a batch. Rows are counted from 0 here, from 1 in messages.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from din_dist.errors import InputError
from din_dist.tables import json_lines
from din_dist.tables.columns import Rows, TimeColumn
from din_dist.tables.feature_columns import ValueField, ValueReader
from din_dist.tables.formats import Format, format_of, is_64_bits, reading
from din_dist.tables.ids import Field, IdRules, Ids, problem_of
from din_dist.tables.record_batches import read_rows, whole
from din_dist.tables.values import ColumnValues
from din_dist.text import shown


class TableReader(abc.ABC):
    """Reads one file. Rows are read on where the last call ended, if that is possible.

    Args:
        path: the file.
        list_separator: what separates the ids of a list that is written as text. Empty: no list is written so.
    """

    form: Format

    def __init__(self, path: Path, list_separator: str = "") -> None:
        self._path, self._separator = path, list_separator
        self._rules = IdRules(path, list_separator, in_text=self.form is Format.CSV)
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._held: list[pa.RecordBatch] = []
        self._position = 0
        self._times_before: dict[str, TimeColumn] = {}  # by column

    def read(self, first_row: int, num_rows: int, rows_per_batch: int) -> Iterator[pa.Table]:
        """Yields whole rows from `first_row` on, `rows_per_batch` of them in every batch but the last.

        Raises:
            InputError: the file is damaged, or ends before.
        """
        if self._batches is None or first_row < self._position:
            self._held.clear()
            self._position, self._batches = first_row, read_rows(self._path, self.form, first_row, rows_per_batch)
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
                        f"{self._path}: must stay as it is while it is read. Received: fewer rows than at the start. "
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

    @abc.abstractmethod
    def ids(self, rows: pa.Table, first_row: int, fields: Sequence[Field]) -> list[Ids]:
        """Returns the ids of each field.

        Args:
            rows: a batch, as `read` yields it.
            first_row: the row at which the batch begins.
            fields: the columns to return.

        Raises:
            InputError: an id is missing or of another type; the text names file and row.
        """

    @abc.abstractmethod
    def times(self, rows: pa.Table, first_row: int, name: str) -> np.ndarray:
        """Returns a column of times as int64 `[R]`, in the unit of prepared data.

        Args:
            rows: a batch, as `read` yields it.
            first_row: the row at which the batch begins.
            name: the column to return.

        Raises:
            InputError: a time is missing, or is no time.
        """

    @abc.abstractmethod
    def columns(self, rows: pa.Table, first_row: int, types: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
        """Returns some columns as the file has them.

        Args:
            rows: a batch, as `read` yields it.
            first_row: the row at which the batch begins.
            types: the columns, and the types that they must have in JSON lines.

        Raises:
            InputError: a value in JSON lines is of another type; the text names file and row.
        """

    def values(
        self, rows: pa.Table, first_row: int, fields: Sequence[ValueField], counts: np.ndarray
    ) -> list[ColumnValues]:
        """Returns the values of each field.

        Args:
            rows: a batch, as `read` yields it.
            first_row: the row at which the batch begins.
            fields: what to read.
            counts: int64 `[R]`, the number of each row's candidates, for fields that have a value for each.

        Raises:
            InputError: a value breaks a rule; the text names file and row.
        """
        types = {name: kind for field in fields for name, kind in field.json_types.items()}
        found = self.columns(rows, first_row, types)
        reader = ValueReader(self._path, self.form is Format.CSV, self._separator)
        return [reader.read(found, field, first_row, counts) for field in fields]

    def reject(self, row: int, rule: str, received: str) -> InputError:
        """Returns the error for a row that breaks a rule."""
        return self._rules.reject(row, rule, received)

    def _checked_times(self, column: pa.Array, first_row: int, name: str) -> np.ndarray:
        rows = Rows()
        rows.begin(self._path)
        rows.advance(first_row)
        times = TimeColumn(name, rows, self._times_before.get(name))
        times.add(column)
        self._times_before[name] = times
        return times.finish()


def open_table(path: Path, list_separator: str = "") -> TableReader:
    """Returns the reader of a file, by its name; see `TableReader`."""
    match format_of(path):
        case Format.PARQUET:
            return _ParquetReader(path, list_separator)
        case Format.CSV:
            return _CsvReader(path, list_separator)
        case Format.JSON_LINES:
            return _JsonLinesReader(path, list_separator)
    raise ValueError(path)


class _ParquetReader(TableReader):
    form = Format.PARQUET

    def ids(self, rows: pa.Table, first_row: int, fields: Sequence[Field]) -> list[Ids]:
        with reading(self._path, self.form):
            return [self._rules.check(whole(rows.column(field.name)), field, first_row) for field in fields]

    def times(self, rows: pa.Table, first_row: int, name: str) -> np.ndarray:
        with reading(self._path, self.form):
            return self._checked_times(whole(rows.column(name)), first_row, name)

    def columns(self, rows: pa.Table, first_row: int, types: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
        with reading(self._path, self.form):
            return {name: whole(rows.column(name)) for name in types}


class _CsvReader(TableReader):
    form = Format.CSV

    def ids(self, rows: pa.Table, first_row: int, fields: Sequence[Field]) -> list[Ids]:
        found = []
        for field in fields:
            column = whole(rows.column(field.name))
            if field.is_list and self._separator:  # the only way to write an empty list
                column = column.fill_null("")
            found.append(self._rules.check(column, field, first_row))
        return found

    def times(self, rows: pa.Table, first_row: int, name: str) -> np.ndarray:
        return self._checked_times(whole(rows.column(name)), first_row, name)

    def columns(self, rows: pa.Table, first_row: int, types: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
        return {name: whole(rows.column(name)) for name in types}


class _JsonLinesReader(TableReader):
    form = Format.JSON_LINES

    def ids(self, rows: pa.Table, first_row: int, fields: Sequence[Field]) -> list[Ids]:
        lines = whole(rows.column(json_lines.LINE))
        types = {}
        for field in fields:
            kind = pa.int64() if field.integers else pa.string()
            types[field.name] = pa.list_(kind) if field.is_list and not self._separator else kind
            if field.is_list and self._separator:
                types[field.name] = pa.string()
        try:
            found = json_lines.parse_lines(lines, pa.schema(types))
        except pa.ArrowException as error:
            raise self._rejected_lines(lines, first_row, fields, error) from None
        return [self._rules.check(whole(found.column(field.name)), field, first_row) for field in fields]

    def times(self, rows: pa.Table, first_row: int, name: str) -> np.ndarray:
        lines = whole(rows.column(json_lines.LINE))
        for kind in (pa.int64(), pa.float64(), pa.string()):  # text: dates
            with contextlib.suppress(pa.ArrowException):
                found = json_lines.parse_lines(lines, pa.schema({name: kind}))
                return self._checked_times(whole(found.column(name)), first_row, name)
        raise self._rejected_times(lines, first_row, name)

    def columns(self, rows: pa.Table, first_row: int, types: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
        lines = whole(rows.column(json_lines.LINE))
        try:
            found = json_lines.parse_lines(lines, pa.schema(dict(types)))
        except pa.ArrowException as error:
            raise self._rejected_values(lines, first_row, types, error) from None
        return {name: whole(found.column(name)) for name in types}

    def _rejected_values(
        self, lines: pa.Array, first_row: int, types: Mapping[str, pa.DataType], error: pa.ArrowException
    ) -> InputError:
        """Returns the error for the line that Arrow refused, which is looked for slowly."""
        for row, line in enumerate(lines.to_pylist(), start=first_row):
            values = json_lines.parse_line(self._path, row + 1, line.encode())
            for name, kind in types.items():
                if not _fits(values.get(name), kind):
                    rule = f"{name} must hold {_WORDS.get(kind) or kind}, as in the log of the model"
                    return self._rules.reject(row, rule, shown(values[name]))
        detail = " ".join(str(error).split())[:200]
        rule = "from here on each line must be one JSON object"
        return self._rules.reject(first_row, rule, detail, "Correct the file.")

    def _rejected_times(self, lines: pa.Array, first_row: int, name: str) -> InputError:
        """Returns the error for the line that Arrow refused, which is looked for slowly."""
        first: type | None = None
        for row, line in enumerate(lines.to_pylist(), start=first_row):
            value = json_lines.parse_line(self._path, row + 1, line.encode()).get(name)
            if value is None:
                continue
            kind = str if isinstance(value, str) else float
            if type(value) not in (str, int, float) or not is_64_bits(value) or kind is not (first or kind):
                rule = "a timestamp must be an integer (64 bits, any unit) or a date, the same in all rows"
                return self._rules.reject(row, rule, f"{name}={shown(value)}")
            first = kind
        return self._rules.reject(first_row, "from here on each line must be one JSON object", "another text")

    def _rejected_lines(
        self, lines: pa.Array, first_row: int, fields: Sequence[Field], error: pa.ArrowException
    ) -> InputError:
        """Returns the error for the line that Arrow refused, which is looked for slowly."""
        for row, line in enumerate(lines.to_pylist(), start=first_row):
            values = json_lines.parse_line(self._path, row + 1, line.encode())
            for field in fields:
                value = values.get(field.name)
                is_text_list = field.is_list and bool(self._separator) and isinstance(value, str)
                if value is not None and not is_text_list and (problem := problem_of(value, field)):
                    if field.is_list and not isinstance(value, list):
                        return self._rules.reject(row, f"{field.name} must be a list", problem)
                    return self._rules.other_type(row, field, problem)
        detail = " ".join(str(error).split())[:200]
        rule = "from here on each line must be one JSON object"
        return self._rules.reject(first_row, rule, detail, "Correct the file.")


_WORDS = {pa.string(): "text", pa.int64(): "integers", pa.float64(): "numbers"}


def _fits(value: Any, kind: pa.DataType) -> bool:
    """Tells whether a JSON value is of a type; a missing one is of every type."""
    if value is None:
        return True
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(_fits(part, kind.value_type) for part in value)
    wanted = {pa.string(): (str,), pa.int64(): (int,), pa.float64(): (int, float)}[kind]
    return type(value) in wanted and (type(value) is not int or is_64_bits(value))
