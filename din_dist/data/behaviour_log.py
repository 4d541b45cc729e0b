"""Reads a log of behaviours, from which the histories of an event log's users come.

Letters of shapes: U users, E events, P behaviours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from din_dist import schema
from din_dist.data.blocks import BehaviourCounts, Behaviours
from din_dist.data.column_readers import ColumnReaders, names_of
from din_dist.data.feature_tables import rows_of_ids
from din_dist.data.raw_columns import RawColumn
from din_dist.data.table_files import TableFiles
from din_dist.errors import InputError
from din_dist.features.spec import Kind
from din_dist.tables.columns import IdColumn, Rows, TimeColumn
from din_dist.tables.sources import find_files
from din_dist.tables.storage import File
from din_dist.tables.values import ColumnValues, IdValues

OWN_LOG = "behaviours"  # the name of such a log
NO_COLUMN = "none"  # in the place of the column of items: no behaviour has an item's id


@dataclasses.dataclass(frozen=True)
class BehaviourColumns:
    """The files of a log of behaviours, and the names of its columns.

    Attributes:
        source: a file, a folder or a glob, as an absolute path.
        user: the column of users' ids.
        item: the column of items' ids; `NO_COLUMN` for none.
        timestamp: the column of times.
        action: the column of what a behaviour was; empty for none.
    """

    source: str
    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    action: str = ""

    @property
    def names(self) -> list[str]:
        """The columns that every file must have."""
        items = [] if self.item == NO_COLUMN else [self.item]
        return [self.user, *items, self.timestamp, *([self.action] if self.action else [])]

    @property
    def blocks(self) -> dict[str, type]:
        """The dtype of each array of such behaviours in a block, by its name in `schema`."""
        found: dict[str, type] = {
            schema.BLOCK_BEHAVIOUR_OFFSETS: np.int64,
            schema.BLOCK_BEHAVIOUR_ITEM_IDS: np.int32,
            schema.BLOCK_BEHAVIOUR_TIMES: np.int64,
        }
        return found | ({schema.BLOCK_BEHAVIOUR_ACTIONS: np.uint8} if self.action else {})

    def name_parts(self) -> list[str]:
        """Returns what a prepared folder's name depends on."""
        return [self.source, *self.names]

    def find(self) -> list[File]:
        """Returns the files.

        Raises:
            InputError: there is none.
        """
        return find_files(self.source, f"--{OWN_LOG}_path", "log of behaviours").files

    def settings(self) -> dict[str, Any]:
        """Returns what the fingerprint depends on besides the content of the files."""
        return {OWN_LOG: self.names}


@dataclasses.dataclass(frozen=True, eq=False)
class OwnedBehaviours:
    """Behaviours whose owners are known.

    Attributes:
        behaviours: those of the users of the event log.
        item_ids: own ids, those of the event log first, then those that only behaviours have, and at last those made
            up for the items of behaviours without an id.
        item_of_row: int32 `[rows that were read]`, the place of each row's item in `item_ids`; -1 for a row of a user
            who has no events.
        counts: how they fit the events.
        order: int64 `[P]`, the row of each behaviour among those that were read.
        actions: what they were, in the order of their codes from 1.
    """

    behaviours: Behaviours
    item_ids: pa.Array
    item_of_row: np.ndarray
    counts: BehaviourCounts
    order: np.ndarray
    actions: tuple[str, ...] = ()


