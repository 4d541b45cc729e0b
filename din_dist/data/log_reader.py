"""Reads a log of events, and checks the rules that its columns must keep together.

Letters of shapes: E events.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from din_dist import schema
from din_dist.data.behaviour_log import BehaviourColumns, BehaviourReader, coded_actions
from din_dist.data.blocks import EventLog, ItemFeature, group_by_user
from din_dist.data.column_readers import ColumnReaders, names_of, number_names
from din_dist.data.feature_reader import FeatureReader, OwnerIds
from din_dist.data.feature_tables import REMEDY
from din_dist.data.raw_columns import RawColumn, RawColumns
from din_dist.errors import InputError
from din_dist.features.spec import Owner, shorthand
from din_dist.tables.columns import NO_TIME, Column, IdColumn, LabelColumn, Rows, TimeColumn
from din_dist.tables.formats import Format, format_of
from din_dist.tables.record_batches import Layout, read_columns, require_columns
from din_dist.tables.storage import File
from din_dist.tables.value_columns import WeightColumn

_LATER = ("label_time", "request", "session", "weight", "tasks", "action")


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names of the columns to read, and which of them may be absent. `DataConfig` documents each."""

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    label: str = "label"  # empty: the log has none
    label_required: bool = False
    tasks: tuple[str, ...] = ()  # the labels to predict, `label` among them; empty: `label` alone
    label_time: str = ""  # empty: a positive comes at its event's time
    request: str = ""  # empty: the events of one user and time are a request
    session: str = ""  # empty: the log names no sessions
    weight: str = ""  # empty: all events count alike
    action: str = ""  # empty: what a behaviour was is not told here
    item_features: tuple[str, ...] = ("category_id",)
    item_features_required: bool = False
    presorted: bool = False

    def chosen(self, layouts: Mapping[File, Layout]) -> Columns:
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
        if self.label_time and not columns.label:
            raise InputError(
                "--label_time_column: tells when a positive came, which takes a log with labels. Received: "
                f"{self.label_time!r}, and a log without the column {self.label!r}. Give --label_column, or drop it."
            )
        remedy = (
            "Correct the file, or name your column (--user_column, --item_column, --timestamp_column, "
            "--label_column, --label_columns, --label_time_column, --request_column, --session_column, "
            "--weight_column, --action_column, --item_features)."
        )
        require_columns(layouts, columns.names, remedy)
        return columns

    @property
    def names(self) -> list[str]:
        """The names of all columns to read."""
        more = (*self.labels, self.label_time, self.request, self.session, self.weight, self.action)
        optional = [name for name in more if name]
        return [self.user, self.item, self.timestamp, *optional, *self.item_features]

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of labels; that of histories alone if nothing else is predicted."""
        return self.tasks or (self.label,)

    @property
    def more(self) -> dict[str, type]:
        """The dtype of each array that a block has beside those of every log, by its name in `schema`."""
        found = {
            schema.BLOCK_REQUEST_TIMES: (self.request, np.int64),
            schema.BLOCK_LABEL_TIMES: (self.label_time, np.int64),
            schema.BLOCK_SESSION_PLACES: (self.session, np.int32),
            schema.BLOCK_WEIGHTS: (self.weight, np.float32),
            schema.BLOCK_TASK_LABELS: (self.tasks, np.uint8),
            schema.BLOCK_ACTIONS: (self.action, np.uint8),
        }
        return {name: dtype for name, (columns, dtype) in found.items() if columns}

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, those that came later only where they are given."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value or name not in _LATER}


def read_log(
    files: Sequence[File],
    columns: Columns,
    form: Format | None = None,
    features: RawColumns = RawColumns(),  # noqa: B008 (it is frozen)
    behaviours: BehaviourColumns | None = None,
) -> EventLog:
    """Reads files in their order, and sorts each user's events by time. Equal times keep the order of the files.

    Args:
        files: the files of the log.
        columns: the columns to read.
        form: the format of all files. None: the one that the first file's name promises.
        features: what declared features need.
        behaviours: the log that histories come from. None: this one.

    Raises:
        InputError: the files break a rule; the text names file, row (from 1, without the header) and value.
    """
    return LogReader(files, columns, form, features, behaviours).read()


def layout_of(file: File, form: Format, columns: Columns, features: Sequence[RawColumn]) -> Layout | None:
    """Returns the layout of a file of a log; see `Layout.of`.

    Args:
        file: the file to look at.
        form: its format.
        columns: the columns to read.
        features: the columns of declared features that the log of events has.

    Raises:
        InputError: the file is damaged.
    """
    lists = names_of(features)
    names = list(dict.fromkeys([*columns.names, *lists]))
    numbers = [*columns.labels, columns.weight, *number_names(features, columns.names)]
    return Layout.of(file, form, names, numbers, lists)


def checked_columns(
    layouts: Mapping[File, Layout], columns: Columns, features: RawColumns, names: Sequence[str]
) -> Columns:
    """Returns the columns that a log has of those that may be absent.

    Args:
        layouts: the layout of each file.
        columns: the columns to read.
        features: what declared features need.
        names: the columns of the log that they need.

    Raises:
        InputError: a file lacks a column, or features of candidates have no labels.
    """
    chosen = columns.chosen(layouts) if layouts else columns
    require_columns(layouts, names, f"{REMEDY}.")
    if features.candidates and not chosen.label:
        raise InputError(
            f"--features: features of candidates ({', '.join(features.candidates)}) take a log with labels, "
            "because a drawn negative has none. Received: a log without the label column. Give --label_column, "
            'look them up in a table of offers (by = [...]), or write of = "item" or of = "context".'
        )
    return chosen


class LogReader:
    """Reads one log; see `read_log`."""

    def __init__(
        self,
        files: Sequence[File],
        columns: Columns,
        form: Format | None,
        features: RawColumns,
        behaviours: BehaviourColumns | None,
    ) -> None:
        self._form = form or format_of(files[0]) or Format.PARQUET
        self._files = files
        self._features = FeatureReader(features, columns.user, columns.item, has_own_behaviours=behaviours is not None)
        self._layouts = self._find_layouts(columns)
        self._columns = checked_columns(self._layouts, columns, features, self._features.names)
        self._rows = Rows()
        of_items = map(RawColumn.of, shorthand(self._columns.item_features))
        self._of_items = [column for column in of_items if column]
        told = [column for column in (*self._of_items, *self._features.from_log) if column.owner is Owner.ITEM]
        of_behaviours = self._features.from_behaviours
        self._behaviours = BehaviourReader(behaviours, told, of_behaviours, self._rows) if behaviours else None

    def _find_layouts(self, columns: Columns) -> dict[File, Layout]:
        of_features = self._features.from_events
        found = {file: layout_of(file, self._form, columns, of_features) for file in self._files}
        return {file: layout for file, layout in found.items() if layout}

    def read(self) -> EventLog:
        columns, rows = self._columns, self._rows
        users, items = IdColumn(columns.user, rows), IdColumn(columns.item, rows)
        times, optional = TimeColumn(columns.timestamp, rows), OptionalColumns(columns, rows)
        features = self._features.begin(rows, self._of_items)
        self._read_rows([users, items, times, *optional.read_after(times)], features)
        num_events = rows.count
        if self._behaviours:
            self._behaviours.read(features, times)
        user_of, user_ids = users.finish(self._is_text(users.name))
        item_of, item_ids = items.finish(self._is_text(items.name))
        timestamps = times.finish()
        found = optional.finish(user_of, timestamps, self._is_text)
        order = self._order(user_of, timestamps)
        if found.session_of is not None:
            found.more[schema.BLOCK_SESSION_PLACES] = session_places(user_of, found.session_of, order)
        values = self._features.read_values(self._is_text_of_feature)
        owned = self._behaviours.finish(user_ids, item_ids, values) if self._behaviours else None
        behaviours = owned.behaviours if owned else None
        blocks = group_by_user(user_of, item_of + 1, timestamps, found.labels, order, found.more, behaviours)
        if owned:  # no feature of users is read there
            user_of = np.append(user_of, np.full(rows.count - num_events, -1, np.int32))
            item_of, item_ids = np.append(item_of, owned.item_of_row), owned.item_ids
        behaviour_order = num_events + owned.order if owned else order
        without_id = owned.counts.without_id if owned else 0
        owners = {Owner.USER: OwnerIds(user_of, user_ids), Owner.ITEM: OwnerIds(item_of, item_ids, without_id)}
        late = set().union(*(layout.late for layout in self._layouts.values()))
        declared = self._features.finish(values, owners, order, behaviour_order, rows)
        return EventLog(
            user_ids,
            item_ids,
            {name: ItemFeature(values.codes, values.ids) for name, values in self._features.item_features.items()},
            bool(columns.label),
            blocks,
            tuple(sorted(late)),
            declared,
            self._features.counts,
            self._features.offers,
            columns.tasks,
            owned.counts if owned else None,
            owned.actions if owned else found.actions,
        )

    def _read_rows(self, read: Sequence[Column], features: ColumnReaders) -> None:
        """Gives all rows to the columns and to the readers of features."""
        rows = self._rows
        names = list(dict.fromkeys([*self._columns.names, *self._features.names]))
        for file, layout in self._layouts.items():
            rows.begin(file)
            for batch in filter(len, read_columns(file, self._form, layout, names)):
                for column in filter(lambda column: column.name, read):
                    column.add(batch.column(column.name), column.name in layout.partition)
                features.add(batch, layout)
                self._batch_is_read()
                rows.advance(batch.num_rows)
        if not rows.count:
            raise InputError(
                f"{self._files[0]}: a log must have events. Received: no rows in {len(self._files)} file(s). "
                "Give others."
            )

    def _batch_is_read(self) -> None:
        """Does nothing: the columns hold all rows."""

    def _is_text(self, name: str) -> bool:
        """Tells whether a column is read as text, and so may hold integers that are written as text."""
        return self._form is Format.CSV or any(name in layout.partition for layout in self._layouts.values())

    def _is_text_of_feature(self, name: str) -> bool:
        of_behaviours = any(name in column.names for column in self._features.from_behaviours)
        return self._behaviours.is_text(name) if self._behaviours and of_behaviours else self._is_text(name)

    def _order(self, user_of: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
        """Returns the order of the events by user and time, int64 `[E]`."""
        if not self._columns.presorted:
            return np.lexsort((timestamps, user_of))
        order = np.argsort(user_of, kind="stable")
        _check_sorted(user_of, timestamps, order, self._rows)
        return order


class _Optional(NamedTuple):
    """The values of the columns that not every log has, `[E]` each."""

    labels: np.ndarray | None  # uint8, of histories
    more: dict[str, np.ndarray]  # by the names of a block's arrays
    actions: tuple[str, ...]  # in the order of their codes
    session_of: np.ndarray | None  # the session of each event


class OptionalColumns:
    """Reads the columns that not every log has.

    Args:
        columns: the names of all columns.
        rows: where rows stand.
    """

    def __init__(self, columns: Columns, rows: Rows) -> None:
        self._columns, self._rows = columns, rows
        self._labels = [LabelColumn(name, rows, not columns.tasks) for name in columns.labels]
        self._requests, self._weights = IdColumn(columns.request, rows), WeightColumn(columns.weight, rows)
        self._actions = IdColumn(columns.action, rows, nullable=True)
        self._sessions = IdColumn(columns.session, rows)

    def read_after(self, times: TimeColumn) -> list[Column]:
        """Returns the columns to read, those without a name among them. Times are of the kind of `times`."""
        self._label_times = TimeColumn(self._columns.label_time, self._rows, times, True)
        return [*self._labels, self._requests, self._sessions, self._label_times, self._weights, self._actions]

    def finish(self, user_of: np.ndarray, timestamps: np.ndarray, is_text: Callable[[str], bool]) -> _Optional:
        """Returns the values.

        Args:
            user_of: int32 `[E]`, the user of each event.
            timestamps: int64 `[E]`.
            is_text: tells of a column's name that text was read.
        """
        columns = self._columns
        labels_of = {column.name: column.finish() for column in self._labels if column.name}
        label_of = labels_of.get(columns.label)
        more: dict[str, np.ndarray] = {}
        if columns.tasks:
            more[schema.BLOCK_TASK_LABELS] = as_bits(labels_of.values())
        if columns.request:
            request_of, _ = self._requests.finish(is_text(columns.request))
            more[schema.BLOCK_REQUEST_TIMES] = first_times(user_of, request_of, timestamps)
        if columns.label_time:
            assert label_of is not None
            times = self._label_times.finish()
            more[schema.BLOCK_LABEL_TIMES] = checked_label_times(times, label_of, timestamps, columns, self._rows)
        if columns.weight:
            more[schema.BLOCK_WEIGHTS] = self._weights.finish(is_text(columns.weight)).numbers
        actions: tuple[str, ...] = ()
        if columns.action:
            more[schema.BLOCK_ACTIONS], actions = coded_actions(self._actions)
        session_of = self._sessions.finish(is_text(columns.session))[0] if columns.session else None
        return _Optional(label_of, more, actions, session_of)


def early_label(columns: Columns, rows: Rows, row: int, times: tuple[int, int]) -> InputError:
    """Returns the error for a positive that comes before its event.

    Args:
        columns: the names of all columns.
        rows: where rows stand.
        row: of the positive, counted over all files from 0.
        times: when it came, or `NO_TIME`, and the time of its event.
    """
    name, missing = columns.label_time, times[0] == NO_TIME
    return rows.reject(
        row,
        f"every positive needs its {name}, which is not before its {columns.timestamp}",
        f"no {name}" if missing else f"{name}={times[0]} before {times[1]}, as read",
        "Correct the row.",
    )


def checked_label_times(
    times: np.ndarray, labels: np.ndarray, timestamps: np.ndarray, columns: Columns, rows: Rows, first_row: int = 0
) -> np.ndarray:
    """Returns when each positive came, and the time of each other event, int64 `[E]`.

    Args:
        times: int64 `[E]`, as read; `NO_TIME` where it is missing.
        labels: uint8 `[E]`.
        timestamps: int64 `[E]`.
        columns: the names of all columns.
        rows: where rows stand.
        first_row: the row of all rows that the arrays begin with.

    Raises:
        InputError: a positive came before its event, or has no time.
    """
    positive = labels == 1
    if len(early := np.flatnonzero(positive & (times < timestamps))):
        row = int(early[0])
        raise early_label(columns, rows, first_row + row, (int(times[row]), int(timestamps[row])))
    return np.where(positive, times, timestamps)


def as_bits(labels: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the labels of the tasks, uint8 `[E]` each, as the bits of one array, uint8 `[E]`."""
    return functools.reduce(np.bitwise_or, (values << place for place, values in enumerate(labels)))


