"""Reads and checks the rows of a log on executors, by the readers of the local way, and keeps them as Parquet files.

A row's position is `file << FILE_BITS | row`: the place of its file among the sorted files, and its row there from 0.
Positions therefore have the order in which the local way reads. The columns of these files:

    position, user, item, time      int64, ids as text, int64
    label, tasks, label_time, request, session, weight, action      those that the log has; weights as bits of float32
    f0, f1, ...                     the columns of features: ids as text, or numbers as bits of float32
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from din_dist.data.column_readers import ColumnReaders, names_of
from din_dist.data.log_reader import Columns, as_bits, checked_label_times
from din_dist.data.raw_columns import RawColumn
from din_dist.errors import InputError
from din_dist.features.spec import Kind
from din_dist.files import published
from din_dist.tables.arrow_text import is_text
from din_dist.tables.columns import Column, IdColumn, LabelColumn, Rows, TimeColumn, plain
from din_dist.tables.formats import INTEGER, Format
from din_dist.tables.record_batches import Layout, read_columns
from din_dist.tables.storage import File
from din_dist.tables.value_columns import CategoryColumn, WeightColumn
from din_dist.tables.values import IdValues, NumberValues

FILE_BITS = 40
ROWS_PER_PIECE = 1 << 20  # of Parquet: what one task reads, in whole row groups


@dataclasses.dataclass(frozen=True)
class WantedColumns:
    """The columns to read of a log.

    Attributes:
        columns: those that the log has.
        features: the columns of features.
        form: the format of the files.
    """

    columns: Columns
    features: tuple[RawColumn, ...]
    form: Format

    @property
    def names(self) -> list[str]:
        """All columns to read."""
        return list(dict.fromkeys([*self.columns.names, *names_of(self.features)]))

    @property
    def schema(self) -> pa.Schema:
        """The columns of the files of rows."""
        columns = self.columns
        optional = {
            "label": (columns.label, pa.int8()),
            "tasks": (columns.tasks, pa.int16()),
            "label_time": (columns.label_time, pa.int64()),
            "request": (columns.request, pa.string()),
            "session": (columns.session, pa.string()),
            "weight": (columns.weight, pa.int32()),
            "action": (columns.action, pa.string()),
        }
        fields = {"position": pa.int64(), "user": pa.string(), "item": pa.string(), "time": pa.int64()}
        fields |= {name: kind for name, (given, kind) in optional.items() if given}
        for index, feature in enumerate(self.features):
            fields[f"f{index}"] = pa.string() if feature.kind is Kind.CATEGORY else pa.int32()
        return pa.schema(list(fields.items()))

    def id_columns(self) -> dict[str, str]:
        """Returns the columns of ids: the name in the files of rows -> the column of the log."""
        columns = self.columns
        found = {"user": columns.user, "item": columns.item, "request": columns.request, "session": columns.session}
        found["action"] = columns.action
        for index, feature in enumerate(self.features):
            if feature.kind is Kind.CATEGORY:
                found[f"f{index}"] = feature.column
        return {name: column for name, column in found.items() if column}


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a file that one task reads."""

    file: int  # its place among the files
    path: File
    layout: Layout
    first_row: int = 0
    row_groups: tuple[int, ...] | None = None

    @property
    def order(self) -> tuple[int, int]:
        """The place among all pieces."""
        return self.file, self.first_row


@dataclasses.dataclass
class Summary:
    """The facts of a piece that a task tells.

    Attributes:
        num_rows: it has.
        examples: column of the log -> its first value, of columns whose values must all be of one kind.
        integers: column of ids as text -> each is written as an integer.
        missing: name in the files of rows -> rows without a value.
        error: the text of the first broken rule; empty for none.
    """

    num_rows: int = 0
    examples: dict[str, pa.Array] = dataclasses.field(default_factory=dict)
    integers: dict[str, bool] = dataclasses.field(default_factory=dict)
    missing: dict[str, int] = dataclasses.field(default_factory=dict)
    error: str = ""