class BehaviourReader:
    """Reads one log of behaviours.

    Args:
        columns: its files and columns.
        of_items: the columns of features of items. A file may lack some.
        of_behaviours: the columns of features of behaviours.
        rows: where rows stand; those of the event log come before.

    Raises:
        InputError: a file is missing or damaged, or lacks a column.
    """

    def __init__(
        self,
        columns: BehaviourColumns,
        of_items: Sequence[RawColumn],
        of_behaviours: Sequence[RawColumn],
        rows: Rows,
    ) -> None:
        self._columns, self._rows = columns, rows
        self._files = TableFiles(columns.source, OWN_LOG, columns.names, [*of_items, *of_behaviours], rows)
        here = [column for column in of_items if self._files.anywhere.issuperset(column.names)]
        self._categories = [column for column in here if column.kind is Kind.CATEGORY]
        self._first_row = 0  # where its rows begin among all that are read
        self._names = list(dict.fromkeys([*columns.names, *names_of([*here, *of_behaviours])]))
        remedy = (
            "Correct the file, or name your column (--behaviour_user_column, --behaviour_item_column, "
            "--behaviour_timestamp_column, --action_column)."
        )
        self._files.require(self._names, remedy)

    def read(self, features: ColumnReaders, times_of_events: TimeColumn) -> None:
        """Reads all files.

        Args:
            features: the readers of features, which get those of the items.
            times_of_events: their kind is that of all times.

        Raises:
            InputError: a value breaks a rule.
        """
        columns, rows = self._columns, self._rows
        self._first_row = rows.count
        item = "" if columns.item == NO_COLUMN else columns.item
        self._users, self._items = IdColumn(columns.user, rows), IdColumn(item, rows, nullable=True)
        self._times = TimeColumn(columns.timestamp, rows, times_of_events)
        self._actions = IdColumn(columns.action, rows, nullable=True)
        read = [column for column in (self._users, self._items, self._times, self._actions) if column.name]
        for batch, layout in self._files.batches(self._names):
            for column in read:
                column.add(batch.column(column.name), column.name in layout.partition)
            features.add(batch, layout)

    def finish(
        self, user_ids: pa.Array, item_ids: pa.Array, values: Mapping[RawColumn, ColumnValues]
    ) -> OwnedBehaviours:
        """Returns the behaviours of the users of the event log.

        Behaviours without an item's id get an item for each combination of the categories that they have.

        Args:
            user_ids: own ids `[U]`, in the order of the dense ids.
            item_ids: own ids of the events' items, likewise.
            values: of the columns of features, in all rows that were read.

        Raises:
            InputError: the two logs have no user in common, or item ids of two types; a behaviour tells of no item.
        """
        codes, own_ids = self._users.finish(self._files.is_text(self._users.name))
        place_of = rows_of_ids(own_ids, user_ids)
        user_of = place_of[codes]
        kept = np.flatnonzero(user_of >= 0)
        if not len(kept):
            raise InputError(
                f"--behaviours_path: must have behaviours of users of --data_path. Received: none, the first is of "
                f"{self._users.name}={own_ids[0].as_py()!r}. Correct the path, or name --behaviour_user_column."
            )
        times = self._times.finish()
        order = kept[np.lexsort((times[kept], user_of[kept]))]
        items, own_ids = np.full(len(codes), -1, np.int32), item_ids[:0]
        if self._items.name:
            items, own_ids = self._items.finish(self._files.is_text(self._items.name))
        item_of, all_ids = self._unified(items, own_ids, kept[items[kept] >= 0], item_ids)
        made_up = self._made_up(kept[items[kept] < 0], values, item_of, all_ids)
        all_ids = pa.concat_arrays([all_ids, made_up])
        counts = BehaviourCounts(len(kept), len(all_ids) - len(item_ids), len(made_up))
        codes_of_actions: np.ndarray | None = None
        actions: tuple[str, ...] = ()
        if self._actions.name:
            codes_of_actions, actions = coded_actions(self._actions)
        behaviours = Behaviours(
            offsets=np.searchsorted(user_of[order], np.arange(len(user_ids) + 1)).astype(np.int64),
            item_ids=item_of[order] + 1,
            times=times[order],
            actions=None if codes_of_actions is None else codes_of_actions[order],
        )
        return OwnedBehaviours(behaviours, all_ids, item_of, counts, order, actions)

    def is_text(self, name: str) -> bool:
        """Tells whether a column is read as text."""
        return self._files.is_text(name)

    def _unified(
        self, codes: np.ndarray, own_ids: pa.Array, kept: np.ndarray, item_ids: pa.Array
    ) -> tuple[np.ndarray, pa.Array]:
        """Returns the place of each row's item in all ids, -1 unless the row is kept, and these ids.

        Args:
            codes: int32, of each row among `own_ids`.
            own_ids: of the items of behaviours.
            kept: the rows that count.
            item_ids: of the items of events.
        """
        place_of = rows_of_ids(own_ids, item_ids)
        occurs = np.zeros(len(own_ids), bool)
        occurs[codes[kept]] = True
        new = np.flatnonzero(occurs & (place_of < 0))
        place_of[new] = len(item_ids) + np.arange(len(new))
        added = own_ids.take(pa.array(new))
        if not len(added):
            added = item_ids[:0]
        elif added.type != item_ids.type:
            if not pa.types.is_integer(added.type):
                raise InputError(
                    f"--behaviours_path: item ids must be of the type that they have in --data_path, {item_ids.type}. "
                    f"Received: {self._items.name}={added[0].as_py()!r}. Convert one of the two columns."
                )
            added = added.cast(item_ids.type)
        item_of = np.full(len(codes), -1, np.int32)
        item_of[kept] = place_of[codes[kept]]
        return item_of, pa.concat_arrays([item_ids, added])

    def _made_up(
        self, rows: np.ndarray, values: Mapping[RawColumn, ColumnValues], item_of: np.ndarray, all_ids: pa.Array
    ) -> pa.Array:
        """Returns made-up ids of the items that stand for behaviours without one, and notes the item of each.

        Args:
            rows: int64 `[K]`, behaviours without an item's id.
            values: of the columns of features.
            item_of: int32, the place of each behaviour's item, in which those of `rows` are written.
            all_ids: the ids of all other items.
        """
        if not len(rows):
            return all_ids[:0]
        columns = [found for column in self._categories if isinstance(found := values[column], IdValues)]
        names = [column.column for column in self._categories]
        codes = np.array([column.codes[self._first_row + rows] for column in columns]).reshape(len(columns), len(rows))
        told = codes.any(axis=0)
        if not told.all():
            raise self._rows.reject(
                self._first_row + int(rows[np.argmin(told)]),
                "a behaviour needs the id of its item, or a category of it",
                f"neither {self._columns.item} nor {' nor '.join(names)}" if names else f"no {self._columns.item}",
                "Fill it in, drop the row, or name columns of the files in --item_features.",
            )
        distinct, place = np.unique(codes, axis=1, return_inverse=True)
        item_of[rows] = len(all_ids) + place.reshape(-1)
        if pa.types.is_integer(all_ids.type):
            below = min(0, pc.min(all_ids).as_py() or 0)
            return pa.array(range(below - 1, below - 1 - distinct.shape[1], -1), all_ids.type)
        texts = [_combination(names, columns, combination) for combination in distinct.T]
        while pc.any(pc.is_in(pa.array(texts, all_ids.type), all_ids)).as_py():
            texts = [f"{text}'" for text in texts]
        return pa.array(texts, all_ids.type)


def _combination(names: Sequence[str], columns: Sequence[IdValues], codes: Sequence[int]) -> str:
    """Returns the text of a combination of categories, of which each code but 0 names one."""
    return ", ".join(
        f"{name}={column.ids[int(code) - 1].as_py()}"
        for name, column, code in zip(names, columns, codes, strict=True)
        if code
    )


def coded_actions(column: IdColumn) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns 1 + the place of each row's action, uint8, 0 for none, and the actions as text.

    Raises:
        InputError: there are too many.
    """
    codes, own_ids = column.finish(from_text=False)
    return (codes + 1).astype(np.uint8), texts_of_actions(own_ids, column.name)


def texts_of_actions(own_ids: pa.Array, name: str) -> tuple[str, ...]:
    """Returns the actions of a column as text.

    Raises:
        InputError: there are too many.
    """
    if len(own_ids) > schema.MOST_ACTIONS:
        raise InputError(
            f"--action_column: must have at most {schema.MOST_ACTIONS} different values. Received: "
            f"{len(own_ids):,} in {name}. Name a column of what behaviours were, such as click and buy."
        )
    return tuple(map(str, own_ids.to_pylist()))
