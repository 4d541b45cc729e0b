"""The log's own values of declared features other than those of items, read back from prepared data.

An export is compared with the trainer by them, and `evaluate` scores an export by them.

Letters of shapes: n examples.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from din_dist.data.event_store import USERS, EventStore
from din_dist.data.pipeline import BatchMaker
from din_dist.data.raw_columns import RawColumn
from din_dist.data.raw_features import open_raw, raw_ids
from din_dist.data.side_information import SideInformation
from din_dist.data.splits import Examples
from din_dist.evaluation.retrieval import Askers
from din_dist.features.encoding import Lists
from din_dist.features.spec import OF_EXAMPLES, FeatureSpec, Kind, Owner
from din_dist.schema import Batch
from din_dist.tables.values import ColumnValues, IdValues, ListValues, NumberValues, VectorValues


class OwnValues:
    """The own values of the features of users, events and offers.

    Args:
        store: the prepared data.
    """

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._raw: dict[str, tuple[ColumnValues, np.ndarray]] = {}
        self.specs = [feature.encoding.spec for feature in store.features.values()]
        self.specs = [spec for spec in self.specs if spec.owner in OF_EXAMPLES]
        self.of_history = [
            feature.encoding.spec for feature in store.features.values() if feature.encoding.spec.owner is Owner.HISTORY
        ]

    def of(self, users: np.ndarray, events: np.ndarray, items: np.ndarray) -> dict[Owner, dict[str, Any]]:
        """Returns the values of each owner's features by name, as `Bundle.score` takes them.

        Args:
            users: int `[n]`.
            events: int `[n]`.
            items: int `[n]`, dense ids of the candidates; 0 for one without offers.
        """
        found: dict[Owner, dict[str, Any]] = {owner: {} for owner in OF_EXAMPLES}
        for spec in self.specs:
            rows = users if spec.owner is Owner.USER else events
            if (offers := self._store.features[spec.name].offers) is not None:
                rows = offers.rows(events, items)
            found[spec.owner][spec.name] = self._values(spec, np.asarray(rows, np.int64))
        return found

    def of_behaviours(self, rows: np.ndarray, ages: np.ndarray) -> dict[str, Any]:
        """Returns the values of the features of behaviours by name, `[N]` each.

        Args:
            rows: int64 `[N]`, as of `SideInformation.rows_and_ages`, likewise `ages`.
            ages: int64 `[N]`.
        """
        return {
            spec.name: ages if spec.kind is Kind.TIME_SINCE else self._values(spec, rows) for spec in self.of_history
        }

    def of_users(self, users: np.ndarray, names: Collection[str]) -> dict[str, Any]:
        """Returns the values of some features of users, int `[n]`; -1 is a user without any."""
        own = [spec for spec in self.specs if spec.owner is Owner.USER and spec.name in names]
        return {spec.name: self._values(spec, np.asarray(users, np.int64)) for spec in own}

    def _values(self, spec: FeatureSpec, rows: np.ndarray) -> Any:
        column = RawColumn.of(spec)
        if column is None:
            return self._store.timestamps[rows]  # every event has one
        if spec.trained:
            return self._ids_of_users[rows + 1]
        values, ids = self._opened(spec.name, column)
        return own_values(values.take(rows), ids)

    def _opened(self, name: str, column: RawColumn) -> tuple[ColumnValues, np.ndarray]:
        """Returns a column's values and its own ids, the first of which stands for a missing one."""
        if name not in self._raw:
            values = open_raw(self._store.folder, column, self._store.files).values
            ids = pa.array([], pa.large_string())
            if isinstance(values, (IdValues, ListValues)):
                ids = raw_ids(self._store.folder, column).combine_chunks()
            self._raw[name] = values, with_missing(ids)
        return self._raw[name]

    @functools.cached_property
    def _ids_of_users(self) -> np.ndarray:
        return with_missing(self._store.vocabulary(USERS).combine_chunks())


class OwnBehaviours:
    """The own values of the features of the behaviours in batches.

    Args:
        store: the prepared data.
        values: of its features.
        max_history_length: the most behaviours of a history without a name.
    """

    def __init__(self, store: EventStore, values: OwnValues, max_history_length: int) -> None:
        self._store, self._values, self._longest = store, values, max_history_length
        self._of_batch = SideInformation(store, store.histories(max_history_length))
        self._in_full = SideInformation(store, store.histories_in_full(max_history_length))

    def of(self, examples: Examples, batch: Batch) -> dict[str, Any]:
        """Returns the values at all positions of a batch by name, `[N]` each; none without such features."""
        if not self._values.of_history:
            return {}
        users, events = (tf.constant(ids, tf.int64) for ids in examples.users_and_events(batch.example_ids.numpy()))
        maker = BatchMaker(self._store, examples, self._longest, 0, 0)
        bounds = maker.bounds(users, events, batch.candidate_item_ids)
        return self._found(self._of_batch, bounds, events)

    def of_askers(self, askers: Askers) -> dict[str, Any]:
        """Returns the values of all behaviours for which items are ranked."""
        if not self._values.of_history:
            return {}
        return self._found(self._in_full, askers.bounds, tf.constant(askers.events, tf.int64))

    def _found(self, sides: SideInformation, bounds: Any, events: tf.Tensor) -> dict[str, Any]:
        rows, ages = sides.rows_and_ages(bounds, events)
        return self._values.of_behaviours(rows.numpy(), ages.numpy())


def own_values(values: ColumnValues, ids: np.ndarray) -> Any:
    """Returns values as `Bundle.score` takes them.

    Args:
        values: n of them.
        ids: as from `with_missing`.
    """
    match values:
        case IdValues():
            return ids[values.codes]
        case ListValues():
            return Lists(ids[values.codes], np.diff(values.offsets), values.weights)
        case NumberValues():
            return values.numbers
        case VectorValues():
            return values.vectors.astype(np.float32)
    raise TypeError(type(values))


def with_missing(ids: pa.Array) -> np.ndarray:
    """Returns ids after what stands for a missing one: int64 or strings `[1 + K]`."""
    integers = pa.types.is_integer(ids.type)
    missing = np.array([np.iinfo(np.int64).min], np.int64) if integers else np.array([""], object)
    return np.concatenate([missing, ids.to_numpy(zero_copy_only=False)])


def part_of(values: Any, start: int, end: int) -> Any:
    """Returns the values from `start` up to `end`, in the form of `own_values`."""
    if not isinstance(values, Lists):
        return values[start:end]
    ends = np.concatenate([[0], np.cumsum(values.lengths)])
    part = slice(int(ends[start]), int(ends[end]))
    return Lists(
        values.values[part], values.lengths[start:end], None if values.weights is None else values.weights[part]
    )


def by_owner(values: Mapping[Owner, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Returns values as keyword arguments of `Bundle.score`."""
    return {str(owner): own for owner, own in values.items()}