def first_times(users: np.ndarray, requests: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """Returns the first time of each event's request, int64 `[E]`: requests of two users are never one.

    Args:
        users: `[E]`, dense ids.
        requests: `[E]`, dense ids.
        timestamps: int64 `[E]`.
    """
    order = np.lexsort((requests, users))
    begins = np.ones(len(order), bool)
    begins[1:] = (np.diff(users[order]) != 0) | (np.diff(requests[order]) != 0)
    starts = np.flatnonzero(begins)
    found = np.empty(len(order), np.int64)
    firsts = np.minimum.reduceat(timestamps[order], starts)
    found[order] = np.repeat(firsts, np.diff(np.append(starts, len(order))))
    return found


def session_places(users: np.ndarray, sessions: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns where among its user's events each event's session begins, int32 `[E]`. Two users share no session.

    Args:
        users: `[E]`, dense ids.
        sessions: `[E]`, dense ids.
        order: `[E]`, the order of the events, by user and time.
    """
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    counts = np.bincount(users)
    places -= (np.cumsum(counts) - counts)[users]
    return first_times(users, sessions, places).astype(np.int32)


def _check_sorted(users: np.ndarray, timestamps: np.ndarray, order: np.ndarray, rows: Rows) -> None:
    """Refuses an event that is earlier than the one before it of its user; all arrays are `[E]`."""
    sorted_times = timestamps[order]
    earlier = (np.diff(sorted_times) < 0) & (np.diff(users[order]) == 0)
    if earlier.any():
        index = np.flatnonzero(earlier)
        place = int(index[np.argmin(order[index + 1])])  # the first in the files' order
        raise unsorted(rows, (order[place], order[place + 1]), (sorted_times[place], sorted_times[place + 1]))


def unsorted(rows: Rows, pair: tuple[int, int], times: tuple[int, int]) -> InputError:
    """Returns the error for an event that is earlier than the one before it of its user.

    Args:
        rows: where rows stand.
        pair: the row before it and its own, counted over all files from 0.
        times: of the two.
    """
    file, number = rows.place(pair[0])
    return rows.reject(
        pair[1],
        "with --presorted each user's events must be in time order",
        f"timestamp {times[1]} after {times[0]} ({file}, row {number})",
        "Sort the log, or drop --presorted.",
    )
