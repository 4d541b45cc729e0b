"""Random numbers and orders that follow from a tuple of integers alone.

So they are the same on every rank and after every restart.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import tensorflow as tf

from din_dist import progress
from din_dist.execution import Execution
from din_dist.kernels import operations

_IDS_AT_ONCE = 1_000_000  # that are hashed


def hash64(*parts: tf.Tensor | int, execution: Execution | None = None) -> tf.Tensor:
    """Returns a uint64 that looks random for each tuple of `parts`.

    The finalizer of SplitMix64 mixes each part in (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators"). Negative integers count modulo 2**64.

    Args:
        parts: integers that broadcast against each other.
        execution: how it is computed. By our kernel the parts are numbers, or vectors of one length, and at least one
            of them is a vector. None: by TensorFlow's operations.
    """
    if execution is not None and execution.kernels:
        return operations.hash64([_as_uint64(part) for part in parts])
    state = tf.constant(0, tf.uint64)
    for part in parts:
        state = _mix(state + _as_uint64(part) + tf.constant(0x9E3779B97F4A7C15, tf.uint64))
    return state


def hashed_rows(ids: tf.Tensor, rows: int) -> tf.Tensor:
    """Returns the row of each id in a table with hashing, int32: 1 + FarmHash's `Fingerprint64` of the text mod `rows`.

    TensorFlow promises that `to_hash_bucket_fast` never changes. Preparation calls this function too, so that an export
    cannot differ from it.

    Args:
        ids: own ids of any shape, strings; integers as decimal text.
        rows: the number of rows without the one for unknown ids.
    """
    return tf.cast(1 + tf.strings.to_hash_bucket_fast(ids, rows), tf.int32)


def rows_of_ids(ids: pa.Array | pa.ChunkedArray, rows: int, salt: str = "") -> np.ndarray:
    """Returns the row of each id in a table with hashing, int32 `[K]`; see `hashed_rows`.

    Args:
        ids: own ids `[K]`, integers or strings.
        rows: the number of rows without the one for unknown ids.
        salt: stands before each id, so that rows of one purpose do not resemble those of another.
    """
    text = ids.cast(pa.large_string())
    found = [np.zeros(0, np.int32)]
    for first in range(0, len(text), _IDS_AT_ONCE):
        progress.note()
        with tf.device("CPU"):
            part = tf.constant(text.slice(first, _IDS_AT_ONCE).to_pylist())
            found.append(hashed_rows(tf.strings.join([salt, part]) if salt else part, rows).numpy())
    return np.concatenate(found)


def place_in_random_order(places: tf.Tensor, ends: tf.Tensor, largest_end: int, *parts: tf.Tensor | int) -> tf.Tensor:
    """Returns where each place goes when 0 to end - 1 are shuffled, int64 `[M]`: a bijection for each tuple of `parts`.

    A Feistel network shuffles a power of 4 that is at least `largest_end`. A place that lands at or beyond its end is
    shuffled again until it does not (cycle walking; Black, Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        places: int64 `[M]`, each below its end.
        ends: int64 `[M]`.
        largest_end: the same in all calls that must agree. The closer the ends are to it, the faster it is.
        parts: integers that broadcast against the places.
    """
    num_bits = max(1, ((largest_end - 1).bit_length() + 1) // 2)
    num_rounds = 4 + 32 // num_bits  # the shorter the halves, the more rounds it takes to look random
    half = tf.constant(num_bits, tf.uint64)
    key, golden = hash64(*parts), tf.constant(0x9E3779B97F4A7C15, tf.uint64)
    mask = tf.bitwise.left_shift(tf.constant(1, tf.uint64), half) - tf.constant(1, tf.uint64)
    ends = tf.cast(ends, tf.uint64)

    def shuffled(numbers: tf.Tensor) -> tf.Tensor:
        left, right = tf.bitwise.right_shift(numbers, half), tf.bitwise.bitwise_and(numbers, mask)
        for number in range(num_rounds):
            noise = tf.bitwise.bitwise_and(_mix(key + golden * (right + tf.constant(number << 32, tf.uint64))), mask)
            left, right = right, tf.bitwise.bitwise_xor(left, noise)
        return tf.bitwise.bitwise_or(tf.bitwise.left_shift(left, half), right)

    (found,) = tf.while_loop(
        lambda numbers: tf.reduce_any(numbers >= ends),
        lambda numbers: (tf.where(numbers >= ends, shuffled(numbers), numbers),),
        (shuffled(tf.cast(places, tf.uint64)),),
    )
    return tf.cast(found, tf.int64)


def _as_uint64(part: tf.Tensor | int) -> tf.Tensor:
    if isinstance(part, int):
        return tf.constant(part % 2**64, tf.uint64)
    return tf.cast(part, tf.uint64)


def _mix(state: tf.Tensor) -> tf.Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = _xor_shifted(state, shift) * tf.constant(factor, tf.uint64)
    return _xor_shifted(state, 31)


def _xor_shifted(state: tf.Tensor, shift: int) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(state, tf.bitwise.right_shift(state, tf.constant(shift, tf.uint64)))
