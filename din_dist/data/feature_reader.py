"""Reads the columns of declared features: from the log, from tables of items and users, and from files of vectors.

Letters of shapes: E events, n owners (users or items), R rows of a table, D numbers of a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from din_dist import progress
from din_dist.data.raw_columns import RawColumn, RawColumns, RawFeature, TableCounts
from din_dist.errors import InputError
from din_dist.features.spec import Kind, Owner
from din_dist.files import read_text
from din_dist.tables.columns import IdColumn, Rows
from din_dist.tables.formats import Format, format_of
from din_dist.tables.record_batches import Layout, read_columns, require_columns
from din_dist.tables.sources import find_files
from din_dist.tables.value_columns import ListColumn, value_column
from din_dist.tables.values import ColumnValues, VectorValues
from din_dist.text import reason, shown

REMEDY = "Correct the file, or the column in the file of --features"
_ROWS_AT_ONCE = 1 << 14  # of a file of vectors
_LARGEST_FLOAT16 = 65504.0
_TABLES = {Owner.ITEM: "items", Owner.USER: "users"}


@dataclasses.dataclass(frozen=True, eq=False)
class OwnerIds:
    """The users or the items of a log.

    Attributes:
        of_event: int32 `[E]`, the owner of each event from 0, in the order of the files.
        ids: their own ids `[n]`.
    """

    of_event: np.ndarray
    ids: pa.Array


def number_names(columns: Iterable[RawColumn], others: Collection[str]) -> list[str]:
    """Returns the columns that are read as numbers alone.

    Args:
        columns: the columns of features.
        others: the columns that are read for other purposes.
    """
    columns = list(columns)
    as_ids = {column.column for column in columns if column.kind in (Kind.CATEGORY, Kind.CATEGORIES)} | set(others)
    numbers = [column.column for column in columns if column.kind in (Kind.NUMBER, Kind.VECTOR)]
    numbers += [column.weights for column in columns]
    return [name for name in dict.fromkeys(numbers) if name and name not in as_ids]


def names_of(columns: Iterable[RawColumn]) -> list[str]:
    """Returns the names of the columns of a file, each once."""
    return list(dict.fromkeys(name for column in columns for name in column.names))


class ColumnReaders:
    """Readers of some columns of one log or table, which are given batch after batch."""

    def __init__(self, columns: Sequence[RawColumn], rows: Rows) -> None:
        self._readers = {
            column: value_column(column.kind, column.column, rows, column.separator, column.weights)
            for column in columns
        }

    def add(self, batch: pa.RecordBatch, layout: Layout) -> None:
        """Takes the next batch.

        Raises:
            InputError: a value breaks a rule.
        """
        for column, reader in self._readers.items():
            if column.weights and isinstance(reader, ListColumn):
                reader.add_weighted(batch.column(column.column), batch.column(column.weights))
            else:
                reader.add(batch.column(column.column), column.column in layout.partition)

    def finish(self, is_text: Callable[[str], bool]) -> dict[RawColumn, ColumnValues]:
        """Returns the values of all batches; `is_text` tells of a column's name that text was read."""
        return {column: reader.finish(is_text(column.column)) for column, reader in self._readers.items()}


class FeatureReader:
    """Reads everything that declared features need.

    Args:
        wanted: what to read.
        user_column: the column of users' ids.
        item_column: the column of items' ids.

    Raises:
        InputError: a table is missing, or its layout is wrong.
    """

    def __init__(self, wanted: RawColumns, user_column: str, item_column: str) -> None:
        self._wanted = wanted
        self._tables: dict[Owner, _Table] = {}
        for owner, source, id_column in (
            (Owner.ITEM, wanted.items_path, item_column),
            (Owner.USER, wanted.users_path, user_column),
        ):
            if source:
                columns = [column for column in wanted.columns if column.owner is owner and not column.path]
                self._tables[owner] = _Table(source, owner, id_column, columns)
        in_tables = {column for table in self._tables.values() for column in table.columns}
        self.from_log = [column for column in wanted.columns if not column.path and column not in in_tables]
        self._readers: ColumnReaders | None = None
        self.counts: dict[str, TableCounts] = {}

    @property
    def names(self) -> list[str]:
        """The columns of the log that are read."""
        return names_of(self.from_log)

    def begin(self, rows: Rows) -> ColumnReaders:
        """Returns the readers of the log's columns."""
        self._readers = ColumnReaders(self.from_log, rows)
        return self._readers

    def finish(
        self, owners: Mapping[Owner, OwnerIds], order: np.ndarray, rows: Rows, is_text: Callable[[str], bool]
    ) -> tuple[RawFeature, ...]:
        """Returns the features.

        Args:
            owners: the users and the items.
            order: int64 `[E]`, the order of the events in prepared data.
            rows: where rows of the log stand, for the texts of errors.
            is_text: tells of a column's name that text was read.

        Raises:
            InputError: an owner has two values, or a table breaks a rule.
        """
        assert self._readers is not None
        found = [
            RawFeature(column, values.take(order))
            if column.owner is Owner.CONTEXT
            else _of_owner(column, values, owners[column.owner], order, rows)
            for column, values in self._readers.finish(is_text).items()
        ]
        for owner, table in self._tables.items():
            found += table.read(owners[owner].ids)
            assert table.counts is not None
            self.counts[_TABLES[owner]] = table.counts
        found += [read_vectors(column, owners[column.owner].ids) for column in self._wanted.columns if column.path]
        return tuple(found)


