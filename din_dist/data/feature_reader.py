"""Reads the columns of declared features: from the log, from tables, and from files of vectors.

Letters of shapes: E events, n owners (users or items), R rows of a table, D numbers of a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from din_dist import progress
from din_dist.data.column_readers import ColumnReaders, names_of
from din_dist.data.feature_tables import OffersTable, OwnerTable, counts_of, first_repetition, rows_of_ids, with_row_0
from din_dist.data.raw_columns import TABLES, RawColumn, RawColumns, RawFeature, TableCounts
from din_dist.errors import InputError
from din_dist.features.offers import Offers
from din_dist.features.spec import FeatureConflict, Kind, Owner
from din_dist.files import read_text
from din_dist.tables.columns import Rows
from din_dist.tables.values import ColumnValues, IdValues, VectorValues
from din_dist.text import reason, shown

_ROWS_AT_ONCE = 1 << 14  # of a file of vectors
_LARGEST_FLOAT16 = 65504.0


@dataclasses.dataclass(frozen=True, eq=False)
class OwnerIds:
    """The users or the items of a log.

    Attributes:
        of_event: int32, the owner of each row that was read, from 0: of E events in the order of the files, and then of
            behaviours; -1 for a row that was left out.
        ids: their own ids `[n]`.
        without_id: how many of the last are items that stand for behaviours without an id, told by categories alone.
    """

    of_event: np.ndarray
    ids: pa.Array
    without_id: int = 0

    def told_by(self, kind: Kind) -> np.ndarray:
        """Returns the rows that may tell a feature of a kind of their owner, bool."""
        num_told = len(self.ids) - (0 if kind is Kind.CATEGORY else self.without_id)
        return (self.of_event >= 0) & (self.of_event < num_told)


class FeatureReader:
    """Reads everything that declared features need.

    Args:
        wanted: what to read.
        user_column: the column of users' ids.
        item_column: the column of items' ids.
        has_own_behaviours: features of behaviours come from a log of their own, and not from the events.

    Raises:
        InputError: a table is missing, or its layout is wrong.
    """

    def __init__(
        self, wanted: RawColumns, user_column: str, item_column: str, has_own_behaviours: bool = False
    ) -> None:
        self._wanted, self._has_own_behaviours = wanted, has_own_behaviours
        self._tables: dict[Owner, OwnerTable] = {}
        for owner, source, id_column in (
            (Owner.ITEM, wanted.items_path, item_column),
            (Owner.USER, wanted.users_path, user_column),
        ):
            if source:
                columns = [column for column in wanted.columns if column.owner is owner and not column.path]
                self._tables[owner] = OwnerTable(source, owner, id_column, columns)
        in_tables = {column for table in self._tables.values() for column in table.columns}
        self._by = [RawColumn(Owner.CONTEXT, Kind.CATEGORY, name) for name in wanted.by]
        of_log = [column for column in wanted.columns if not (column.path or column.by or column in in_tables)]
        self.from_log = list(dict.fromkeys([*of_log, *self._by]))
        self._readers: ColumnReaders | None = None
        self.counts: dict[str, TableCounts] = {}
        self.offers: Offers | None = None
        self.item_features: dict[str, IdValues] = {}  # of `--item_features`, after `finish`
        self._shorthand: list[RawColumn] = []

        self._offers: OffersTable | None = None
        if wanted.offers_path:
            of_offers = [column for column in wanted.columns if column.by]
            self._offers = OffersTable(wanted.offers_path, item_column, of_offers, wanted.by)

    @property
    def from_behaviours(self) -> list[RawColumn]:
        """The columns of a log of behaviours alone."""
        return [column for column in self.from_log if column.owner is Owner.HISTORY and self._has_own_behaviours]

    @property
    def from_events(self) -> list[RawColumn]:
        """The columns of the log of events."""
        return [column for column in self.from_log if column not in self.from_behaviours]

    @property
    def names(self) -> list[str]:
        """The columns of the log of events that are read."""
        return names_of(self.from_events)

    def begin(self, rows: Rows, shorthand: Sequence[RawColumn] = ()) -> ColumnReaders:
        """Returns the readers of the log's columns, and of those of `--item_features`."""
        self._shorthand = list(shorthand)
        self._readers = ColumnReaders(list(dict.fromkeys([*self.from_log, *shorthand])), rows)
        return self._readers

    def read_values(self, is_text: Callable[[str], bool]) -> dict[RawColumn, ColumnValues]:
        """Returns the values of the log's columns in all rows.

        Args:
            is_text: tells of a column's name that text was read.

        Raises:
            InputError: a value breaks a rule.
        """
        assert self._readers is not None
        return self._readers.finish(is_text)

    def finish(
        self,
        in_log: Mapping[RawColumn, ColumnValues],
        owners: Mapping[Owner, OwnerIds],
        order: np.ndarray,
        behaviour_order: np.ndarray,
        rows: Rows,
    ) -> tuple[RawFeature, ...]:
        """Returns the features.

        Args:
            in_log: as from `read_values`.
            owners: the users and the items.
            order: int64 `[E]`, the order of the events in prepared data.
            behaviour_order: int64 `[P]`, that of behaviours, which are events or have a log of their own.
            rows: where rows of the log stand, for the texts of errors.

        Raises:
            InputError: an owner has two values, or a table breaks a rule.
        """
        for column in self._shorthand:
            of_items = self._of_owner(column, in_log[column], owners[Owner.ITEM], order, rows).values
            self.item_features[column.column] = _ids_of(of_items)
        orders = {Owner.CONTEXT: order, Owner.HISTORY: behaviour_order}
        found = [
            RawFeature(column, values.take(orders[column.owner]))
            if column.owner in orders
            else self._of_owner(column, values, owners[column.owner], order, rows)
            for column, values in in_log.items()
            if column in self._wanted.columns
        ]
        found += self.of_tables(owners)
        if self._offers:
            items, of_events = owners[Owner.ITEM], [_ids_of(in_log[column]).take(order) for column in self._by]
            self.offers, features, counts = self._offers.read(items.ids, items.of_event[order] + 1, of_events)
            found, self.counts[TABLES[Owner.CANDIDATE]] = [*found, *features], counts
        return (*found, *self.vectors(owners))

    def of_tables(self, owners: Mapping[Owner, OwnerIds]) -> list[RawFeature]:
        """Returns the features of tables of items and users; see `finish`. `counts` tells how the tables fit."""
        found = []
        for owner, table in self._tables.items():
            features, self.counts[TABLES[owner]] = table.read(owners[owner].ids)
            found += features
        return found

    def vectors(self, owners: Mapping[Owner, OwnerIds]) -> list[RawFeature]:
        """Returns the features that files of vectors hold; see `finish`."""
        return [read_vectors(column, owners[column.owner].ids) for column in self._wanted.columns if column.path]

    @property
    def conflict(self) -> FeatureConflict:
        """The value that counts if rows give an owner different ones."""
        return self._wanted.conflict

    def wants(self, column: RawColumn) -> bool:
        """Tells whether a column is one of a declared feature."""
        return column in self._wanted.columns

    def _of_owner(
        self, column: RawColumn, values: ColumnValues, owners: OwnerIds, order: np.ndarray, rows: Rows
    ) -> RawFeature:
        """Returns one value for each owner: that of the first event which tells one, or of the last.

        A missing value agrees with all.
        """
        given, conflict = values.given, self._wanted.conflict
        told = np.flatnonzero(given & owners.told_by(column.kind))
        chosen = np.full(len(owners.ids), -1, np.int64)
        in_turn = told if conflict is FeatureConflict.LAST else told[::-1]
        chosen[owners.of_event[in_turn]] = in_turn  # the last assignment stays
        if conflict is FeatureConflict.ERROR:
            firsts = chosen[owners.of_event[told]]
            differing = values.differ(firsts, told)
            if differing.any():
                place = int(np.argmax(differing))
                pair = int(firsts[place]), int(told[place])
                owner_id = owners.ids[int(owners.of_event[pair[1]])].as_py()
                raise two_values(column, owner_id, pair, (values.shown(pair[0]), values.shown(pair[1])), rows)
        taken = values.take(with_row_0(column.owner, chosen))
        return RawFeature(column, taken, None if given.all() else given[order])


