"""Negatives, drawn uniformly from the items that a user never touched, without trial and error.

M is the number of draws, or of users.
"""

from __future__ import annotations

import tensorflow as tf

from din_dist.data.hashing import place_in_random_order
from din_dist.execution import Execution
from din_dist.kernels import operations


def untouched_items(
    random: tf.Tensor,
    begins: tf.Tensor,
    ends: tf.Tensor,
    touched_gaps: tf.Tensor,
    num_items: int,
    num_halvings: int,
    execution: Execution | None = None,
) -> tf.Tensor:
    """Returns the (random modulo number of untouched items)-th item that each user never touched: int32 `[M]`, from 1.

    A user who touched items s_0 < s_1 < ... (from 0) has left `gap_j = s_j - j` items untouched below s_j. So the
    r-th untouched item is `r + #{j: gap_j <= r}`. The gaps ascend, so a binary search finds the count.

    Args:
        random: uint64 `[M]`.
        begins: integers `[M]`, where each user's window in `touched_gaps` begins.
        ends: integers `[M]`, where it ends.
        touched_gaps: int32 `[T]`, see `EventStore`.
        num_items: the number of items to draw from.
        num_halvings: `ceil(log2(longest + 1))` for the longest window.
        execution: how the draws are computed. None: TensorFlow's operations compute them.
    """
    begins, ends = tf.cast(begins, tf.int64), tf.cast(ends, tf.int64)
    if execution is not None and execution.kernels:
        return operations.untouched_items(random, begins, ends, touched_gaps, num_items)
    num_untouched = num_items - (ends - begins)
    rank = tf.cast(tf.math.floormod(random, tf.cast(num_untouched, tf.uint64)), tf.int64)
    low, high = begins, ends
    last = tf.size(touched_gaps, tf.int64) - 1
    for _ in range(num_halvings):  # a fixed number of turns: a row that is done stays as it is
        middle = (low + high) // 2
        gap = tf.cast(tf.gather(touched_gaps, tf.minimum(middle, last)), tf.int64)
        right = (gap <= rank) & (low < high)
        low, high = tf.where(right, middle + 1, low), tf.where(right, high, middle)
    return tf.cast(rank + (low - begins) + 1, tf.int32)


def distinct_untouched_items(
    keys: tf.Tensor, counts: tf.Tensor, begins: tf.Tensor, ends: tf.Tensor, touched_gaps: tf.Tensor, num_items: int
) -> tf.Tensor:
    """Returns different items that each user never touched, drawn uniformly: int32 `[sum of counts]`, concatenated.

    Args:
        keys: integers `[M]`; each gives a draw of its own.
        counts: integers `[M]`, how many items to draw; at most as many as the user left untouched.
        begins: integers `[M]`, where each user's window in `touched_gaps` begins.
        ends: integers `[M]`, where it ends.
        touched_gaps: int32 `[T]`, see `EventStore`.
        num_items: the number of items to draw from.
    """
    counts, begins, ends = (tf.cast(values, tf.int64) for values in (counts, begins, ends))
    place = tf.ragged.range(counts).values
    keys, of_begins, of_ends = (tf.repeat(values, counts) for values in (keys, begins, ends))
    random = place_in_random_order(place, num_items - (of_ends - of_begins), num_items, keys)
    longest = int(tf.reduce_max(ends - begins)) if len(begins) else 0
    return untouched_items(
        tf.cast(random, tf.uint64), of_begins, of_ends, touched_gaps, num_items, num_halvings=longest.bit_length()
    )
