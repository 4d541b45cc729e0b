"""Operations on packed rows: flat arrays whose rows belong to segments, in ascending order.

Rows of padding, at the end, belong to segment -1: they are left out of sums, and have no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from din_dist.execution import INFERENCE, Mode
from din_dist.kernels import operations
from din_dist.layers.pairs import Pairs
from din_dist.schema import UNKNOWN_ID


def segment_ids(lengths: tf.Tensor, mode: Mode = INFERENCE) -> tf.Tensor:
    """Returns the segment of each of N rows, int32 `[N]`: `[2, 0, 1] -> [0, 0, 2]`.

    Args:
        lengths: int32 `[B]`, rows of each segment.
        mode: of the pass. Our kernel is faster than TensorFlow's cumulative sums.
    """
    if mode.kernels:
        return operations.segment_ids(lengths)
    starts = tf.cumsum(lengths, exclusive=True)
    # One is added where each segment begins. `tf.repeat` would make a rectangle, [B, the longest].
    begun = tf.math.unsorted_segment_sum(tf.ones_like(lengths), starts, tf.reduce_sum(lengths) + 1)
    return tf.cumsum(begun)[:-1] - 1


def places_in(lengths: tf.Tensor, segment_of: tf.Tensor) -> tf.Tensor:
    """Returns the place of each of N rows within its segment, int32 `[N]`: `[2, 0, 1] -> [0, 1, 0]`.

    Args:
        lengths: int32 `[B]`, rows of each segment.
        segment_of: int32 `[N]`, as from `segment_ids`.
    """
    starts = tf.cumsum(lengths, exclusive=True)
    return tf.range(tf.size(segment_of)) - tf.gather(starts, segment_of)


def split_histories(num_histories: int, lengths: tf.Tensor, *values: tf.Tensor) -> list[tuple[tf.Tensor, ...]]:
    """Returns the lengths of each of S histories, and its part of each of `values`.

    Args:
        num_histories: S.
        lengths: int32 `[S * B]`, as of `Batch.history_lengths`.
        values: `[N]` each, of all positions.
    """
    if num_histories == 1:
        return [(lengths, *values)]
    parts = tf.split(lengths, num_histories)
    ends = tf.cumsum(tf.stack([tf.reduce_sum(part) for part in parts]))
    begins = [0, *(ends[place] for place in range(num_histories - 1))]
    bounds = [slice(begin, ends[place]) for place, begin in enumerate(begins)]
    return [(part, *(own[bound] for own in values)) for part, bound in zip(parts, bounds, strict=True)]


class MatchedPositions(NamedTuple):
    """The positions of users' histories that share a feature with each of C candidates."""

    order: tf.Tensor  # int32 [N], the positions by user and feature, each oldest first
    starts: tf.Tensor  # int32 [C], where those of each candidate begin in this order
    ends: tf.Tensor  # int32 [C]


def matched_positions(
    of_positions: tuple[tf.Tensor, tf.Tensor], of_candidates: tuple[tf.Tensor, tf.Tensor], longest: int
) -> MatchedPositions:
    """Returns, for each candidate, the newest positions of its user that have its feature; none for feature 0.

    Args:
        of_positions: int32 `[N]` each, the user, ascending, and the feature.
        of_candidates: int32 `[C]` each, likewise, users in any order.
        longest: the most positions of a candidate.
    """
    users, features = (tf.cast(values, tf.int64) for values in of_positions)
    own_users, own_features = (tf.cast(values, tf.int64) for values in of_candidates)
    num_features = tf.reduce_max(tf.concat([features, own_features, [0]], axis=0)) + 1
    keys = users * num_features + features
    order = tf.argsort(keys, stable=True)
    keys, wanted = tf.gather(keys, order), own_users * num_features + own_features
    ends = tf.searchsorted(keys, wanted, side="right")
    starts = tf.maximum(tf.searchsorted(keys, wanted), ends - longest)
    return MatchedPositions(order, tf.where(own_features == UNKNOWN_ID, ends, starts), ends)


def rows_of(rows: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Returns `tf.gather(rows, index)`; padding, whose index is -1, gets some row."""
    return tf.gather(rows, tf.maximum(index, 0))


def segment_sum(values: tf.Tensor, segment_of: tf.Tensor, num_segments: tf.Tensor) -> tf.Tensor:
    """Returns the sums of `values` `[N, ...]` over each segment, `[num_segments, ...]`; an empty one sums to 0."""
    return tf.math.unsorted_segment_sum(values, segment_of, num_segments)


def segment_softmax(scores: tf.Tensor, segment_of: tf.Tensor, num_segments: tf.Tensor) -> tf.Tensor:
    """Returns the softmax of `scores` `[N]` or `[N, K]` within each segment, by column, in their shape."""
    real = segment_of >= 0
    if scores.shape.rank == 2:
        real = real[:, None]
    # The largest score only guards exp against overflow; it cancels out, in the gradient too.
    largest = tf.stop_gradient(tf.math.unsorted_segment_max(scores, segment_of, num_segments))
    exponentials = tf.exp(tf.where(real, scores - rows_of(largest, segment_of), 0.0))
    sums = segment_sum(exponentials, segment_of, num_segments)
    return exponentials / tf.where(real, rows_of(sums, segment_of), 1.0)


def rows_at(rows: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Returns `tf.gather(rows, index)`. Compiled, its gradient is one array instead of rows to be sorted later."""
    return tf.gather(rows, index)


def behaviours_of(behaviours: tf.Tensor, pairs: Pairs, sides: tf.Tensor | None = None) -> tf.Tensor:
    """Returns the behaviour of each pair with its side information, float32 `[P, H + S]`.

    Args:
        behaviours: float32 `[K, H]`.
        pairs: P pairs.
        sides: float32 `[T, S]`. None: there is none.
    """
    rows = tf.gather(behaviours, pairs.behaviour_of)
    return rows if sides is None else tf.concat([rows, tf.gather(sides, pairs.side_of)], axis=1)


def pool(
    weights: tf.Tensor, behaviours: tf.Tensor, pairs: Pairs, like: tf.Tensor, sides: tf.Tensor | None = None
) -> tf.Tensor:
    """Returns the sum over each candidate's pairs of weight times behaviour, float32 `[C, H + S]`.

    Args:
        weights: float32 `[P]`.
        behaviours: float32 `[K, H]`.
        pairs: P pairs.
        like: any `[C, ...]`: XLA must know the number of candidates when it compiles.
        sides: float32 `[T, S]`. None: there is none.
    """
    rows = behaviours_of(behaviours, pairs, sides)
    return segment_sum(weights[:, None] * rows, pairs.candidate_of, tf.shape(like)[0])


def padded(rows: tf.Tensor, length: tf.Tensor, value: float = 0) -> tf.Tensor:
    """Returns `rows` `[N, ...]` and padding behind them, `[length, ...]`."""
    paddings = [[0, length - tf.shape(rows)[0]], *[[0, 0]] * (rows.shape.rank - 1)]
    return tf.pad(rows, paddings, constant_values=tf.cast(value, rows.dtype))