def _ids_of(values: ColumnValues) -> IdValues:
    assert isinstance(values, IdValues)
    return values


def two_values(
    column: RawColumn, owner_id: object, pair: tuple[int, int], shown_values: tuple[str, str], rows: Rows
) -> InputError:
    """Returns the error for two rows that give their owner different values.

    Args:
        column: of the values.
        owner_id: the owner's own id.
        pair: the rows, counted over all files from 0.
        shown_values: their values as text.
        rows: where rows stand.
    """
    before, second = pair
    file, number = rows.place(before)
    return rows.reject(
        second,
        f"a feature of {TABLES[column.owner]} has one value for each, here {column.column}",
        f"{column.owner} {owner_id!r} with {shown_values[0]} ({file}, row {number}) and here with {shown_values[1]}",
        'Correct one of the two rows, or declare it with of = "context" in the file of --features. Or give '
        "--item_feature_conflict=first or last.",
    )


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
    if (twice := first_repetition(encoded.indices.to_numpy())) is not None:
        raise InputError(
            f"{ids_path}, line {twice[1] + 1}: each id stands once. Received: {shown(lines[twice[1]])}, as in line "
            f"{twice[0] + 1}. Remove one, and its vector."
        )
    found = rows_of_ids(owner_ids, pa.array(lines, pa.large_string()))
    rows = with_row_0(column.owner, found)
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
    return RawFeature(column, VectorValues(values), extra=counts_of(found, len(lines)).without_events)
