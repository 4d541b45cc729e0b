"""Gathers the values of some rows of a stored feature, inside the TensorFlow graph.

Letters of shapes: n rows, M values of all lists, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from din_dist.execution import Execution, on_host
from din_dist.features.encoding import Encoding, Lists, StoredFeature
from din_dist.features.offers import Offers
from din_dist.features.spec import Form, Pooling
from din_dist.kernels import operations


class FeatureValues:
    """The values of a stored feature as tensors over the memory-mapped arrays.

    Args:
        stored: the feature.
    """

    def __init__(self, stored: StoredFeature) -> None:
        self.encoding = stored.encoding
        self._values = without_copying(stored.values)
        self._offsets = None if stored.offsets is None else without_copying(stored.offsets)
        self._weights = None if stored.weights is None else without_copying(stored.weights)
        self.offers = stored.offers

    def of(self, rows: tf.Tensor, execution: Execution | None = None) -> Any:
        """Returns the values of `rows` `[n]` by form: int32 `[n]`, `Lists` of n, float32 `[n]` or float16 `[n, D]`.

        Args:
            rows: int32 or int64 `[n]`, rows of the feature's owner.
            execution: how lists are gathered. None: by TensorFlow's operations.
        """
        with on_host():
            if self._offsets is None:
                return tf.gather(self._values, rows)
            begins, ends = tf.gather(self._offsets, rows), tf.gather(self._offsets, rows + 1)
            lengths = tf.cast(ends - begins, tf.int32)
            if self._weights is None and execution and execution.kernels:
                return Lists(operations.windows(self._values, begins, ends), lengths, tf.zeros([0]))
            places = tf.ragged.range(begins, ends).values
            weights = tf.zeros([0]) if self._weights is None else tf.gather(self._weights, places)
            return Lists(tf.gather(self._values, places), lengths, weights)


class OfferRows:
    """The rows of offers as tensors over the memory-mapped arrays.

    Args:
        offers: which row an item has under the circumstances of an event.
    """

    def __init__(self, offers: Offers) -> None:
        self._keys = without_copying(offers.keys)
        self._circumstances = without_copying(offers.circumstances)
        self._num_items = offers.num_items

    def of(self, events: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """Returns the row of each item's offer, int64 `[n]`; 0 for none.

        Args:
            events: int64 `[n]`, the events whose circumstances count.
            items: int32 `[n]`, dense ids; -i stands for item i whose id is hidden.
        """
        with on_host():
            circumstances = tf.cast(tf.gather(self._circumstances, events), tf.int64)
            wanted = circumstances * (self._num_items + 1) + tf.cast(tf.abs(items), tf.int64)
            places = tf.searchsorted(self._keys, wanted, out_type=tf.int64)
            places = tf.minimum(places, tf.size(self._keys, tf.int64) - 1)
            return tf.where(tf.gather(self._keys, places) == wanted, places + 1, 0)


def signature_of(encodings: Iterable[Encoding]) -> dict[str, Any]:
    """Returns the TensorSpec of any number of values of each feature, by name."""
    specs: dict[str, Any] = {}
    for encoding in encodings:
        match encoding.form:
            case Form.IDS:
                spec = tf.TensorSpec([None], tf.int32)
            case Form.LISTS:
                ids = tf.TensorSpec([None], tf.int32)
                num_weights = None if encoding.spec.pool is Pooling.WEIGHTED else 0
                spec = Lists(ids, ids, tf.TensorSpec([num_weights], tf.float32))
            case Form.NUMBERS:
                spec = tf.TensorSpec([None], tf.float32)
            case Form.VECTORS:
                spec = tf.TensorSpec([None, encoding.dimension], tf.float16)
        specs[encoding.spec.name] = spec
    return specs


def missing_values(encodings: Iterable[Encoding], num_rows: int | tf.Tensor) -> dict[str, Any]:
    """Returns what stands for `num_rows` missing values of each feature, by name."""
    values: dict[str, Any] = {}
    for encoding in encodings:
        no_ids = tf.zeros([num_rows], tf.int32)
        match encoding.form:
            case Form.IDS:
                missing = no_ids
            case Form.LISTS:
                missing = Lists(tf.zeros([0], tf.int32), no_ids, tf.zeros([0]))
            case Form.NUMBERS:
                missing = tf.fill([num_rows], np.float32(np.nan))
            case Form.VECTORS:
                missing = tf.fill([num_rows, encoding.dimension], np.float16(np.nan))
        values[encoding.spec.name] = missing
    return values


def without_copying(array: np.ndarray) -> tf.Tensor:
    """Returns a CPU tensor over the memory of `array`, so that processes go on sharing memory-mapped pages."""
    with tf.device("CPU:0"):
        if array.size == 0 or array.ctypes.data % 64:  # TensorFlow needs whole cache lines
            return tf.constant(array)
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
