"""Side information of behaviours: the combinations of its values, each once.

Letters of shapes: N history positions, T combinations.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

_POWERS = 2 ** np.arange(63)  # int64


def age_rows(ages: tf.Tensor) -> tf.Tensor:
    """Returns the row of each age in the table of a `time_since` feature, int32 `[N]`: 1 for 0, then one a doubling.

    An age of 1 has row 2, of 2 or 3 row 3, of 4 to 7 row 4.

    Args:
        ages: int64 `[N]`, from a behaviour to the request, in the unit of the timestamps; less than 0 counts as 0.
    """
    return 1 + tf.searchsorted(tf.constant(_POWERS, tf.int64), tf.maximum(ages, 0), side="right")


def distinct_sides(values: Mapping[str, tf.Tensor]) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
    """Returns each combination of values once, and the place of each position among them.

    What a model computes of side information it computes once for each combination.

    Args:
        values: name -> int32 `[N]`, the id of each position; at least one name.

    Returns:
        Name -> int32 `[T]`, and int32 `[N]`.
    """
    ids = [*values.values()]
    index = tf.zeros_like(ids[0])
    for own in ids:
        num_rows = tf.cast(tf.reduce_max(tf.concat([own, [0]], axis=0)) + 1, tf.int64)
        _, index = tf.unique(tf.cast(index, tf.int64) * num_rows + tf.cast(own, tf.int64))
    num_distinct = tf.reduce_max(tf.concat([index, [-1]], axis=0)) + 1
    # A position of each combination, whichever it is.
    place = tf.math.unsorted_segment_max(tf.range(tf.size(index)), index, num_distinct)
    return {name: tf.gather(own, place) for name, own in values.items()}, index
