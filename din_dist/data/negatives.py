"""Negatives, drawn from the items that a user never touched: uniformly or by weight, without trial and error.

M is the number of draws, or of users.
"""

from __future__ import annotations

from collections.abc import Callable

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
    last = tf.size(touched_gaps, tf.int64) - 1

    def is_passed(place: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.gather(touched_gaps, tf.minimum(place, last)), tf.int64) <= rank

    return tf.cast(rank + (first_not(is_passed, begins, ends, num_halvings) - begins) + 1, tf.int32)


def first_not(
    is_passed: Callable[[tf.Tensor], tf.Tensor], low: tf.Tensor, high: tf.Tensor, num_halvings: int
) -> tf.Tensor:
    """Returns the first place of each window that is not passed, or its end: int64 `[M]`, by a binary search.

    Args:
        is_passed: tells of places `[M]`, one a window, if they are; those that are come first.
        low: int64 `[M]`, where each window begins.
        high: int64 `[M]`, where it ends.
        num_halvings: `ceil(log2(longest + 1))` for the longest window.
    """
    for _ in range(num_halvings):  # a fixed number of turns: a row that is done stays as it is
        middle = (low + high) // 2
        right = is_passed(middle) & (low < high)
        low, high = tf.where(right, middle + 1, low), tf.where(right, high, middle)
    return low


def weighted_untouched_items(
    random: tf.Tensor,
    begins: tf.Tensor,
    ends: tf.Tensor,
    touched_gaps: tf.Tensor,
    touched_below: tf.Tensor,
    cumulative: tf.Tensor,
    num_halvings: int,
) -> tf.Tensor:
    """Returns items that each user never touched, drawn by weight: int32 `[M]`.

    As in `untouched_items`, but each item counts as many times as its weight says. With the weight of all untouched
    items below the touched item j being `below_j`, the number r falls behind the `#{j: below_j <= r}` first ones.

    Args:
        random: uint64 `[M]`.
        begins: integers `[M]`, where each user's window in `touched_gaps` begins.
        ends: integers `[M]`, where it ends.
        touched_gaps: int32 `[T]`, see `EventStore`.
        touched_below: int64 `[T]`, see `Popularity`, likewise the next.
        cumulative: int64 `[num_items + 1]`.
        num_halvings: `ceil(log2(longest + 1))` for the longest window.
    """
    begins, ends = tf.cast(begins, tf.int64), tf.cast(ends, tf.int64)
    total, most = cumulative[-1], tf.size(touched_gaps, tf.int64) - 1

    def touched_weight(end: tf.Tensor) -> tf.Tensor:
        """Returns the weight of a user's touched items from `begins` up to `end`."""
        place = tf.clip_by_value(end - 1, 0, most)
        item = tf.cast(tf.gather(touched_gaps, place), tf.int64) + 1 + (place - begins)
        weight = tf.gather(cumulative, tf.maximum(item, 0)) - tf.gather(touched_below, place)
        return tf.where(end > begins, weight, 0)

    left = total - touched_weight(ends)
    number = tf.cast(tf.math.floormod(random, tf.cast(left, tf.uint64)), tf.int64)

    def is_passed(place: tf.Tensor) -> tf.Tensor:
        return tf.gather(touched_below, tf.minimum(place, most)) <= number

    first = first_not(is_passed, begins, ends, num_halvings)
    return tf.searchsorted(cumulative, number + touched_weight(first), side="right")


def is_touched(
    items: tf.Tensor, begins: tf.Tensor, ends: tf.Tensor, touched_gaps: tf.Tensor, num_halvings: int
) -> tf.Tensor:
    """Tells whether each user has touched an item: bool `[M]`.

    Args:
        items: integers `[M]`.
        begins: integers `[M]`, where each user's window in `touched_gaps` begins.
        ends: integers `[M]`, where it ends.
        touched_gaps: int32 `[T]`, see `EventStore`.
        num_halvings: `ceil(log2(longest + 1))` for the longest window.
    """
    items, begins, ends = (tf.cast(values, tf.int64) for values in (items, begins, ends))
    last = tf.size(touched_gaps, tf.int64) - 1

    def touched(place: tf.Tensor) -> tf.Tensor:
        place = tf.minimum(place, last)
        return tf.cast(tf.gather(touched_gaps, place), tf.int64) + 1 + (place - begins)

    first = first_not(lambda place: touched(place) < items, begins, ends, num_halvings)
    return (first < ends) & tf.equal(touched(first), items)


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
