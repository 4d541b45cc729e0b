"""The age of an example in training: how long before the newest event of training it happened."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

from din_dist.data.event_store import EventStore
from din_dist.data.splits import Examples
from din_dist.features.gathering import without_copying


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleAges:
    """The ages of events, from 0 for the newest of training to 1 for the oldest.

    Attributes:
        timestamps: int64 `[E]`, of all events.
        oldest: the earliest time of training.
        newest: the latest.
    """

    timestamps: np.ndarray
    oldest: int
    newest: int

    @classmethod
    def of_training(cls, store: EventStore, examples: Examples) -> ExampleAges:
        """Returns the ages on the scale of some examples, which must not be empty.

        Args:
            store: the events.
            examples: those of training.
        """
        times = [store.timestamps[events] for events in examples.event_parts()]
        return cls(store.timestamps, min(int(part.min()) for part in times), max(int(part.max()) for part in times))

    def __post_init__(self) -> None:
        object.__setattr__(self, "_times", without_copying(self.timestamps))

    def of(self, events: tf.Tensor) -> tf.Tensor:
        """Returns the age of each event of training, float32 `[B]`; 0 if all have one time.

        Args:
            events: int64 `[B]`.
        """
        times: tf.Tensor = self._times  # type: ignore[attr-defined]
        since = tf.cast(tf.constant(self.newest, tf.int64) - tf.gather(times, events), tf.float64)
        return tf.cast(since / max(1, self.newest - self.oldest), tf.float32)
