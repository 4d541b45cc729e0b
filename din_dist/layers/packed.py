"""Operations on packed rows: flat arrays whose rows belong to segments, in ascending order."""

from __future__ import annotations

import tensorflow as tf


def segment_ids(lengths: tf.Tensor) -> tf.Tensor:
    """`[2, 0, 1] -> [0, 0, 2]`: which of B segments each of N rows belongs to, int32 `[N]`."""
    return tf.repeat(tf.range(tf.size(lengths)), lengths)


def segment_sum(values: tf.Tensor, segment_of: tf.Tensor, num_segments: tf.Tensor) -> tf.Tensor:
    """`[N, ...] -> [num_segments, ...]`; an empty segment sums to 0."""
    return tf.math.unsorted_segment_sum(values, segment_of, num_segments)


def segment_softmax(scores: tf.Tensor, segment_of: tf.Tensor, num_segments: tf.Tensor) -> tf.Tensor:
    """Softmax of `scores` `[N]` within each segment: `[N]`."""
    # The largest score only guards exp against overflow; it cancels out, in the gradient too.
    largest = tf.stop_gradient(tf.math.unsorted_segment_max(scores, segment_of, num_segments))
    exponentials = tf.exp(scores - tf.gather(largest, segment_of))
    sums = segment_sum(exponentials, segment_of, num_segments)
    return exponentials / tf.gather(sums, segment_of)
