"""Features of the behaviours at the positions of histories: their action, their quantity, their age at the request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from din_dist.data.event_store import EventStore, HistorySet
from din_dist.features.gathering import without_copying
from din_dist.features.sides import age_rows, distinct_sides
from din_dist.features.spec import Kind, Owner
from din_dist.schema import UNKNOWN_ID


class SideInformation:
    """The features of the behaviours of some histories.

    Args:
        store: the events.
        histories: what examples read.
    """

    def __init__(self, store: EventStore, histories: Sequence[HistorySet]) -> None:
        features = {name: each for name, each in store.features.items() if each.encoding.spec.owner is Owner.HISTORY}
        self._kinds = {name: each.encoding.spec.kind for name, each in features.items()}
        self._values = {name: without_copying(each.values) for name, each in features.items()}
        if features:
            self._moments = without_copying(store.timestamps if store.request_times is None else store.request_times)
            self._places = [_BehaviourPlaces(store, history) for history in histories]

    def of(self, bounds: Sequence[tuple[tf.Tensor, tf.Tensor]], events: tf.Tensor) -> tuple[Any, Any]:
        """Returns the combinations of values of all positions, and the place of each; see `Batch`. () without features.

        Args:
            bounds: of each history, int64 `[B]` each, the first and the end of each example's among its behaviours.
            events: int64 `[B]`, the event of each example.
        """
        if not self._kinds:
            return (), ()
        rows, ages = self.rows_and_ages(bounds, events)
        found = {}
        for name, kind in self._kinds.items():
            if kind is Kind.TIME_SINCE:
                found[name] = age_rows(ages)
            else:
                own = tf.gather(self._values[name], tf.maximum(rows, 0))
                found[name] = tf.where(rows < 0, UNKNOWN_ID, own)
        return distinct_sides(found)

    def rows_and_ages(
        self, bounds: Sequence[tuple[tf.Tensor, tf.Tensor]], events: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the row of each position in features of behaviours, -1 for none, and its age at the request.

        Args:
            bounds: as of `of`, likewise `events`.
            events: int64 `[B]`.

        Returns:
            int64 `[N]` each.
        """
        moments = tf.gather(self._moments, events)
        all_rows, all_ages = [], []
        for places, (begins, ends) in zip(self._places, bounds, strict=True):
            at = tf.ragged.range(begins, ends).values
            rows = places.rows(at)
            all_rows.append(rows)
            all_ages.append(tf.repeat(moments, ends - begins) - places.times(at, rows))
        return tf.concat(all_rows, axis=0), tf.concat(all_ages, axis=0)


class _BehaviourPlaces:
    """Rows and times of the behaviours of one history."""

    def __init__(self, store: EventStore, history: HistorySet) -> None:
        self._rows = None if history.rows is None else without_copying(history.rows)
        self._times = None if history.times is None else without_copying(history.times)
        self._times_of_rows = without_copying(store.behaviour_times)

    def rows(self, places: tf.Tensor) -> tf.Tensor:
        """Returns the rows of behaviours in their features, int64 `[N]`; -1 for one that has none."""
        return places if self._rows is None else tf.gather(self._rows, places)

    def times(self, places: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Returns when they happened, int64 `[N]`."""
        return tf.gather(self._times_of_rows, rows) if self._times is None else tf.gather(self._times, places)
