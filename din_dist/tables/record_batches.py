"""Opens a file of any format and yields its rows as record batches. No other module reads the rows of a file.

`read_columns` yields some columns, as values. `read_rows` yields whole rows, which can be written again as they came.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.errors import InputError
from din_dist.tables import csv_files, json_lines
from din_dist.tables.formats import Format, reading, shown_names
from din_dist.tables.sources import partition_of
from din_dist.tables.storage import File, readable
from din_dist.tables.text_files import blocks_of_lines

_FLOATS = {pa.int64(): pa.float64(), pa.list_(pa.int64()): pa.list_(pa.float64())}
ROWS_PER_BATCH = 1 << 18  # of Parquet, where columns are read


@dataclasses.dataclass(frozen=True)
class Layout:
    """The columns of a file, and where their values come from.

    Attributes:
        names: the names of all columns; one that a file has twice is there twice.
        partition: the columns that the names of the file's folders give, with their values; see `partition_of`.
        json_types: JSON lines only: the type of each field.
        late: JSON lines only: the columns that begin after the first rows.
    """

    names: tuple[str, ...]
    partition: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    json_types: Mapping[str, pa.DataType] = dataclasses.field(default_factory=dict)
    late: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        file: File,
        form: Format,
        wanted: Sequence[str],
        numbers: Collection[str] = (),
        lists: Collection[str] = (),
    ) -> Layout | None:
        """Returns the layout of a file, or None if it has no rows that could tell it.

        Args:
            file: the file to look at.
            form: its format.
            wanted: the columns to look for in all rows of JSON lines, and in the names of folders.
            numbers: the columns of JSON lines in which 1 and 1.0 are of one kind.
            lists: the columns of JSON lines that may hold lists.

        Raises:
            InputError: the file is damaged.
        """
        types: dict[str, pa.DataType] = {}
        late: list[str] = []
        if form is Format.JSON_LINES:
            with reading(file, form):
                types, late = json_lines.field_types(file, wanted, lists)
            if not types:
                return None
            types |= {name: _FLOATS[types[name]] for name in numbers if types.get(name) in _FLOATS}
        names = list(types) if form is Format.JSON_LINES else column_names(file, form)
        told = partition_of(file, [name for name in wanted if name not in names])
        partition = {name: value for name, value in told.items() if name not in names}
        return cls((*names, *partition), partition, types, tuple(late))


def require_columns(layouts: Mapping[File, Layout], names: Sequence[str], remedy: str) -> None:
    """Checks that each file has each of the columns once.

    Args:
        layouts: the layout of each file.
        names: the columns.
        remedy: what to do otherwise.

    Raises:
        InputError: a file lacks a column.
    """
    for (file, layout), name in itertools.product(layouts.items(), names):
        count = layout.names.count(name)
        if count != 1:
            raise InputError(
                f"{file}: column {name!r} {'occurs more than once' if count else 'is missing'}. "
                f"Received: {shown_names(layout.names)} {remedy}"
            )


def column_names(file: File, form: Format) -> tuple[str, ...]:
    """Returns the names of a file's own columns; of JSON lines those of its first row, if there is one.

    Raises:
        InputError: the file is damaged.
    """
    with reading(file, form):
        match form:
            case Format.PARQUET:
                return tuple(pq.read_schema(readable(file)).names)
            case Format.CSV:
                return tuple(csv_files.column_names(file))
    first = next((batch.column(0)[0].as_py() for batch in _read_lines(file) if len(batch)), None)
    return () if first is None else tuple(json_lines.parse_line(file, 1, first.encode()))


# --- Columns. ---


def read_columns(
    file: File, form: Format, layout: Layout, names: Sequence[str], row_groups: list[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yields the columns `names`; those that the names of folders give are text.

    Args:
        file: the file to read.
        form: its format.
        layout: its layout.
        names: the columns to read.
        row_groups: of Parquet, the row groups to read; None: all.

    Raises:
        InputError: the file is damaged; the text names the row where it can.
    """
    inside = [name for name in names if name not in layout.partition]
    own = _read_own_columns(file, form, layout, inside) if row_groups is None else None
    for batch in own or _read_parquet(file, ROWS_PER_BATCH, columns=inside, row_groups=row_groups):
        for name in names:
            if name in layout.partition:
                batch = batch.append_column(name, pa.repeat(pa.scalar(layout.partition[name], pa.string()), len(batch)))
        yield batch


