"""Sorts the rows of a log by user and time, by way of files: first into regions of whole users, then each region.

Letters of shapes: E events, U users, R regions.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from din_dist import schema
from din_dist.data.blocks import SortedBlocks
from din_dist.data.log_reader import as_bits, first_times, session_places
from din_dist.data.raw_columns import RawColumn
from din_dist.data.spooled_log import SpooledLog, label_role
from din_dist.data.walks import user_runs
from din_dist.features.spec import Kind
from din_dist.files import published_folder
from din_dist.tables.spools import OffsetsSpool, RegionWriter, RowPart, RowReader, RowType, RowWriter
from din_dist.tables.values import ColumnValues, IdValues, ListValues, NumberValues, VectorValues

_PARTED, _SORTED, _REGIONS = "parted", "sorted", "regions.npy"
_SORTING_BYTES = 64  # of a row, beside its values: keys, order, and what finding it takes
_ROLES = {  # of columns that a block may have beside those of every log
    "request": schema.BLOCK_REQUEST_TIMES,
    "label_time": schema.BLOCK_LABEL_TIMES,
    "session": schema.BLOCK_SESSION_PLACES,
    "weight": schema.BLOCK_WEIGHTS,
    "task": schema.BLOCK_TASK_LABELS,
    "action": schema.BLOCK_ACTIONS,
}


class Ordering:
    """Sorts the rows of a log.

    Args:
        log: the log.
        folder: where the files go.
    """

    def __init__(self, log: SpooledLog, folder: Path) -> None:
        self._log, self._folder, self._columns = log, folder, log.columns

    def sorted(self, of_events: Sequence[RawColumn], told: Sequence[RawColumn]) -> OrderedRows:
        """Returns the rows in order.

        Args:
            of_events: features with one value for each event.
            told: those of owners of which it matters which events tell a value.
        """
        log, folder = self._log, self._folder / _SORTED
        counts = np.zeros(len(log.ids("user")), np.int64)
        for _, part in log.parts(log.kind(["user"])):
            counts += np.bincount(part.arrays["user"], minlength=len(counts))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        kind = self._kind(of_events, told)
        if not folder.is_dir():
            parted, firsts = self._parted(kind, offsets, of_events, told)
            with published_folder(folder) as aside:
                self._sort(RowReader(parted, kind), RowWriter(aside, self._sorted_kind(kind)), firsts, offsets)
            shutil.rmtree(parted)
        return OrderedRows(log, folder, self._sorted_kind(kind), offsets)

    def _kind(self, of_events: Sequence[RawColumn], told: Sequence[RawColumn]) -> RowType:
        """Returns what rows have in regions."""
        columns = self._columns
        given = {
            "label": bool(columns.label),
            "task": bool(columns.tasks),
            "request": bool(columns.request),
            "session": bool(columns.session),
            "label_time": bool(columns.label_time),
            "weight": bool(columns.weight),
        }
        found = self._log.kind(["user", "item", "time", *(role for role, there in given.items() if there)], of_events)
        arrays = {**found.arrays, **{_told(column): (np.dtype(bool), 0) for column in told}}
        if columns.action:
            arrays["action"] = np.dtype(np.uint8), 0
        return RowType(arrays, found.lists)

    @staticmethod
    def _sorted_kind(kind: RowType) -> RowType:
        """Returns what rows have that are sorted."""
        arrays = {name: of for name, of in kind.arrays.items() if name != "user"}
        if "request" in arrays:
            arrays["request"] = np.dtype(np.int64), 0
        return RowType(arrays, kind.lists)

    def _parted(
        self, kind: RowType, offsets: np.ndarray, of_events: Sequence[RawColumn], told: Sequence[RawColumn]
    ) -> tuple[Path, np.ndarray]:
        """Returns the folder of the regions, and the first user of each, at last U. Those that fit are kept."""
        log, folder = self._log, self._folder / _PARTED
        most = max(1, log.most_bytes // (3 * log.row_bytes + _SORTING_BYTES))
        firsts = np.array([*(first for first, _ in user_runs(offsets[1:], most)), len(offsets) - 1])
        if folder.is_dir():
            kept = np.load(folder / _REGIONS)
            if np.diff(offsets[kept]).max() <= np.diff(offsets[firsts]).max():
                return folder, kept
            shutil.rmtree(folder)  # an earlier run was allowed more memory
        with published_folder(folder) as aside:
            writer = RegionWriter(aside, kind, np.diff(offsets[firsts]), self._num_values(kind, firsts))
            for _, part in log.parts(self._read_kind(of_events, told)):
                regions = np.searchsorted(firsts, part.arrays["user"], side="right") - 1
                writer.add(regions, self._row_values(part, kind, told))
            np.save(aside / _REGIONS, firsts)
        return folder, firsts

    def _read_kind(self, of_events: Sequence[RawColumn], told: Sequence[RawColumn]) -> RowType:
        columns = self._columns
        labels = [f"label-{place}" for place, name in enumerate(columns.labels) if name]
        optional = ("request", "session", "label_time", "weight", "action")
        given = [role for role in optional if getattr(columns, role)]
        features = list(dict.fromkeys([*of_events, *told]))
        return self._log.kind(["user", "item", "time", *labels, *given], features)

    def _row_values(self, part: RowPart, kind: RowType, told: Sequence[RawColumn]) -> RowPart:
        """Returns the values of rows as they lie in regions."""
        columns, arrays = self._columns, dict(part.arrays)
        arrays["item"] = arrays["item"] + np.int32(1)
        if columns.label:
            arrays["label"] = arrays[label_role(columns)]
        if columns.tasks:
            arrays["task"] = as_bits(arrays[f"label-{place}"] for place in range(len(columns.labels)))
        if columns.label_time:
            arrays["label_time"] = np.where(arrays["label"] == 1, arrays["label_time"], arrays["time"])
        if columns.action:
            arrays["action"] = (arrays["action"] + 1).astype(np.uint8)
        for column in told:
            arrays[_told(column)] = self._log.values(column, part).given
        return RowPart({name: arrays[name] for name in kind.arrays}, {name: part.lists[name] for name in kind.lists})

    def _num_values(self, kind: RowType, firsts: np.ndarray) -> dict[str, np.ndarray]:
        """Returns how many values of each column of lists each region has, int64 `[R]`."""
        users = self._log.kind(["user"]).arrays
        counts = {f"{name}-counts": (np.dtype(np.int64), 0) for name in kind.lists}
        found = {name: np.zeros(len(firsts) - 1, np.int64) for name in kind.lists}
        if found:
            for _, part in self._log.parts(RowType({**users, **counts})):
                regions = np.searchsorted(firsts, part.arrays["user"], side="right") - 1
                for name, totals in found.items():
                    np.add.at(totals, regions, part.arrays[f"{name}-counts"])
        return found

    def _sort(self, reader: RowReader, writer: RowWriter, firsts: np.ndarray, offsets: np.ndarray) -> None:
        """Sorts region after region."""
        for first, end in itertools.pairwise(firsts):
            part = reader.next(int(offsets[end] - offsets[first]))
            part = part.take(np.lexsort((part.arrays["time"], part.arrays["user"])))
            arrays = dict(part.arrays)
            users = arrays.pop("user") - np.int32(first)
            if "request" in arrays:
                arrays["request"] = first_times(users, arrays["request"], arrays["time"])
            if "session" in arrays:
                arrays["session"] = session_places(users, arrays["session"], np.arange(len(users)))
            writer.append(RowPart(arrays, part.lists))


class OrderedRows:
    """The rows of a log in the order of users and times.

    Args:
        log: the log.
        folder: of the files.
        kind: what rows have.
        offsets: int64 `[U + 1]`, where each user's rows begin.
    """

    def __init__(self, log: SpooledLog, folder: Path, kind: RowType, offsets: np.ndarray) -> None:
        self._log, self._kind, self._offsets = log, kind, offsets
        self._spools: dict[str, Any] = {**kind.spools(folder)}  # they stand for the arrays that they hold

    def blocks(self) -> SortedBlocks:
        """Returns the events as blocks."""
        spools: Mapping[str, Any] = self._spools
        more = {name: spools[role] for role, name in _ROLES.items() if role in self._kind.arrays}
        labels: Any = spools.get("label", _Ones())
        return SortedBlocks(self._offsets, spools["item"], spools["time"], labels, more)

    def told(self, column: RawColumn) -> np.ndarray:
        """Returns which events tell the value of a feature of their owner."""
        return self._spools[_told(column)]

    def values(self, column: RawColumn) -> ColumnValues:
        """Returns the values of a feature of events, whose arrays lie in files."""
        spools, key, log = self._spools, column.key, self._log
        match column.kind:
            case Kind.CATEGORY:
                return IdValues(spools[key], log.ids(key))
            case Kind.NUMBER:
                return NumberValues(spools[key])
            case Kind.CATEGORIES:
                offsets: Any = OffsetsSpool(spools[f"{key}-counts"])
                return ListValues(spools[f"{key}-codes"], offsets, log.ids(key), spools.get(f"{key}-weights"))
        return VectorValues(spools[key] if key in spools else np.zeros((log.num_rows, 0), np.float16))


class _Ones:
    """The labels of a log without labels."""

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.ones(rows.stop - rows.start, np.uint8)


def _told(column: RawColumn) -> str:
    return f"{column.key}-told"
