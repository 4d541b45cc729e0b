"""Reads tables beside the log: one row for each item or user, or one for each offer.

An offer is what an item is like under circumstances of an event: its price in a store, its promotion in a week. So a
drawn negative has one as well.

Letters of shapes: E events, n owners (users or items), R rows of a table, K offers that are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from din_dist.data.column_readers import ColumnReaders, names_of
from din_dist.data.raw_columns import TABLES, RawColumn, RawFeature, TableCounts
from din_dist.data.table_files import TableFiles
from din_dist.errors import InputError
from din_dist.features.offers import Offers, places_in
from din_dist.features.spec import Owner
from din_dist.tables.columns import IdColumn, plain
from din_dist.tables.value_columns import ValueRows
from din_dist.tables.values import IdValues
from din_dist.text import shown

REMEDY = "Correct the file, or the column in the file of --features"


class OwnerTable:
    """A table of items or users.

    Args:
        source: its files.
        owner: whose table it is.
        id_column: the column of their ids.
        columns: the columns of features of this owner; those that the table lacks come from the log.
    """

    def __init__(self, source: str, owner: Owner, id_column: str, columns: Sequence[RawColumn]) -> None:
        self._files = TableFiles(source, TABLES[owner], [id_column], columns)
        self._owner, self._id_column = owner, id_column
        self.columns = [
            column for column in columns if self._files.anywhere.issuperset(column.names) and id_column != column.column
        ]
        self._names = list(dict.fromkeys([id_column, *names_of(self.columns)]))
        self._files.require(self._names, f"{REMEDY}, or --{owner}_column.")

    def read(self, owner_ids: pa.Array) -> tuple[list[RawFeature], TableCounts]:
        """Returns the values of the owners with these ids, and how the table fits the log.

        Raises:
            InputError: an id stands twice, or a value breaks a rule.
        """
        files, rows = self._files, self._files.rows
        ids, readers = IdColumn(self._id_column, rows), ColumnReaders(self.columns, rows)
        for batch, layout in files.batches(self._names):
            ids.add(batch.column(self._id_column), self._id_column in layout.partition)
            readers.add(batch, layout)
        codes, table_ids = ids.finish(files.is_text(self._id_column))
        if (twice := first_repetition(codes)) is not None:
            first, second = twice
            file, number = rows.place(first)
            raise rows.reject(
                second,
                f"each {self._owner} has one row of its table",
                f"{self._id_column}={shown(table_ids[int(codes[second])].as_py())} here and in {file}, row {number}",
                "Remove one of the two rows.",
            )
        found = rows_of_ids(owner_ids, table_ids)
        counts = counts_of(found, len(table_ids))
        if counts.without_events == counts.rows:
            raise _no_common_ids(files, self._id_column, table_ids[0])
        of_owner = with_row_0(self._owner, found)
        values = readers.finish(files.is_text)
        return [
            RawFeature(column, taken.take(of_owner), extra=counts.without_events) for column, taken in values.items()
        ], counts


class OffersTable:
    """A table of offers. Only the rows are kept whose item and circumstances the log has.

    Args:
        source: its files.
        item_column: the column of items' ids.
        columns: the columns of features.
        by: the columns of the log which, with the item, name a row.
    """

    def __init__(self, source: str, item_column: str, columns: Sequence[RawColumn], by: Sequence[str]) -> None:
        self._files = TableFiles(source, TABLES[Owner.CANDIDATE], [item_column, *by], columns)
        self._item_column, self._by, self._columns = item_column, list(by), columns
        self._names = list(dict.fromkeys([item_column, *by, *names_of(columns)]))
        self._files.require(self._names, f"{REMEDY}, or --item_column.")

    def read(
        self, item_ids: pa.Array, item_of: np.ndarray, of_events: Sequence[IdValues]
    ) -> tuple[Offers, list[RawFeature], TableCounts]:
        """Returns the offers, their features with row 0 for those that are missing, and how the table fits the log.

        Args:
            item_ids: own ids of the log's items.
            item_of: int32 `[E]`, the item of each event, from 1.
            of_events: the values `[E]` of each column of `by` in the log, in the order of `item_of`.

        Raises:
            InputError: a value breaks a rule, or the table and the log have no row in common.
        """
        files, rows = self._files, self._files.rows
        circumstances, items = _Circumstances(of_events), _Finder(item_ids)
        columns = [_Finder(values.ids) for values in of_events]
        kept_rows = ValueRows(rows)
        readers = ColumnReaders(self._columns, kept_rows)
        keys: list[np.ndarray] = []
        example = pa.scalar(None)
        for batch, layout in files.batches(self._names):
            item = items.find(batch.column(self._item_column))
            example = example if example.is_valid else batch.column(self._item_column)[0]
            of_columns = [columns[place].find(batch.column(name)) for place, name in enumerate(self._by)]
            circumstance = circumstances.find(of_columns)
            kept = np.flatnonzero((item >= 0) & (circumstance >= 0))
            keys.append(circumstance[kept] * np.int64(len(item_ids) + 1) + item[kept] + 1)
            kept_rows.begin_batch(kept)
            readers.add(batch.take(pa.array(kept)), layout)
            kept_rows.advance(len(kept))
        all_keys = np.concatenate(keys)
        keys.clear()
        if not len(all_keys):
            raise _no_common_ids(files, ", ".join([self._item_column, *self._by]), example)
        order = np.argsort(all_keys, kind="stable")  # of repeated offers the first stays
        in_order = all_keys[order]
        first = np.concatenate([[True], in_order[1:] != in_order[:-1]])
        offers = Offers(in_order[first], circumstances.of_events, len(item_ids))
        without = int(np.count_nonzero(offers.rows(np.arange(len(item_of)), item_of) == 0))
        repeated = len(order) - int(np.count_nonzero(first))
        counts = TableCounts(rows.count, rows.count - len(order), without, repeated)
        places = np.concatenate([[-1], order[first]])
        values = readers.finish(files.is_text)
        features = [RawFeature(column, taken.take(places)) for column, taken in values.items()]
        return offers, features, counts


class _Finder:
    """Finds the places of ids among those of the log; ids of different types match as text.

    Args:
        ids: of the log.
    """

    def __init__(self, ids: pa.Array) -> None:
        self._ids = ids

    @functools.cached_property
    def _text(self) -> pa.Array:
        return self._ids.cast(pa.large_string())

    def find(self, column: pa.Array) -> np.ndarray:
        """Returns the place of each value, int64; -1 for those that the log does not have."""
        encoded = plain(column).dictionary_encode()
        values = encoded.dictionary
        ids = self._ids
        if values.type != ids.type:
            values, ids = values.cast(pa.large_string()), self._text
        places = pc.index_in(values, ids, skip_nulls=True).fill_null(-1).to_numpy(zero_copy_only=False)
        indices = encoded.indices.fill_null(len(places)).to_numpy(zero_copy_only=False)
        return np.append(places, -1).astype(np.int64)[indices]


class _Circumstances:
    """Numbers the combinations of values that events have, from 0.

    Args:
        of_events: the values `[E]` of each column.
    """

    def __init__(self, of_events: Sequence[IdValues]) -> None:
        self._known: list[np.ndarray] = []  # the numbers of combinations with each further column, ascending
        self._sizes = [len(values.ids) for values in of_events[1:]]
        places = [values.codes.astype(np.int64) - 1 for values in of_events]
        number = places[0]
        for size, place in zip(self._sizes, places[1:], strict=True):
            joint = _joint(number, place, size)
            self._known.append(np.unique(joint[joint >= 0]))
            number = places_in(self._known[-1], joint)
        self.of_events = number.astype(np.int32)

    def find(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the number of each row's combination, int64 `[R]`; -1 for those that no event has.

        Args:
            columns: the place of each row's value in each column, int64 `[R]`; -1 for none.
        """
        number = columns[0]
        for size, place, known in zip(self._sizes, columns[1:], self._known, strict=True):
            number = places_in(known, _joint(number, place, size))
        return number


