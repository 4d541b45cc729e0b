"""A log that was read into files, in the order of its rows: what is checked and found there, part by part.

Letters of shapes: E events, n owners (users or items).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.data.feature_reader import two_values
from din_dist.data.feature_tables import with_row_0
from din_dist.data.log_reader import Columns, early_label, unsorted
from din_dist.data.raw_columns import RawColumn, RawFeature
from din_dist.features.spec import FeatureConflict, Kind
from din_dist.files import read_record
from din_dist.tables.columns import Rows
from din_dist.tables.spools import RowPart, RowReader, RowType
from din_dist.tables.storage import File
from din_dist.tables.values import ColumnValues, IdValues, ListValues, NumberValues, VectorValues, joined
from din_dist.text import parse_json

STATE_FILE = "read.json"
_MOST_AT_ONCE, FEWEST_AT_ONCE = 1 << 22, 1 << 6  # rows
_DTYPES = {
    **dict.fromkeys(("user", "item", "request", "session", "action"), np.int32),
    **dict.fromkeys(("time", "label_time"), np.int64),
    "weight": np.float32,
}


class SpooledLog:
    """The rows of a log.

    Args:
        folder: of its files, one for each role of a column (`user`, `time`, ...) and each feature.
        columns: the columns that were read.
        files: the log's own files, in the order in which they were read.
        most_bytes: of rows in memory.
    """

    def __init__(self, folder: Path, columns: Columns, files: Sequence[File], most_bytes: int) -> None:
        self.folder, self.columns, self.most_bytes = folder, columns, most_bytes
        state = parse_json(read_record(folder / STATE_FILE))
        self.num_rows: int = state["rows"]
        self._widths: dict[str, int] = state["widths"]
        self._rows = Rows()
        for file, start in zip(files, state["starts"], strict=True):
            self._rows.count = start
            self._rows.begin(file)
        self._rows.count = self.num_rows
        self._ids: dict[str, pa.Array] = {}

    @property
    def row_bytes(self) -> int:
        """The size of a row in files, the mean of all, rounded up."""
        found = sum(path.stat().st_size for path in self.folder.iterdir() if path.suffix not in (".ids", ".json"))
        return found // self.num_rows + 1

    def ids(self, name: str) -> pa.Array:
        """Returns the own ids of a role, or of a feature by its key."""
        if name not in self._ids:
            self._ids[name] = pq.read_table(ids_path(self.folder, name)).column("id").combine_chunks()
        return self._ids[name]

    def has_ids(self, name: str) -> bool:
        """Tells whether a role or a feature has ids."""
        return ids_path(self.folder, name).exists()

    def kind(self, roles: Sequence[str], features: Sequence[RawColumn] = ()) -> RowType:
        """Returns what rows have in which some columns are."""
        arrays: dict[str, tuple[type, int]] = {role: (_DTYPES.get(role, np.uint8), 0) for role in roles}
        for column in features:
            match column.kind:
                case Kind.CATEGORY:
                    arrays[column.key] = np.int32, 0
                case Kind.NUMBER:
                    arrays[column.key] = np.float32, 0
                case Kind.VECTOR if width := self.width(column):
                    arrays[column.key] = np.float16, width
        lists = {column.key: bool(column.weights) for column in features if column.kind is Kind.CATEGORIES}
        return RowType({name: (np.dtype(dtype), width) for name, (dtype, width) in arrays.items()}, lists)

    def width(self, column: RawColumn) -> int:
        """Returns how many numbers a vector of a column has; 0 if no row has one."""
        return self._widths.get(column.key, 0)

    def parts(self, kind: RowType) -> Iterator[tuple[slice, RowPart]]:
        """Yields all rows, as many at a time as the memory may hold, and where they stand."""
        at_once = int(np.clip(self.most_bytes // (4 * self.row_bytes), FEWEST_AT_ONCE, _MOST_AT_ONCE))
        return RowReader(self.folder, kind).parts(self.num_rows, at_once)

    def values(self, column: RawColumn, part: RowPart) -> ColumnValues:
        """Returns the values of a feature in some rows, which have its column."""
        match column.kind:
            case Kind.CATEGORY:
                return IdValues(part.arrays[column.key], self.ids(column.key))
            case Kind.NUMBER:
                return NumberValues(part.arrays[column.key])
            case Kind.CATEGORIES:
                found = part.lists[column.key]
                return ListValues(found.codes, found.offsets, self.ids(column.key), found.weights)
        if column.key in part.arrays:
            return VectorValues(part.arrays[column.key])
        return VectorValues(np.zeros((len(next(iter(part.arrays.values()))), 0), np.float16))

    def check_label_times(self) -> None:
        """Checks that no positive comes before its event, where the log says when positives came.

        Raises:
            InputError: one does.
        """
        if not self.columns.label_time:
            return
        label = label_role(self.columns)
        for rows, part in self.parts(self.kind([label, "time", "label_time"])):
            times, own = part.arrays["label_time"], part.arrays["time"]
            if len(early := np.flatnonzero((part.arrays[label] == 1) & (times < own))):
                pair = int(times[early[0]]), int(own[early[0]])
                raise early_label(self.columns, self._rows, rows.start + int(early[0]), pair)

    def check_sorted(self) -> None:
        """Checks that each user's events are in the order of time.

        Raises:
            InputError: one is earlier than the one before it.
        """
        num_users = len(self.ids("user"))
        last_times, last_rows = np.zeros(num_users, np.int64), np.full(num_users, -1, np.int64)
        for rows, part in self.parts(self.kind(["user", "time"])):
            order = np.argsort(part.arrays["user"], kind="stable")
            users, times = part.arrays["user"][order], part.arrays["time"][order]
            firsts = np.append(True, users[1:] != users[:-1])
            before = np.where(firsts, last_rows[users], rows.start + np.append(0, order[:-1]))
            times_before = np.where(firsts, last_times[users], np.append(0, times[:-1]))
            earlier = np.flatnonzero((before >= 0) & (times < times_before))
            if len(earlier):
                place = int(earlier[np.argmin(order[earlier])])  # the first in the files' order
                pair = int(before[place]), rows.start + int(order[place])
                raise unsorted(self._rows, pair, (int(times_before[place]), int(times[place])))
            lasts = np.append(firsts[1:], True)
            last_times[users[lasts]], last_rows[users[lasts]] = times[lasts], rows.start + order[lasts]

    def of_owner(self, column: RawColumn, conflict: FeatureConflict) -> RawFeature:
        """Returns one value for each owner, as `FeatureReader` finds it in memory.

        In place of `told` stands an empty array if not all rows tell a value.

        Raises:
            InputError: two rows give their owner different values.
        """
        chosen, all_given = self._chosen(column, conflict)
        values, place_of = self._values_of_rows(column, chosen)
        if conflict is FeatureConflict.ERROR:
            self._check_one_value(column, chosen, values, place_of)
        taken = values.take(with_row_0(column.owner, place_of))
        return RawFeature(column, taken, None if all_given else np.zeros(0, bool))

    def _parts_of(self, column: RawColumn) -> Iterator[tuple[int, ColumnValues, np.ndarray]]:
        """Yields the first row of each part, the values of a feature there, and the owners of the rows."""
        role = str(column.owner)
        for rows, part in self.parts(self.kind([role], [column])):
            yield rows.start, self.values(column, part), part.arrays[role]

    def _chosen(self, column: RawColumn, conflict: FeatureConflict) -> tuple[np.ndarray, bool]:
        """Returns the row that tells each owner's value, int64 `[n]`, -1 for none, and whether all rows tell one."""
        chosen = np.full(len(self.ids(str(column.owner))), -1, np.int64)
        all_given = True
        for start, values, owner_of in self._parts_of(column):
            given = values.given
            all_given &= bool(given.all())
            told = np.flatnonzero(given)
            if conflict is not FeatureConflict.LAST:
                told = told[chosen[owner_of[told]] < 0][::-1]
            chosen[owner_of[told]] = start + told  # the last assignment stays
        return chosen, all_given

    def _values_of_rows(self, column: RawColumn, chosen: np.ndarray) -> tuple[ColumnValues, np.ndarray]:
        """Returns the values of chosen rows, and the place of each owner's among them, int64 `[n]`; -1 for none."""
        owners = np.argsort(chosen, kind="stable")
        owners = owners[np.count_nonzero(chosen < 0) :]
        in_order = chosen[owners]
        parts = []
        for start, values, _ in self._parts_of(column):
            low, high = np.searchsorted(in_order, [start, start + len(values)])
            parts.append(values.take(in_order[low:high] - start))
        place_of = np.full(len(chosen), -1, np.int64)
        place_of[owners] = np.arange(len(owners))
        return joined(parts), place_of

    def _check_one_value(
        self, column: RawColumn, chosen: np.ndarray, values: ColumnValues, place_of: np.ndarray
    ) -> None:
        for start, here, owner_of in self._parts_of(column):
            told = np.flatnonzero(here.given)
            if not len(told):
                continue
            before, mine = values.take(place_of[owner_of[told]]), here.take(told)
            pairs = np.arange(len(told))
            differing = joined([before, mine]).differ(pairs, pairs + len(told))
            if differing.any():
                place = int(np.argmax(differing))
                owner = int(owner_of[told[place]])
                raise two_values(
                    column,
                    self.ids(str(column.owner))[owner].as_py(),
                    (int(chosen[owner]), start + int(told[place])),
                    (before.shown(place), mine.shown(place)),
                    self._rows,
                )


def ids_path(folder: Path, name: str) -> Path:
    """Returns the file of the ids of a role or of a feature."""
    return folder / f"{name}.ids"


def label_role(columns: Columns) -> str:
    """Returns the role of the label of histories."""
    return f"label-{columns.labels.index(columns.label)}"
