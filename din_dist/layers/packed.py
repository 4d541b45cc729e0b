"""Operations on packed rows: flat arrays whose rows belong to segments, in ascending order.

Rows of padding, at the end, belong to segment -1: they are left out of sums, and have no gradient.
"""

from __future__ import annotations

import tensorflow as tf

from din_dist import kernels
from din_dist.layers.xla import fused


def segment_ids(lengths: tf.Tensor, native: bool = False) -> tf.Tensor:
    """`[2, 0, 1] -> [0, 0, 2]`: which of B segments each of N rows belongs to, int32 `[N]`.

    `native`: by a kernel of our own, on CPUs, where TensorFlow's cumulative sums are slow.
    """
    if native:
        ids = kernels.library().din_dist_segment_ids(lengths)
        ids.set_shape([None])
        return ids
    starts = tf.cumsum(lengths, exclusive=True)
    # One is added where each segment begins. `tf.repeat` would make a rectangle, [B, the longest].
    begun = tf.math.unsorted_segment_sum(tf.ones_like(lengths), starts, tf.reduce_sum(lengths) + 1)
    return tf.cumsum(begun)[:-1] - 1


def rows_of(rows: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """`tf.gather`; for padding, whose place is -1, some row."""
    return tf.gather(rows, tf.maximum(places, 0))


def segment_sum(values: tf.Tensor, segment_of: tf.Tensor, num_segments: tf.Tensor) -> tf.Tensor:
    """`[N, ...] -> [num_segments, ...]`; an empty segment sums to 0."""
    return tf.math.unsorted_segment_sum(values, segment_of, num_segments)


def segment_softmax(scores: tf.Tensor, segment_of: tf.Tensor, num_segments: tf.Tensor) -> tf.Tensor:
    """Softmax of `scores` `[N]` within each segment: `[N]`."""
    real = segment_of >= 0
    # The largest score only guards exp against overflow; it cancels out, in the gradient too.
    largest = tf.stop_gradient(tf.math.unsorted_segment_max(scores, segment_of, num_segments))
    exponentials = tf.exp(tf.where(real, scores - rows_of(largest, segment_of), 0.0))
    sums = segment_sum(exponentials, segment_of, num_segments)
    return exponentials / tf.where(real, rows_of(sums, segment_of), 1.0)


@fused
def rows_at(rows: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """`tf.gather`, whose gradient is one array instead of rows to be sorted later."""
    return tf.gather(rows, places)


@fused
def pool(weights: tf.Tensor, keys: tf.Tensor, segment_of: tf.Tensor, key_of: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Sum of `weights` `[P]` times the rows `key_of` `[P]` of `keys` `[K, H]` over each segment: `[C, H]`.

    `like`: any `[C, ...]`, for the number of segments, which XLA must know when it compiles.
    """
    return segment_sum(weights[:, None] * tf.gather(keys, key_of), segment_of, tf.shape(like)[0])


def padded(rows: tf.Tensor, length: tf.Tensor, value: float = 0) -> tf.Tensor:
    """`[N, ...] -> [length, ...]`."""
    paddings = [[0, length - tf.shape(rows)[0]], *[[0, 0]] * (rows.shape.rank - 1)]
    return tf.pad(rows, paddings, constant_values=tf.cast(value, rows.dtype))