def _joint(number: np.ndarray, place: np.ndarray, size: int) -> np.ndarray:
    return np.where((number >= 0) & (place >= 0), number * size + place, -1)


def _no_common_ids(files: TableFiles, columns: str, example: pa.Scalar) -> InputError:
    return InputError(
        f"{files.source}: its ids must be those of the log. Received: none that the log has, for example "
        f"{shown(example.as_py())}. Correct {files.flag}, or the column {columns}."
    )


def with_row_0(owner: Owner, rows: np.ndarray) -> np.ndarray:
    """Returns the rows of owners with one for item 0, which has no value."""
    return np.concatenate([[-1], rows]).astype(np.int64) if owner is Owner.ITEM else rows.astype(np.int64)


def rows_of_ids(owner_ids: pa.Array, table_ids: pa.Array) -> np.ndarray:
    """Returns the row of each owner in a table, int64 `[n]`; -1 for none. Ids of different types match as text.

    Args:
        owner_ids: `[n]`.
        table_ids: `[R]`, each once.
    """
    return _Finder(table_ids).find(owner_ids)


def counts_of(rows_of_owners: np.ndarray, num_rows: int) -> TableCounts:
    matched = int(np.count_nonzero(rows_of_owners >= 0))
    return TableCounts(num_rows, num_rows - matched, len(rows_of_owners) - matched)


def first_repetition(codes: np.ndarray) -> tuple[int, int] | None:
    """Returns the first row whose code an earlier row has, after that row; codes follow first appearance."""
    before = np.maximum.accumulate(np.concatenate([[-1], codes[:-1]]))
    repeated = np.flatnonzero(codes <= before)
    if not len(repeated):
        return None
    second = int(repeated[0])
    return int(np.argmax(codes == codes[second])), second