def _read_own_columns(file: File, form: Format, layout: Layout, names: list[str]) -> Iterator[pa.RecordBatch]:
    match form:
        case Format.PARQUET:
            yield from _read_parquet(file, ROWS_PER_BATCH, columns=names)
        case Format.CSV:
            yield from _read_csv(file, names)
        case Format.JSON_LINES:
            types = {name: layout.json_types[name] for name in names}
            with reading(file, form, lambda: json_lines.find_fault(file, types)):
                yield from json_lines.read_fields(file, types)


# --- Whole rows. ---


def read_rows(
    file: File, form: Format, first_row: int = 0, rows_per_batch: int = ROWS_PER_BATCH
) -> Iterator[pa.RecordBatch]:
    """Yields whole rows: all columns of Parquet, all of CSV as text, or lines of JSON as the column `json_lines.LINE`.

    Args:
        file: the file to read.
        form: its format.
        first_row: the row to begin at, from 0.
        rows_per_batch: the most rows of a batch of Parquet. Text comes in blocks of some MiB.

    Raises:
        InputError: the file is damaged; the text names the row where it can.
    """
    match form:
        case Format.PARQUET:
            start, groups = _groups_from(file, first_row)
            # Buffered: otherwise whole columns of a row group are in memory.
            options = {"buffer_size": 1 << 20, "pre_buffer": False}
            batches = _read_parquet(file, rows_per_batch, row_groups=groups, options=options)
            yield from _without_first(batches, first_row - start)
        case Format.CSV:
            names = column_names(file, form)
            if len(set(names)) < len(names):
                raise InputError(
                    f"{file}: columns must have different names. Received: {shown_names(names)} Correct the header."
                )
            yield from _without_first(_read_csv(file, names), first_row)
        case Format.JSON_LINES:
            yield from _without_first(_read_lines(file), first_row)


def _groups_from(file: File, row: int) -> tuple[int, list[int]]:
    """Returns the first row of the row group that has `row`, and the numbers of that group and of those after it."""
    with reading(file, Format.PARQUET), pq.ParquetFile(readable(file)) as parquet:
        found = parquet.metadata
        ends = np.cumsum([found.row_group(number).num_rows for number in range(found.num_row_groups)])
    skipped = int(np.searchsorted(ends, row, side="right"))
    return int(ends[skipped - 1]) if skipped else 0, list(range(skipped, len(ends)))


def _without_first(batches: Iterator[pa.RecordBatch], num_rows: int) -> Iterator[pa.RecordBatch]:
    """Yields batches without the first `num_rows` rows of all."""
    for batch in batches:
        if num_rows < len(batch):
            yield batch.slice(num_rows)
        num_rows = max(0, num_rows - len(batch))


def whole(column: pa.ChunkedArray) -> pa.Array:
    """Returns a column in one piece, without a dictionary."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    found = column.combine_chunks()
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


# --- Formats. ---


def _read_parquet(
    file: File,
    rows_per_batch: int,
    columns: list[str] | None = None,
    row_groups: list[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[pa.RecordBatch]:
    with reading(file, Format.PARQUET), pq.ParquetFile(readable(file), **(options or {})) as parquet:
        yield from parquet.iter_batches(rows_per_batch, row_groups=row_groups, columns=columns)


def _read_csv(file: File, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with reading(file, Format.CSV, lambda: csv_files.find_fault(file, names)):
        yield from csv_files.read_columns(file, names)


def _read_lines(file: File) -> Iterator[pa.RecordBatch]:
    """Yields the lines of a file that are not blank. An empty file is a table without rows."""
    if not file.stat().st_size:
        return
    row = 0
    with reading(file, Format.JSON_LINES, lambda: f", row {row + 1}"):
        for block in blocks_of_lines(file):
            lines = json_lines.lines_of(file, block, row)
            row += len(lines)
            yield lines
