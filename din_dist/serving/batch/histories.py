"""Turns the ids of a batch into tensors for the model. Each distinct id is converted only once.

Letters of shapes: R rows of a batch, V ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from din_dist.data.event_store import ITEMS, USERS, EventStore, HistorySet
from din_dist.data.histories import earlier_by
from din_dist.errors import InputError
from din_dist.schema import BY_COLUMN
from din_dist.serving.given_behaviours import GivenBehaviours, by_user
from din_dist.serving.own_values import OwnValues
from din_dist.tables.ids import Ids

_OTHER_UNIT = (
    500  # a time this many times larger or smaller than all of the log has another unit, or is of another kind
)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Ids `[V]`, stored as `distinct[codes]`.

    Of several histories, `names` `[V]` has the name of each one's. `features` has `[V]` values of each by name.
    """

    distinct: tf.Tensor
    codes: np.ndarray
    names: np.ndarray | None = None
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def part(self, start: int, end: int) -> tf.Tensor | GivenBehaviours:
        """Returns the ids from `start` up to `end`."""
        ids = tf.gather(self.distinct, self.codes[start:end])
        if self.names is None and not self.features:
            return ids
        names = None if self.names is None else tf.constant(self.names[start:end], tf.string)
        return GivenBehaviours(ids, names, {name: values[start:end] for name, values in self.features.items()})


def encode(ids: pa.Array) -> Encoded:
    """Encodes ids by their distinct values.

    Strings become Python objects on their way to TensorFlow, which is slow; this way only the distinct ones do.
    """
    encoded = ids.dictionary_encode()
    return Encoded(ids_tensor(encoded.dictionary), encoded.indices.to_numpy())


def ids_tensor(ids: pa.Array | pa.ChunkedArray) -> tf.Tensor:
    if pa.types.is_integer(ids.type):
        return tf.constant(np.asarray(ids), tf.int64)
    words = ids.cast(pa.large_binary())
    return tf.constant(
        words.to_numpy() if isinstance(ids, pa.ChunkedArray) else words.to_numpy(zero_copy_only=False), tf.string
    )


