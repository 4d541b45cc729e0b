"""A stateless random number for any tuple of integers, in the graph: the same on every rank and after every restart."""

from __future__ import annotations

import tensorflow as tf


def hash64(*parts: tf.Tensor | int) -> tf.Tensor:
    """A uint64 that looks random for `parts`, integers that broadcast against each other.

    Each part is folded in with the finalizer of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
    number generators"); negative integers count modulo 2**64.
    """
    state = tf.constant(0, tf.uint64)
    for part in parts:
        state = _mix(state + _as_uint64(part) + tf.constant(0x9E3779B97F4A7C15, tf.uint64))
    return state


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
