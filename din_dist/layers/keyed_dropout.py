"""Dropout that does not depend on how many workers there are."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from din_dist.layers.xla import fused


@keras.saving.register_keras_serializable("din_dist")
class KeyedDropout(keras.layers.Layer):
    """Leaves out a share `rate` of the units of `[B, W]`, which ones drawn from each example's own key.

    `keras.layers.Dropout` draws for the rows of a batch, so that an example's mask would change with the worker that
    got it. Here it depends on (key, stream, unit) alone: any number of workers trains the same function.
    """

    def __init__(self, rate: float, stream: int = 0, compiled: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate, self.stream, self.compiled = rate, stream, compiled

    def call(self, inputs: tf.Tensor, keys: tf.Tensor | None, training: bool = False) -> tf.Tensor:
        if not training or not self.rate:
            return inputs
        return _drop(inputs, _required(keys), self.rate, self.stream, compiled=self.compiled)

    def factors(self, keys: tf.Tensor | None, width: int) -> tf.Tensor:
        """What the `width` units of each example of `keys` are multiplied by in training, `[B, width]`."""
        return _factors(_required(keys), self.rate, self.stream, width, compiled=self.compiled)

    def get_config(self) -> dict:
        return {**super().get_config(), "rate": self.rate, "stream": self.stream}


def _required(keys: tf.Tensor | None) -> tf.Tensor:
    if keys is None:
        raise ValueError("Dropout draws from each example's key. Received: none. Pass example_keys in training.")
    return keys


@fused
def _drop(inputs: tf.Tensor, keys: tf.Tensor, rate: float, stream: int) -> tf.Tensor:
    return tf.where(_kept(keys, rate, stream, inputs.shape[-1]), inputs / (1.0 - rate), 0.0)


@fused
def _factors(keys: tf.Tensor, rate: float, stream: int, width: int) -> tf.Tensor:
    return tf.where(_kept(keys, rate, stream, width), 1.0 / (1.0 - rate), 0.0)


def _kept(keys: tf.Tensor, rate: float, stream: int, width: int) -> tf.Tensor:
    units = tf.range(stream << 20, (stream << 20) + width, dtype=tf.int32)
    low, high = tf.unstack(tf.bitcast(keys, tf.int32), axis=-1)
    bits = _mix32((low[:, None] ^ _mix32(units)) + high[:, None])
    return tf.cast(bits, tf.float32) >= rate * 2.0**32 - 2.0**31  # bits are uniform in [-2**31, 2**31)


def _mix32(state: tf.Tensor) -> tf.Tensor:
    """MurmurHash3's 32-bit finalizer, on int32 for want of unsigned arithmetic on GPUs."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = _xor_shifted(state, shift) * tf.constant(factor - 2**32, tf.int32)
    return _xor_shifted(state, 16)


def _xor_shifted(state: tf.Tensor, shift: int) -> tf.Tensor:
    unsigned = tf.bitwise.right_shift(state, shift) & tf.constant((1 << (32 - shift)) - 1, tf.int32)
    return tf.bitwise.bitwise_xor(state, unsigned)
