"""Negatives: uniform over the items that a user never touched, without trial and error."""

from __future__ import annotations

import tensorflow as tf

from din_dist import kernels
from din_dist.data.hashing import place_in_random_order


def untouched_items(
    random: tf.Tensor,
    begins: tf.Tensor,
    ends: tf.Tensor,
    touched_gaps: tf.Tensor,
    num_items: int,
    num_halvings: int,
    native: bool = False,
) -> tf.Tensor:
    """The (random modulo number of untouched items)-th item that each user never touched: int32 `[M]`, ids from 1.

    A user who touched items s_0 < s_1 < ... (from 0) has left `gap_j = s_j - j` items untouched below s_j. So the
    r-th untouched item is `r + #{j: gap_j <= r}`; the gaps ascend, and the count is a binary search.

    Args:
        random: uint64 `[M]`.
        begins, ends: `[M]`, each user's window in `touched_gaps`.
        touched_gaps: int32, see `EventStore`.
        num_halvings: of the longest window, `ceil(log2(longest + 1))`.
        native: by a kernel of our own.
    """
    begins, ends = tf.cast(begins, tf.int64), tf.cast(ends, tf.int64)
    if native:
        items = kernels.library().din_dist_untouched_items(random, begins, ends, touched_gaps, num_items=num_items)
        return tf.ensure_shape(items, random.shape)
    num_untouched = num_items - (ends - begins)
    rank = tf.cast(tf.math.floormod(random, tf.cast(num_untouched, tf.uint64)), tf.int64)
    low, high = begins, ends
    last = tf.size(touched_gaps, tf.int64) - 1
    for _ in range(num_halvings):  # a fixed number of turns: rows that are done stay as they are
        middle = (low + high) // 2
        gap = tf.cast(tf.gather(touched_gaps, tf.minimum(middle, last)), tf.int64)
        right = (gap <= rank) & (low < high)
        low, high = tf.where(right, middle + 1, low), tf.where(right, high, middle)
    return tf.cast(rank + (low - begins) + 1, tf.int32)


def distinct_untouched_items(
    keys: tf.Tensor, counts: tf.Tensor, begins: tf.Tensor, ends: tf.Tensor, touched_gaps: tf.Tensor, num_items: int
) -> tf.Tensor:
    """`counts` different items for each of `keys`, integers `[M]`: int32 `[sum of counts]`, uniform and end to end.

    Args:
        counts: `[M]`, at most as many as the user left untouched.
        begins, ends, touched_gaps: as of `untouched_items`.
    """
    counts, begins, ends = (tf.cast(values, tf.int64) for values in (counts, begins, ends))
    place = tf.ragged.range(counts).values
    keys, of_begins, of_ends = (tf.repeat(values, counts) for values in (keys, begins, ends))
    random = place_in_random_order(place, num_items - (of_ends - of_begins), num_items, keys)
    longest = int(tf.reduce_max(ends - begins)) if len(begins) else 0
    return untouched_items(
        tf.cast(random, tf.uint64), of_begins, of_ends, touched_gaps, num_items, num_halvings=longest.bit_length()
    )
