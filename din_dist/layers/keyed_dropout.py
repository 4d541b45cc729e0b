"""Dropout that does not depend on how many workers there are."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from din_dist.execution import INFERENCE, Mode


@keras.saving.register_keras_serializable("din_dist")
class KeyedDropout(keras.layers.Layer):
    """Leaves out a share `rate` of the units of `[B, W]`, drawn from each example's own seed.

    `keras.layers.Dropout` draws for the rows of a batch: an example's mask would change with the worker that got it.
    Here the mask depends on (seed, stream, unit) alone, so any number of workers trains the same function.

    Args:
        rate: share of the units that are left out.
        stream: layers with different streams draw different units.
    """

    def __init__(self, rate: float, stream: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate, self.stream = rate, stream

    def call(self, inputs: tf.Tensor, seeds: tf.Tensor | None, mode: Mode = INFERENCE) -> tf.Tensor:
        """Returns what is left of `inputs` `[B, W]`, scaled up; `seeds` is int64 `[B]`."""
        if not mode.training or not self.rate:
            return inputs
        return mode.fused(_drop)(inputs, _required(seeds), self.rate, self.stream)

    def factors(self, seeds: tf.Tensor | None, width: int, mode: Mode) -> tf.Tensor:
        """Returns the factor of each of an example's `width` units, float32 `[B, width]`: 0 or 1 / (1 - rate)."""
        return mode.fused(_factors)(_required(seeds), self.rate, self.stream, width)

    def get_config(self) -> dict:
        return {**super().get_config(), "rate": self.rate, "stream": self.stream}


def _required(seeds: tf.Tensor | None) -> tf.Tensor:
    if seeds is None:
        raise ValueError("Dropout draws from each example's seed. Received: none. Pass dropout_seeds in training.")
    return seeds


def _drop(inputs: tf.Tensor, seeds: tf.Tensor, rate: float, stream: int) -> tf.Tensor:
    return tf.where(_kept(seeds, rate, stream, inputs.shape[-1]), inputs / (1.0 - rate), 0.0)


def _factors(seeds: tf.Tensor, rate: float, stream: int, width: int) -> tf.Tensor:
    return tf.where(_kept(seeds, rate, stream, width), 1.0 / (1.0 - rate), 0.0)


def _kept(seeds: tf.Tensor, rate: float, stream: int, width: int) -> tf.Tensor:
    units = tf.range(stream << 20, (stream << 20) + width, dtype=tf.int32)
    low, high = tf.unstack(tf.bitcast(seeds, tf.int32), axis=-1)
    bits = _mix32((low[:, None] ^ _mix32(units)) + high[:, None])
    return tf.cast(bits, tf.float32) >= rate * 2.0**32 - 2.0**31  # bits are uniform in [-2**31, 2**31)


def _mix32(state: tf.Tensor) -> tf.Tensor:
    """Returns MurmurHash3's 32-bit finalizer, on int32 because GPUs lack unsigned arithmetic."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = _xor_shifted(state, shift) * tf.constant(factor - 2**32, tf.int32)
    return _xor_shifted(state, 16)


def _xor_shifted(state: tf.Tensor, shift: int) -> tf.Tensor:
    unsigned = tf.bitwise.right_shift(state, shift) & tf.constant((1 << (32 - shift)) - 1, tf.int32)
    return tf.bitwise.bitwise_xor(state, unsigned)
