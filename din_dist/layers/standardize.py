"""Batch statistics that many workers share, and BatchNormalization upon them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

SumOverRanks = Callable[[tf.Tensor], tf.Tensor]  # sums a tensor over all workers, gradient included


@keras.saving.register_keras_serializable("din_dist")
class Standardize(keras.layers.Layer):
    """`(x - mean) / sqrt(variance + epsilon)` for each of the W columns of `[M, W]`.

    In training the statistics are those of the global batch: `sum_over_ranks` is how this layer meets the other
    workers (the identity when alone). In inference, or always when `frozen`, they are the moving averages; frozen ones
    stay at mean 0 and variance 1, which is how the authors' TensorFlow 1 code ran (its updates were never executed).
    """

    def __init__(
        self,
        frozen: bool = False,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        sum_over_ranks: SumOverRanks = tf.identity,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.frozen, self.momentum, self.epsilon, self.sum_over_ranks = frozen, momentum, epsilon, sum_over_ranks

    def build(self, input_shape: tuple) -> None:
        width = input_shape[-1]
        self.moving_mean = self.add_weight(shape=(width,), initializer="zeros", trainable=False, name="moving_mean")
        self.moving_variance = self.add_weight(
            shape=(width,), initializer="ones", trainable=False, name="moving_variance"
        )

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if training and not self.frozen:
            mean, variance = self._moments(inputs)
        else:
            mean, variance = self.moving_mean.value, self.moving_variance.value
        return (inputs - mean) * tf.math.rsqrt(variance + self.epsilon)

    def _moments(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # One message a layer: count, sum and sum of squares. They are taken about the moving mean (equal on all
        # ranks and near the true mean), since E[x^2] - E[x]^2 would lose float32 digits far from it.
        width = inputs.shape[-1]
        centre = tf.stop_gradient(self.moving_mean.value)
        shifted = inputs - centre
        count = tf.cast(tf.shape(inputs)[:1], tf.float32)
        sums = tf.concat([tf.reduce_sum(shifted, 0), tf.reduce_sum(tf.square(shifted), 0), count], axis=0)
        total, total_of_squares, count = tf.split(self.sum_over_ranks(sums), [width, width, 1])
        anything = count > 0  # a batch of empty histories has no positions at all
        count = tf.maximum(count, 1.0)
        mean_shift = total / count
        mean = centre + mean_shift
        variance = tf.maximum(total_of_squares / count - tf.square(mean_shift), 0.0)
        keep = tf.where(anything, self.momentum, 1.0)
        for average, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            average.assign(keep * average.value + (1.0 - keep) * tf.stop_gradient(value))
        return mean, variance

    def get_config(self) -> dict:
        own = {"frozen": self.frozen, "momentum": self.momentum, "epsilon": self.epsilon}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("din_dist")
class BatchNormalization(keras.layers.Layer):
    """`Standardize`, then a learned scale and offset for each column of `[M, W]`."""

    def __init__(self, frozen: bool = False, sum_over_ranks: SumOverRanks = tf.identity, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.standardize = Standardize(frozen, sum_over_ranks=sum_over_ranks, name="standardize")

    def build(self, input_shape: tuple) -> None:
        width = input_shape[-1]
        self.standardize.build(input_shape)
        self.gamma = self.add_weight(shape=(width,), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(width,), initializer="zeros", name="beta")

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.standardize(inputs, training=training) * self.gamma.value + self.beta.value

    def get_config(self) -> dict:
        return {**super().get_config(), "frozen": self.standardize.frozen}