def place_of(position: int, files: Sequence[File]) -> tuple[File, int]:
    """Returns the file of a position, and the row in it from 1."""
    return files[position >> FILE_BITS], (position & ((1 << FILE_BITS) - 1)) + 1


class PositionedRows(Rows):
    """Rows that are counted by position.

    Args:
        files: all files of the log.
    """

    def __init__(self, files: Sequence[File]) -> None:
        super().__init__()
        self._all = files

    def place(self, row: int) -> tuple[File, int]:
        return place_of(int(row), self._all)


def read_piece(piece: Piece, wanted: WantedColumns, path: Path, seeds: Mapping[str, pa.Array]) -> Summary:
    """Reads a piece, checks each value, and writes its rows to `path`.

    Args:
        piece: what to read.
        wanted: the columns.
        path: the file to write.
        seeds: a value of earlier pieces for each column whose values must all be of one kind.
    """
    groups = None if piece.row_groups is None else list(piece.row_groups)
    batches = read_columns(piece.path, wanted.form, piece.layout, wanted.names, groups)
    rows = PositionedRows([*[piece.path] * (piece.file + 1)])
    summary, start = Summary(), piece.first_row
    reader = _PieceReader(wanted, rows, piece.layout, summary)
    try:
        reader.seed(seeds)
        with published(path, durable=False) as file, pq.ParquetWriter(file, wanted.schema) as writer:
            for batch in filter(len, batches):
                first = piece.file << FILE_BITS | start
                rows.count = first
                writer.write_table(reader.check(batch, first))
                start += len(batch)
    except InputError as error:
        summary.error = str(error)
    else:
        summary.num_rows = start - piece.first_row
    return summary


