"""Reads a log of behaviours, from which the histories of an event log's users come.

Letters of shapes: U users, E events, P behaviours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from din_dist import schema
from din_dist.data.blocks import BehaviourCounts, Behaviours
from din_dist.data.column_readers import ColumnReaders, names_of
from din_dist.data.feature_tables import rows_of_ids
from din_dist.data.raw_columns import RawColumn
from din_dist.data.table_files import TableFiles
from din_dist.errors import InputError
from din_dist.tables.columns import IdColumn, Rows, TimeColumn
from din_dist.tables.sources import find_files

OWN_LOG = "behaviours"  # the name of such a log


@dataclasses.dataclass(frozen=True)
class BehaviourColumns:
    """The files of a log of behaviours, and the names of its columns.

    Attributes:
        source: a file, a folder or a glob, as an absolute path.
        user: the column of users' ids.
        item: the column of items' ids.
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
        return [self.user, self.item, self.timestamp, *([self.action] if self.action else [])]

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

    def find(self) -> list[Path]:
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
        item_ids: own ids, those of the event log first and then those that only behaviours have.
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
        self._users, self._items = IdColumn(columns.user, rows), IdColumn(columns.item, rows)
        self._times = TimeColumn(columns.timestamp, rows, times_of_events)
        self._actions = IdColumn(columns.action, rows, nullable=True)
        read = [column for column in (self._users, self._items, self._times, self._actions) if column.name]
        for batch, layout in self._files.batches(self._names):
            for column in read:
                column.add(batch.column(column.name), column.name in layout.partition)
            features.add(batch, layout)

    def finish(self, user_ids: pa.Array, item_ids: pa.Array) -> OwnedBehaviours:
        """Returns the behaviours of the users of the event log.

        Args:
            user_ids: own ids `[U]`, in the order of the dense ids.
            item_ids: own ids of the events' items, likewise.

        Raises:
            InputError: the two logs have no user in common, or item ids of two types.
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
        items, own_ids = self._items.finish(self._files.is_text(self._items.name))
        item_of, all_ids = self._unified(items, own_ids, kept, item_ids)
        counts = BehaviourCounts(kept=len(kept), only_behaviours=len(all_ids) - len(item_ids))
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
        if len(added) and added.type != item_ids.type:
            if not pa.types.is_integer(added.type):
                raise InputError(
                    f"--behaviours_path: item ids must be of the type that they have in --data_path, {item_ids.type}. "
                    f"Received: {self._items.name}={added[0].as_py()!r}. Convert one of the two columns."
                )
            added = added.cast(item_ids.type)
        item_of = np.full(len(codes), -1, np.int32)
        item_of[kept] = place_of[codes[kept]]
        return item_of, pa.concat_arrays([item_ids, added])


def coded_actions(column: IdColumn) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns 1 + the place of each row's action, uint8, 0 for none, and the actions as text.

    Raises:
        InputError: there are too many.
    """
    codes, own_ids = column.finish(from_text=False)
    if len(own_ids) > schema.MOST_ACTIONS:
        raise InputError(
            f"--action_column: must have at most {schema.MOST_ACTIONS} different values. Received: "
            f"{len(own_ids):,} in {column.name}. Name a column of what behaviours were, such as click and buy."
        )
    return (codes + 1).astype(np.uint8), tuple(map(str, own_ids.to_pylist()))