def _with_row_0(owner: Owner, rows: np.ndarray) -> np.ndarray:
    """Returns the rows of owners with one for item 0, which has no value."""
    return np.concatenate([[-1], rows]).astype(np.int64) if owner is Owner.ITEM else rows.astype(np.int64)


def _of_owner(column: RawColumn, values: ColumnValues, owners: OwnerIds, order: np.ndarray, rows: Rows) -> RawFeature:
    """Returns one value for each owner: that of the first event which tells one. A missing value agrees with all."""
    given = values.given
    told = np.flatnonzero(given)
    first = np.full(len(owners.ids), -1, np.int64)
    first[owners.of_event[told[::-1]]] = told[::-1]  # the last assignment stays, which is the first row's
    firsts = first[owners.of_event[told]]
    differing = values.differ(firsts, told)
    if differing.any():
        place = int(np.argmax(differing))
        second, before = int(told[place]), int(firsts[place])
        file, number = rows.place(before)
        owner_id = owners.ids[int(owners.of_event[second])].as_py()
        raise rows.reject(
            second,
            f"a feature of {_TABLES[column.owner]} has one value for each, here {column.column}",
            f"{column.owner} {owner_id!r} with {values.shown(before)} ({file}, row {number}) "
            f"and here with {values.shown(second)}",
            'Correct one of the two rows, or write of = "context" in the file of --features.',
        )
    taken = values.take(_with_row_0(column.owner, first))
    return RawFeature(column, taken, None if given.all() else given[order])


class _Table:
    """A table of items or users.

    Args:
        source: its files.
        owner: whose table it is.
        id_column: the column of their ids.
        columns: the columns of features of this owner; those that the table lacks come from the log.
    """

    def __init__(self, source: str, owner: Owner, id_column: str, columns: Sequence[RawColumn]) -> None:
        flag = f"--{_TABLES[owner]}_path"
        self._files = find_files(source, flag, f"table of {_TABLES[owner]}").files
        self._form = format_of(self._files[0]) or Format.PARQUET
        self._owner, self._id_column, self._source, self._flag = owner, id_column, source, flag
        names = [id_column, *names_of(columns)]
        numbers, lists = number_names(columns, [id_column]), names_of(columns)
        layouts = {file: Layout.of(file, self._form, names, numbers, lists) for file in self._files}
        self._layouts = {file: layout for file, layout in layouts.items() if layout}
        anywhere = set().union(*(layout.names for layout in self._layouts.values()))
        self.columns = [
            column for column in columns if anywhere.issuperset(column.names) and id_column != column.column
        ]
        self._names = list(dict.fromkeys([id_column, *names_of(self.columns)]))
        require_columns(self._layouts, self._names, f"{REMEDY}, or --{owner}_column.")
        self.counts: TableCounts | None = None

    def read(self, owner_ids: pa.Array) -> list[RawFeature]:
        """Returns the values of the owners with these ids.

        Raises:
            InputError: an id stands twice, or a value breaks a rule.
        """
        rows = Rows(f"row of a table of {_TABLES[self._owner]}")
        ids, readers = IdColumn(self._id_column, rows), ColumnReaders(self.columns, rows)
        for file, layout in self._layouts.items():
            rows.begin(file)
            for batch in filter(len, read_columns(file, self._form, layout, self._names)):
                progress.note()
                ids.add(batch.column(self._id_column), self._id_column in layout.partition)
                readers.add(batch, layout)
                rows.advance(batch.num_rows)
        if not rows.count:
            raise InputError(f"{self._source}: a table must have rows. Received: none. Correct {self._flag}.")
        from_folders = set().union(*(layout.partition for layout in self._layouts.values()))

        def is_text(name: str) -> bool:
            return self._form is Format.CSV or name in from_folders

        codes, table_ids = ids.finish(is_text(self._id_column))
        if (twice := _first_repetition(codes)) is not None:
            first, second = twice
            file, number = rows.place(first)
            raise rows.reject(
                second,
                f"each {self._owner} has one row of its table",
                f"{self._id_column}={shown(table_ids[int(codes[second])].as_py())} here and in {file}, row {number}",
                "Remove one of the two rows.",
            )
        found = rows_of_ids(owner_ids, table_ids)
        self.counts = _counts(found, len(table_ids))
        if self.counts.without_events == self.counts.rows:
            raise InputError(
                f"{self._source}: its ids must be those of the log. Received: none that the log has, for example "
                f"{shown(table_ids[0].as_py())}. Correct {self._flag}, or the column {self._id_column}."
            )
        of_owner = _with_row_0(self._owner, found)
        return [
            RawFeature(column, values.take(of_owner), extra=self.counts.without_events)
            for column, values in readers.finish(is_text).items()
        ]