class _PieceReader:
    """Checks the rows of a piece batch by batch."""

    def __init__(self, wanted: WantedColumns, rows: Rows, layout: Layout, summary: Summary) -> None:
        columns = wanted.columns
        self._wanted, self._rows, self._layout, self._summary = wanted, rows, layout, summary
        self._users, self._items = IdColumn(columns.user, rows), IdColumn(columns.item, rows)
        self._times = TimeColumn(columns.timestamp, rows)
        self._labels = [LabelColumn(name, rows, not columns.tasks) for name in columns.labels]
        self._ids = {"request": IdColumn(columns.request, rows), "session": IdColumn(columns.session, rows)}
        self._ids["action"] = IdColumn(columns.action, rows, nullable=True)
        self._label_times = TimeColumn(columns.label_time, rows, self._times, True)
        self._weights = WeightColumn(columns.weight, rows)
        self._features = ColumnReaders(wanted.features, rows)

    def _columns(self) -> Iterator[Column]:
        requests, sessions, actions = self._ids.values()
        of_times: list[Column] = [self._label_times, self._weights]
        every = [self._users, self._items, self._times, *self._labels, requests, sessions, *of_times, actions]
        return filter(lambda column: column.name, every)

    def seed(self, seeds: Mapping[str, pa.Array]) -> None:
        """Gives each column a value of earlier pieces, so that it refuses other kinds."""
        if not seeds:
            return
        for column in self._columns():
            if column.name in seeds and column.name not in self._layout.partition:
                column.add(seeds[column.name])
                if isinstance(column, IdColumn):
                    column.finish(from_text=False)
                elif isinstance(column, TimeColumn):
                    column.finish()
        values = {name: seeds.get(name, pa.nulls(1)) for name in names_of(self._wanted.features)}
        if values:
            self._features.add(pa.RecordBatch.from_pydict(values), Layout(tuple(values)))
            self._features.finish(lambda name: False)

    def check(self, batch: pa.RecordBatch, first: int) -> pa.Table:
        """Returns the rows of a batch, of which the first has the position `first`."""
        for column in self._columns():
            column.add(batch.column(column.name), column.name in self._layout.partition)
        self._features.add(batch, self._layout)
        for name in self._wanted.id_columns().values():
            self._note_example(name, batch.column(name))
        for name in filter(None, (self._wanted.columns.timestamp, self._wanted.columns.label_time)):
            self._note_example(name, batch.column(name))
        found = self._finish(first)
        found["position"] = pa.array(np.arange(first, first + len(batch)), pa.int64())
        schema = self._wanted.schema
        for index in range(len(self._wanted.features)):
            name = f"f{index}"
            self._summary.missing[name] = self._summary.missing.get(name, 0) + found[name].null_count
        return pa.table({name: found[name] for name in schema.names}, schema)

    def _finish(self, first: int) -> dict[str, pa.Array]:
        columns = self._wanted.columns
        found = {"user": self._text("user", *self._users.finish(False))}
        found["item"] = self._text("item", *self._items.finish(False))
        times = self._times.finish()
        found["time"] = pa.array(times)
        labels = {column.name: column.finish() for column in self._labels if column.name}
        if columns.label in labels:
            found["label"] = pa.array(labels[columns.label].astype(np.int8))
        if columns.tasks:
            found["tasks"] = pa.array(as_bits(labels.values()).astype(np.int16))
        if columns.label_time:
            moments = checked_label_times(
                self._label_times.finish(), labels[columns.label], times, columns, self._rows, first
            )
            found["label_time"] = pa.array(moments)
        for name, column in self._ids.items():
            if column.name:
                found[name] = self._text(name, *column.finish(False))
        if columns.weight:
            found["weight"] = pa.array(self._weights.finish(False).numbers.view(np.int32))
        values = self._features.finish(lambda name: False)
        for index, feature in enumerate(self._wanted.features):
            found[f"f{index}"] = self._feature(f"f{index}", values[feature])
        return found

    def _feature(self, name: str, values: Any) -> pa.Array:
        if isinstance(values, IdValues):
            return self._text(name, values.codes - 1, values.ids)
        assert isinstance(values, NumberValues)
        return pa.array(values.numbers.view(np.int32), mask=~values.given)  # to the bit

    def _text(self, name: str, codes: np.ndarray, ids: pa.Array) -> pa.Array:
        """Returns ids as text, and notes whether text is written as integers."""
        if is_text(ids.type) and len(ids):
            whole = pc.all(pc.match_substring_regex(ids, INTEGER)).as_py()
            self._summary.integers[name] = self._summary.integers.get(name, True) and whole
        return ids.cast(pa.string()).take(pa.array(codes, mask=codes < 0))

    def _note_example(self, name: str, values: pa.Array) -> None:
        if name in self._summary.examples or name in self._layout.partition:
            return
        values = plain(values).drop_null()
        if is_text(values.type):
            values = values.filter(pc.not_equal(pc.binary_length(values), 0))
        elif pa.types.is_floating(values.type):
            values = values.filter(pc.invert(pc.is_nan(values)))
        if len(values):
            self._summary.examples[name] = values.slice(0, 1)


def in_conflict(wanted: WantedColumns, seeds: Mapping[str, pa.Array], examples: Mapping[str, pa.Array]) -> bool:
    """Tells whether values of two pieces are of different kinds."""
    columns, rows = wanted.columns, Rows()
    rows.begin(Path())
    for name, value in examples.items():
        if name not in seeds:
            continue
        is_time = name in (columns.timestamp, columns.label_time)
        kind = {feature.column: CategoryColumn for feature in wanted.features if feature.kind is Kind.CATEGORY}
        reader: Any = TimeColumn(name, rows) if is_time else kind.get(name, IdColumn)(name, rows)
        try:
            reader.add(seeds[name])
            reader.add(value)
        except InputError:
            return True
    return False


def settle_folders(
    wanted: WantedColumns, pieces: Iterable[Piece], seeds: Mapping[str, pa.Array], files: Sequence[File]
) -> None:
    """Refuses the name of a folder that is no integer, where other files have integers.

    Raises:
        InputError: there is one.
    """
    for piece in pieces:
        for name in wanted.id_columns().values():
            told = piece.layout.partition.get(name)
            if told and name in seeds:
                rows = PositionedRows(files)
                rows.count = piece.file << FILE_BITS
                column = IdColumn(name, rows, nullable=True)
                column.add(seeds[name])
                column.add(pa.array([told]), True)
                column.finish(False)
