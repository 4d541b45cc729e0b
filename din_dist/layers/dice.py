"""Dice: the data-adaptive activation of the DIN paper, section 5.3."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from din_dist.execution import INFERENCE, Mode
from din_dist.layers.standardize import Standardize


@keras.saving.register_keras_serializable("din_dist")
class Dice(keras.layers.Layer):
    """`p * x + (1 - p) * alpha * x` with `p = sigmoid(standardize(x))`, for each column of `[M, W]`.

    Source: the paper's equation 3. The authors' din/Dice.py multiplies the standardised x by one more weight that
    starts at 0 (the gate is then 0.5 everywhere); the paper does not, and neither do we.
    """

    def __init__(self, frozen: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # epsilon: batches of sparse positions can have columns that hardly vary.
        self.standardize = Standardize(frozen, name="standardize")

    def build(self, input_shape: tuple) -> None:
        self.standardize.build(input_shape)
        self.alpha = self.add_weight(shape=(input_shape[-1],), initializer="zeros", name="alpha")

    def call(self, inputs: tf.Tensor, num_rows: tf.Tensor | None = None, mode: Mode = INFERENCE) -> tf.Tensor:
        """Returns the activations, float32 `[M, W]`.

        Args:
            inputs: float32 `[M, W]`.
            num_rows: int32, how many of the M rows count, the first ones; None: all.
            mode: of the pass.
        """
        return self.standardize.then(_gate, inputs, (self.alpha.value,), num_rows, mode)

    def get_config(self) -> dict:
        return {**super().get_config(), "frozen": self.standardize.frozen}


def _gate(inputs: tf.Tensor, standardised: tf.Tensor, alpha: tf.Tensor) -> tf.Tensor:
    return inputs * (alpha + tf.sigmoid(standardised) * (1.0 - alpha))
