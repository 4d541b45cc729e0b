"""Reads a log that does not fit into memory: the same events, in the same order, by way of files.

FOLDER/key               what the files below are of: other sources, columns or versions begin anew
FOLDER/read/             1. the columns of the log, in the order of its rows, and the ids (`spooled_log.py`)
FOLDER/parted/           2. its rows in regions of whole users, each of which fits into memory (`ordering.py`)
FOLDER/sorted/           3. its rows in the order of users and times

A folder is there once it is complete, so a run that is killed goes on with the first that is missing. In memory are the
ids, what an owner has one value of, and of the rows as many as the limit allows.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist import progress
from din_dist.data.behaviour_log import texts_of_actions
from din_dist.data.blocks import EventLog, ItemFeature
from din_dist.data.column_readers import ColumnReaders
from din_dist.data.feature_reader import OwnerIds
from din_dist.data.log_reader import Columns, LogReader, OptionalColumns
from din_dist.data.ordering import OrderedRows, Ordering
from din_dist.data.raw_columns import RawColumn, RawColumns, RawFeature
from din_dist.data.spooled_log import STATE_FILE, SpooledLog, ids_path
from din_dist.features.spec import Kind, Owner
from din_dist.files import published_folder, read_record, write_text
from din_dist.tables.columns import Column, IdColumn, TimeColumn
from din_dist.tables.spools import Spool
from din_dist.tables.storage import File
from din_dist.tables.value_columns import CategoryColumn, ListColumn
from din_dist.tables.values import IdValues

_READ = "read"
_WITHOUT_IDS = ("request", "session")  # columns of ids whose names nobody needs


@dataclasses.dataclass(frozen=True)
class Room:
    """The place of a log that does not fit into memory while it is prepared, and how much of it memory may hold.

    Attributes:
        folder: of the files, beside the prepared data.
        most_bytes: of rows in memory.
    """

    folder: Path
    most_bytes: int

    def begin(self, key: str) -> None:
        """Keeps the files of an earlier run that were made from the same, and deletes others."""
        path = self.folder / "key"
        if not path.exists() or read_record(path) != key:
            self.clear()
            self.folder.mkdir(parents=True)
            write_text(path, key)

    def clear(self) -> None:
        """Deletes all files."""
        shutil.rmtree(self.folder, ignore_errors=True)


class SpilledLogReader(LogReader):
    """Reads one log by way of files; the first arguments as of `read_log`.

    Args:
        files: the files of the log.
        columns: the columns to read.
        features: what declared features need, but no offers.
        room: where the files go.
        check_read: is called when all files of the log were read. It may raise `InputError`.
    """

    def __init__(
        self,
        files: Sequence[File],
        columns: Columns,
        features: RawColumns,
        room: Room,
        check_read: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(files, columns, None, features, None)
        self._room, self._check_read = room, check_read
        self._draining: _Draining | None = None

    def mixed_column(self) -> str:
        """Returns a column of ids that the folders of some files give and other files have; empty if there is none."""
        columns = self._columns
        told = [columns.user, columns.item, columns.request, columns.session, columns.action, *columns.item_features]
        told += [column.column for column in self._features.from_log if column.kind is Kind.CATEGORY]
        for name in filter(None, told):
            if len({name in layout.partition for layout in self._layouts.values()}) > 1:
                return name
        return ""

    def read(self) -> EventLog:
        """Returns the log; see `read_log`."""
        folder = self._room.folder / _READ
        if not folder.is_dir():
            with published_folder(folder) as aside:
                self.spool(aside)
                self._check_read()
        log = SpooledLog(folder, self._columns, list(self._layouts), self._room.most_bytes)
        log.check_label_times()
        actions = texts_of_actions(log.ids("action"), self._columns.action) if self._columns.action else ()
        ordering = Ordering(log, self._room.folder)
        if self._columns.presorted:
            log.check_sorted()
        of_owners = self._of_owners(log)
        told = [column for column, feature in of_owners.items() if feature.told is not None]
        of_events = [column for column in self._found() if column not in of_owners and self._features.wants(column)]
        rows = ordering.sorted(of_events, told)
        declared = self._declared(of_owners, rows)
        owners = {owner: OwnerIds(np.zeros(0, np.int32), log.ids(owner)) for owner in (Owner.USER, Owner.ITEM)}
        declared += self._features.of_tables(owners)
        declared += self._features.vectors(owners)
        return EventLog(
            user_ids=log.ids(Owner.USER),
            item_ids=log.ids(Owner.ITEM),
            item_features=self._item_features(of_owners),
            has_labels=bool(self._columns.label),
            blocks=rows.blocks(),
            late_columns=tuple(sorted(set().union(*(layout.late for layout in self._layouts.values())))),
            raw_features=tuple(declared),
            tables=self._features.counts,
            tasks=self._columns.tasks,
            actions=actions,
        )

    def _found(self) -> list[RawColumn]:
        """Returns the columns of features in the log, each once."""
        return list(dict.fromkeys([*self._features.from_log, *self._of_items]))

    def spool(self, folder: Path) -> None:
        """Writes the columns of all files to `folder`."""
        columns, rows = self._columns, self._rows
        times, optional = TimeColumn(columns.timestamp, rows), OptionalColumns(columns, rows)
        more = optional.read_after(times)
        num_labels = len(columns.labels)
        roles = [*(f"label-{place}" for place in range(num_labels)), "request", "session", "label_time", "weight"]
        users, items = IdColumn(columns.user, rows), IdColumn(columns.item, rows)
        named: dict[str, Column] = {"user": users, "item": items, "time": times}
        named |= dict(zip([*roles, "action"], more, strict=True))
        readers = self._features.begin(rows, self._of_items)
        self._draining = _Draining(folder, {role: column for role, column in named.items() if column.name}, readers)
        self._read_rows(list(named.values()), readers)
        self._draining.take(at_end=True)
        self._draining.finish(
            self._is_text, self._is_text_of_feature, {"rows": rows.count, "starts": list(rows.starts)}
        )

    def _batch_is_read(self) -> None:
        assert self._draining is not None
        self._draining.take(at_end=False)

    def _of_owners(self, log: SpooledLog) -> dict[RawColumn, RawFeature]:
        """Returns the features of users and items that the log tells; in place of `told`, whether it is needed."""
        columns = dict.fromkeys([*self._of_items, *self._features.from_log])
        return {
            column: log.of_owner(column, self._features.conflict)
            for column in columns
            if column.owner in (Owner.USER, Owner.ITEM)
        }

    def _item_features(self, features: Mapping[RawColumn, RawFeature]) -> dict[str, ItemFeature]:
        found = {}
        for column in self._of_items:
            values = features[column].values
            assert isinstance(values, IdValues)
            found[column.column] = ItemFeature(values.codes, values.ids)
        return found

    def _declared(self, of_owners: Mapping[RawColumn, RawFeature], rows: OrderedRows) -> list[RawFeature]:
        """Returns the declared features that the log has."""
        found = []
        for column in filter(self._features.wants, self._found()):
            feature = of_owners.get(column)
            if feature is None:
                found.append(RawFeature(column, rows.values(column)))
            else:
                told = None if feature.told is None else rows.told(column)
                found.append(dataclasses.replace(feature, told=told))
        return found


class _Draining:
    """Writes what columns have read to files.

    Args:
        folder: of the files.
        columns: those of the log, by role.
        readers: of features.
    """

    def __init__(self, folder: Path, columns: Mapping[str, Column], readers: ColumnReaders) -> None:
        self._folder, self._columns, self._readers = folder, columns, readers.readers
        self._widths: dict[str, int] = {}

    def take(self, at_end: bool) -> None:
        """Writes the values that wait; `at_end` as of `Column.drain`."""
        progress.note()
        for role, column in self._columns.items():
            for values in column.drain(at_end).values():
                Spool(self._folder / role, values.dtype).append(values)
        for of_feature, reader in self._readers.items():
            for name, values in reader.drain(at_end).items():
                width = values.shape[1] if values.ndim == 2 else 0
                self._widths[of_feature.key] = width
                end = f"-{name}" if isinstance(reader, ListColumn) else ""
                if values.size:
                    Spool(self._folder / f"{of_feature.key}{end}", values.dtype, width).append(values)

    def finish(
        self, is_text: Callable[[str], bool], is_text_of_feature: Callable[[str], bool], state: Mapping[str, Any]
    ) -> None:
        """Writes the ids, and what there is.

        Args:
            is_text: tells of a column's name that text was read.
            is_text_of_feature: likewise, of a feature.
            state: what to write besides.
        """
        ids: dict[str, pa.Array] = {}
        for role, column in self._columns.items():
            if isinstance(column, IdColumn) and role not in _WITHOUT_IDS:
                ids[role] = column.drained_ids(is_text(column.name) and role != "action")
        for of_feature, reader in self._readers.items():
            if isinstance(reader, (CategoryColumn, ListColumn)):
                ids[of_feature.key] = reader.drained_ids(is_text_of_feature(of_feature.column))
        for name, values in ids.items():
            pq.write_table(pa.table({"id": values}), ids_path(self._folder, name))
        write_text(self._folder / STATE_FILE, json.dumps({"widths": self._widths, **state}))