def rows_of_ids(owner_ids: pa.Array, table_ids: pa.Array) -> np.ndarray:
    """Returns the row of each owner in a table, int64 `[n]`; -1 for none. Ids of different types match as text.

    Args:
        owner_ids: `[n]`.
        table_ids: `[R]`, each once.
    """
    if owner_ids.type != table_ids.type:
        owner_ids, table_ids = owner_ids.cast(pa.large_string()), table_ids.cast(pa.large_string())
    return pc.index_in(owner_ids, table_ids).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _counts(rows_of_owners: np.ndarray, num_rows: int) -> TableCounts:
    matched = int(np.count_nonzero(rows_of_owners >= 0))
    return TableCounts(num_rows, num_rows - matched, len(rows_of_owners) - matched)


def _first_repetition(codes: np.ndarray) -> tuple[int, int] | None:
    """Returns the first row whose code an earlier row has, after that row; codes follow first appearance."""
    before = np.maximum.accumulate(np.concatenate([[-1], codes[:-1]]))
    repeated = np.flatnonzero(codes <= before)
    if not len(repeated):
        return None
    second = int(repeated[0])
    return int(np.argmax(codes == codes[second])), second


def read_vectors(column: RawColumn, owner_ids: pa.Array) -> RawFeature:
    """Reads an .npy file of vectors, and the text file with the id of each row.

    Args:
        column: names both files.
        owner_ids: own ids `[n]`.

    Raises:
        InputError: a file cannot be read, or the two do not fit each other.
    """
    path, ids_path = Path(column.path), Path(column.ids)
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        is_matrix = isinstance(vectors, np.ndarray) and vectors.ndim == 2 and vectors.dtype.kind in "fiu"
        if not is_matrix or not vectors.shape[1]:
            raise ValueError(f"{vectors.dtype} of shape {vectors.shape}" if hasattr(vectors, "shape") else "an archive")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: must be an .npy file of numbers with one vector a row. Received: {reason(error)}. Correct path "
            "in the file of --features."
        ) from error
    try:
        lines = read_text(ids_path).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{ids_path}: must be text in UTF-8 with one id a line. Received: {reason(error)}. Correct ids in the file "
            "of --features."
        ) from error
    if len(lines) != len(vectors):
        raise InputError(
            f"{ids_path}: must have one id for each row of {path}. Received: {len(lines):,} lines and "
            f"{len(vectors):,} rows. Correct one of the two."
        )
    encoded = pa.array(lines, pa.large_string()).dictionary_encode()
    if (twice := _first_repetition(encoded.indices.to_numpy())) is not None:
        raise InputError(
            f"{ids_path}, line {twice[1] + 1}: each id stands once. Received: {shown(lines[twice[1]])}, as in line "
            f"{twice[0] + 1}. Remove one, and its vector."
        )
    found = rows_of_ids(owner_ids, pa.array(lines, pa.large_string()))
    rows = _with_row_0(column.owner, found)
    values = np.full((len(rows), vectors.shape[1]), np.nan, np.float16)
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        progress.note()
        given = first + np.flatnonzero(rows[first : first + _ROWS_AT_ONCE] >= 0)
        part = np.asarray(vectors[rows[given]], np.float64)
        wrong = ~(np.abs(part) <= _LARGEST_FLOAT16).all(axis=1)
        if wrong.any():
            row = int(rows[given[int(np.argmax(wrong))]])
            raise InputError(
                f"{path}, row {row + 1}: must hold numbers up to {_LARGEST_FLOAT16:g}, none of them NaN or infinite. "
                f"Received: {shown(vectors[row].tolist())}. Correct it, or remove the row and its id."
            )
        values[given] = part
    return RawFeature(column, VectorValues(values), extra=_counts(found, len(lines)).without_events)
