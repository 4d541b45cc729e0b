"""Reads a log of events, and checks the rules that its columns must keep together.

Letters of shapes: E events, I items.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from din_dist.data.blocks import EventLog, ItemFeature, group_by_user
from din_dist.errors import InputError
from din_dist.tables.columns import IdColumn, LabelColumn, Rows, TimeColumn
from din_dist.tables.formats import Format, format_of, shown_names
from din_dist.tables.record_batches import Layout, read_columns


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names of the columns to read, and which of them may be absent. `DataConfig` documents each."""

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    label: str = "label"  # empty: the log has none
    label_required: bool = False
    item_features: tuple[str, ...] = ("category_id",)
    item_features_required: bool = False
    presorted: bool = False

    def chosen(self, layouts: Mapping[Path, Layout]) -> Columns:
        """Returns these columns without the optional ones that no file has.

        Args:
            layouts: the layout of each file.

        Raises:
            InputError: a file lacks a column that is required, or that another file has.
        """
        anywhere = set().union(*(layout.names for layout in layouts.values()))
        columns = dataclasses.replace(
            self,
            label=self.label if self.label_required or self.label in anywhere else "",
            item_features=tuple(name for name in self.item_features if self.item_features_required or name in anywhere),
        )
        for (file, layout), name in itertools.product(layouts.items(), columns.names):
            count = layout.names.count(name)
            if count != 1:
                raise InputError(
                    f"{file}: column {name!r} {'occurs more than once' if count else 'is missing'}. "
                    f"Received: {shown_names(layout.names)} "
                    "Correct the file, or name your column (--user_column, --item_column, --timestamp_column, "
                    "--label_column, --item_features)."
                )
        return columns

    @property
    def names(self) -> list[str]:
        """The names of all columns to read."""
        label = [self.label] if self.label else []
        return [self.user, self.item, self.timestamp, *label, *self.item_features]


def read_log(files: Sequence[Path], columns: Columns, form: Format | None = None) -> EventLog:
    """Reads files in their order, and sorts each user's events by time. Equal times keep the order of the files.

    Args:
        files: the files of the log.
        columns: the columns to read.
        form: the format of all files. None: the one that the first file's name promises.

    Raises:
        InputError: the files break a rule; the text names file, row (from 1, without the header) and value.
    """
    form = form or format_of(files[0]) or Format.PARQUET
    found = {file: Layout.of(file, form, columns.names, numbers=[columns.label]) for file in files}
    layouts = {file: layout for file, layout in found.items() if layout}
    columns = columns.chosen(layouts) if layouts else columns
    rows = Rows()
    users, items = IdColumn(columns.user, rows), IdColumn(columns.item, rows)
    times, labels = TimeColumn(columns.timestamp, rows), LabelColumn(columns.label, rows)
    features = [IdColumn(name, rows, nullable=True) for name in columns.item_features]
    for file, layout in layouts.items():
        rows.begin(file)
        for batch in filter(len, read_columns(file, form, layout, columns.names)):
            for column in (users, items, times, *([labels] if columns.label else []), *features):
                column.add(batch.column(column.name), column.name in layout.partition)
            rows.advance(batch.num_rows)
    if not rows.count:
        raise InputError(f"{files[0]}: a log must have events. Received: no rows in {len(files)} file(s). Give others.")
    from_partition = set().union(*(layout.partition for layout in layouts.values()))
    is_text = {name: form is Format.CSV or name in from_partition for name in columns.names}
    user_of, user_ids = users.finish(is_text[users.name])
    item_of, item_ids = items.finish(is_text[items.name])
    item_features = {}
    for feature in features:
        codes, ids = feature.finish(is_text[feature.name])
        of_item = _one_value_per_item(codes, ids, item_of, item_ids, feature.name, rows)
        item_features[feature.name] = ItemFeature(of_item, ids)
    timestamps = times.finish()
    if columns.presorted:
        order = np.argsort(user_of, kind="stable")
        _check_sorted(user_of, timestamps, order, rows)
    else:
        order = np.lexsort((timestamps, user_of))
    blocks = group_by_user(user_of, item_of + 1, timestamps, labels.finish() if columns.label else None, order)
    late = set().union(*(layout.late for layout in layouts.values()))
    return EventLog(user_ids, item_ids, item_features, bool(columns.label), blocks, tuple(sorted(late)))


def _one_value_per_item(
    codes: np.ndarray, ids: pa.Array, item_of: np.ndarray, item_ids: pa.Array, name: str, rows: Rows
) -> np.ndarray:
    """Returns each item's dense id of a feature, int32 `[I + 1]`; 0 for item 0 and for items without a value.

    Args:
        codes: int32 `[E]`, the feature of each event from 0; -1 where it is missing, which agrees with all others.
        ids: the feature's own ids, by code.
        item_of: int32 `[E]`, the item of each event from 0.
        item_ids: the items' own ids `[I]`.
        name: the feature's column.
        rows: where rows stand, for the texts of errors.

    Raises:
        InputError: two rows give an item two values.
    """
    told = np.flatnonzero(codes >= 0)
    of_item = np.full(len(item_ids), -1, np.int32)
    of_item[item_of[told[::-1]]] = codes[told[::-1]]  # the last assignment stays, which is the first row's
    differing = told[of_item[item_of[told]] != codes[told]]
    if len(differing):
        second = differing[0]
        item = item_of[second]
        first = told[np.argmax(item_of[told] == item)]
        file, number = rows.place(first)
        raise rows.reject(
            second,
            f"an item must have one {name}",
            f"item {item_ids[item].as_py()!r} as {ids[codes[first]].as_py()!r} ({file}, row {number}) "
            f"and here as {ids[codes[second]].as_py()!r}",
            "Correct one of the two rows.",
        )
    return np.concatenate([[0], of_item + 1]).astype(np.int32)


def _check_sorted(users: np.ndarray, timestamps: np.ndarray, order: np.ndarray, rows: Rows) -> None:
    """Refuses an event that is earlier than the one before it of its user; all arrays are `[E]`."""
    sorted_times = timestamps[order]
    earlier = (np.diff(sorted_times) < 0) & (np.diff(users[order]) == 0)
    if earlier.any():
        index = np.flatnonzero(earlier)
        index = index[np.argmin(order[index + 1])]  # the first in the files' order
        file, number = rows.place(order[index])
        raise rows.reject(
            order[index + 1],
            "with --presorted each user's events must be in time order",
            f"timestamp {sorted_times[index + 1]} after {sorted_times[index]} ({file}, row {number})",
            "Sort the log, or drop --presorted.",
        )