def newest(starts: np.ndarray, ends: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the last `most` values of each range, concatenated `[V]`, and their number `[R]`.

    Args:
        starts: int64 `[R]`, where each range starts.
        ends: int64 `[R]`, where each range ends.
        most: the most values to keep of a range.
    """
    lengths = np.minimum(ends - starts, most)
    row_starts = np.cumsum(lengths) - lengths
    indices = np.arange(lengths.sum()) + np.repeat(ends - lengths - row_starts, lengths)
    return indices, lengths


class GivenHistories:
    """Histories that the rows themselves contain."""

    num_unknown = num_too_early = num_timed = 0

    def __init__(self, max_history_length: int) -> None:
        self._most = max_history_length

    def of(
        self,
        histories: Ids,
        before: np.ndarray | None = None,
        names: Ids | None = None,
        features: Mapping[str, Any] | None = None,
    ) -> tuple[Encoded, np.ndarray]:
        """Returns the item ids of all histories, concatenated, and the lengths `[R]`.

        Args:
            histories: lists of items.
            before: must be None: the rows know no times.
            names: lists of the names of each item's history; None: there is one history.
            features: name -> the value of each item, of all histories concatenated. None: there are none.

        Raises:
            InputError: a row has not as many names as items.
        """
        if histories.offsets is None or before is not None:
            raise TypeError("histories are lists, without times")
        if names is not None:
            return self._named(histories, names, features or {})
        indices, lengths = newest(histories.offsets[:-1], histories.offsets[1:], self._most)
        values = histories.values
        found = encode(values if len(indices) == len(values) else values.take(pa.array(indices)))
        own_features = {name: own[indices] for name, own in (features or {}).items()}
        return dataclasses.replace(found, features=own_features), lengths

    def _named(self, histories: Ids, names: Ids, features: Mapping[str, Any]) -> tuple[Encoded, np.ndarray]:
        assert histories.offsets is not None
        assert names.offsets is not None
        lengths, others = np.diff(histories.offsets), np.diff(names.offsets)
        if (wrong := np.flatnonzero(lengths != others)).size:
            row = int(wrong[0])
            raise InputError(
                "--history_names_column: must name the history of each item. Received: "
                f"{others[row]} names for {lengths[row]} items in a row. Correct the row."
            )
        found = encode(histories.values)
        own_names = names.values.cast(pa.large_string()).to_numpy(zero_copy_only=False)
        return dataclasses.replace(found, names=own_names, features=features), lengths

    def user_features(self, column: Ids, names: Collection[str]) -> dict[str, Any]:
        """Returns nothing: the rows have them."""
        return {}


class UserHistories:
    """Histories from prepared data: a user's behaviours, oldest first; the named ones if there are several.

    An unknown user has an empty history. The item ids are the log's own, so the model may come from another day's data.

    Args:
        store: the prepared data.
        max_history_length: the most behaviours of a history without a name.
        features: the names of the features of behaviours that the model reads.
    """

    def __init__(self, store: EventStore, max_history_length: int, features: Collection[str] = ()) -> None:
        self._store, self._most, self._features = store, max_history_length, features
        users = store.vocabulary(USERS)
        self.users_are_integers = pa.types.is_integer(users.type)
        self._user_of = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(ids_tensor(users), tf.range(len(users), dtype=tf.int64)), -1
        )
        self._values = OwnValues(store)
        items = store.vocabulary(ITEMS)
        self.items_are_integers = pa.types.is_integer(items.type)
        self._item_ids = ids_tensor(items)
        self.num_unknown = 0
        self.num_timed = 0  # rows with a time and a history
        self.num_too_early = 0  # those of them whose time is before the whole history

    def of(
        self,
        users: Ids,
        before: np.ndarray | None = None,
        names: Ids | None = None,
        features: Mapping[str, Any] | None = None,
    ) -> tuple[Encoded, np.ndarray]:
        """Returns the item ids of all users' histories, concatenated, and the lengths `[R]`.

        Args:
            users: `[R]`, the log's own ids.
            before: int64 `[R]`; only events that are known before count.
            names: must be None: prepared data have them, and the features too.
            features: see `names`.

        Raises:
            InputError: a time cannot be of the log's kind and unit.
        """
        if names is not None or features:
            raise TypeError("prepared data have the names of histories and the features of behaviours")
        if before is not None:
            self._check_kind(before)
        found = self._indices(users)
        known = found >= 0
        self.num_unknown += int(np.count_nonzero(~known))
        histories = self._store.histories_in_full(self._most)
        cut = [self._cut(history, found, before) for history in histories]
        if before is not None:
            has_any = np.any([starts < ends for starts, ends, _ in cut], axis=0)
            has_some = np.any([starts < earlier for starts, _, earlier in cut], axis=0)
            self.num_timed += int(np.count_nonzero(has_any))
            self.num_too_early += int(np.count_nonzero(has_any & ~has_some))
        items, all_lengths, all_rows, all_ages = [], [], [], []
        for history, (starts, _, earlier) in zip(histories, cut, strict=True):
            indices, lengths = newest(starts, earlier, history.longest)
            items.append(history.item_ids[indices] - 1)
            all_lengths.append(lengths)
            if self._features:
                all_rows.append(indices if history.rows is None else history.rows[indices])
                all_ages.append(self._ages(history, indices, all_rows[-1], before, lengths))
        own_features: dict[str, Any] = {}
        if self._features:
            every = self._values.of_behaviours(np.concatenate(all_rows), np.concatenate(all_ages))
            own_features = {name: values for name, values in every.items() if name in self._features}
        if len(items) == 1:
            return Encoded(self._item_ids, items[0], features=own_features), all_lengths[0]
        of_sets = [history.name for history in self._store.sets]
        order, own_names, lengths = by_user(np.concatenate(all_lengths), of_sets)
        ordered = {name: values[order] for name, values in own_features.items()}
        return Encoded(self._item_ids, np.concatenate(items)[order], own_names, ordered), lengths

    def _ages(
        self, history: HistorySet, places: np.ndarray, rows: np.ndarray, before: np.ndarray | None, lengths: np.ndarray
    ) -> np.ndarray:
        """Returns how long ago behaviours were, int64 `[V]`; what stands for missing where no time is given.

        Args:
            history: of the store.
            places: int64 `[V]`, of the behaviours.
            rows: int64 `[V]`, their rows in features of behaviours.
            before: int64 `[R]`, the time of each row of the batch.
            lengths: int64 `[R]`.
        """
        if before is None:
            return np.full(len(places), np.iinfo(np.int64).min)
        times = self._store.behaviour_times[rows] if history.times is None else history.times[places]
        return np.repeat(before, lengths) - times

    def _cut(
        self, history: HistorySet, users: np.ndarray, before: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns where the behaviours of each user begin, where they end, and where those known before a time do.

        Args:
            history: of the store.
            users: int64 `[R]`, numbers of users; -1 for unknown ones.
            before: int64 `[R]`; None: all are known.
        """
        known = users >= 0
        owners = users
        if self._store.sessions is not None:
            owners = np.full(len(users), -1, np.int64)
            owners[known] = self._sessions_at(users[known], None if before is None else before[known])
            known = owners >= 0
        starts, ends = np.zeros((2, len(users)), np.int64)
        starts[known], ends[known] = history.offsets[owners[known]], history.offsets[owners[known] + 1]
        if before is None:
            return starts, ends, ends
        earlier = ends.copy()
        earlier[known] = self._ends_before(history, owners[known], before[known])
        return starts, ends, earlier

    def _sessions_at(self, users: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        """Returns the session that each user is in, that of the newest event, int64 `[R]`; -1 if it is over.

        Args:
            users: int64 `[R]`, numbers of users.
            before: int64 `[R]`, only earlier events count; None: all do.
        """
        store = self._store
        assert store.sessions is not None
        if before is None:
            return store.sessions[store.user_offsets[users + 1] - 1]
        last = _num_before(store.timestamps, store.user_offsets, users, before) - 1
        has_one = last >= store.user_offsets[users]
        if store.facts.sessions != BY_COLUMN:
            has_one &= before - store.timestamps[last] <= int(store.facts.sessions)
        return np.where(has_one, store.sessions[last], -1)

    def user_features(self, column: Ids, names: Collection[str]) -> dict[str, Any]:
        """Returns the prepared users' own features of these names, `R` values each; an unknown user has none."""
        return self._values.of_users(self._indices(column), names) if names else {}

    def _indices(self, users: Ids) -> np.ndarray:
        """Returns the number of each user from 0, int64 `[R]`; -1 for an unknown one."""
        encoded = encode(users.values)
        return self._user_of.lookup(encoded.distinct).numpy()[encoded.codes]

    def _check_kind(self, before: np.ndarray) -> None:
        """Refuses times of another unit or kind than the log's, which would cut all histories or none.

        Examples are milliseconds instead of seconds, or dates instead of numbers.
        """
        facts = self._store.facts
        small, large = sorted(abs(float(time)) for time in (facts.first_timestamp, facts.last_timestamp))
        sizes = np.abs(before.astype(np.float64))
        wrong = np.flatnonzero((sizes > _OTHER_UNIT * max(large, 1.0)) | ((sizes > 0) & (sizes * _OTHER_UNIT < small)))
        if len(wrong):
            raise InputError(
                "--before_column: must hold times of the log's kind and unit, which as prepared go from "
                f"{facts.first_timestamp} to {facts.last_timestamp}. Received: {before[wrong[0]]}. Give times of the "
                "same kind (integers or dates) and unit as the log has."
            )

    def _ends_before(self, history: HistorySet, users: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Returns where each user's behaviours end that are known before a time.

        Args:
            history: of the store.
            users: int64 `[R]`, numbers of users; of sessions, if histories are.
            before: int64 `[R]`, times.
        """
        store = self._store
        before = earlier_by(before, store.facts.history_delay)
        if history.times is not None:
            return _num_before(history.times, history.offsets, users, before)
        first = _num_before(store.timestamps, store.user_offsets, users, before)  # the first event that is not earlier
        if store.labels is None:
            return first
        assert store.history_ends is not None
        last = store.user_offsets[users + 1]
        ends = store.history_ends[np.minimum(first, last - 1)]
        return np.where(first < last, ends, store.history_offsets[users + 1])


def _num_before(times: np.ndarray, offsets: np.ndarray, users: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Returns the first time of each user that is not before another, by a binary search over all users at once.

    Args:
        times: int64, ascending for each user.
        offsets: int64 `[U + 1]`, where each user's times begin.
        users: int64 `[R]`, numbers of users.
        before: int64 `[R]`.
    """
    low, high = offsets[users], offsets[users + 1]
    last = high
    while (open_ := low < high).any():
        middle = (low + high) // 2
        earlier = times[np.minimum(middle, last - 1)] < before
        low, high = np.where(open_ & earlier, middle + 1, low), np.where(open_ & ~earlier, middle, high)
    return low


def check_item_types(histories: UserHistories, export_has_integers: bool, folder: str) -> None:
    """Checks that the data and the export have item ids of the same type.

    Raises:
        InputError: the types differ.
    """
    if histories.items_are_integers != export_has_integers:
        words = {True: "integers", False: "strings"}
        raise InputError(
            f"--user_histories: item ids must be of the same type as the export's, {words[export_has_integers]}. "
            f"Received: {folder} with {words[histories.items_are_integers]}. Name the job of the export."
        )
