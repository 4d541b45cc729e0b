"""A stack of hidden layers with the activation that the flags name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from din_dist.config import Activation
from din_dist.layers.dice import Dice
from din_dist.layers.keyed_dropout import KeyedDropout
from din_dist.layers.native.dense import Stage
from din_dist.layers.standardize import SumOverRanks


def make_activation(
    activation: Activation, *, frozen: bool, sum_over_ranks: SumOverRanks, compiled: bool, name: str
) -> keras.layers.Layer:
    """A layer `[M, W] -> [M, W]`."""
    match activation:
        case Activation.DICE:
            return Dice(frozen, sum_over_ranks, compiled, name=name)
        case Activation.PRELU:
            return keras.layers.PReLU(name=name)
        case Activation.SIGMOID | Activation.RELU:
            return keras.layers.Activation(activation.value, name=name)
    raise ValueError(f"Unknown activation {activation!r}")


class HiddenLayers(keras.layers.Layer):
    """Dense, activation and dropout for each of `units`, then one output unit: `[M, W] -> [M]`."""

    def __init__(
        self,
        units: Sequence[int],
        activation: Activation,
        *,
        frozen: bool = False,
        sum_over_ranks: SumOverRanks = tf.identity,
        dropout: float = 0.0,
        compiled: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.dense_layers = [keras.layers.Dense(width, name=f"dense_{i}") for i, width in enumerate(units)]
        self.activations = [
            make_activation(
                activation,
                frozen=frozen,
                sum_over_ranks=sum_over_ranks,
                compiled=compiled,
                name=f"activation_{i}",
            )
            for i in range(len(units))
        ]
        self.dropouts = [
            KeyedDropout(dropout, stream=i, compiled=compiled, name=f"dropout_{i}") for i in range(len(units))
        ]
        self.output_layer = keras.layers.Dense(1, name="output")

    def build(self, input_shape: tuple) -> None:
        width = input_shape[-1]
        for dense, activation in zip(self.dense_layers, self.activations, strict=True):
            dense.build((None, width))
            width = dense.units
            activation.build((None, width))
        self.output_layer.build((None, width))

    def call(self, inputs: tf.Tensor, keys: tf.Tensor | None = None, training: bool = False) -> tf.Tensor:
        return self.after_first(self.dense_layers[0](inputs), keys, training)

    @property
    def stages(self) -> list[Stage]:
        """What follows the first Dense, for `run_stages`."""
        following = [*self.dense_layers[1:], self.output_layer]
        return [Stage(*each) for each in zip(self.activations, following, self.dropouts, strict=True)]

    def after_first(
        self,
        projected: tf.Tensor,
        keys: tf.Tensor | None = None,
        training: bool = False,
        num_rows: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """What follows the first Dense, for callers that have computed that one in a cheaper way.

        `num_rows`: how many of the M rows count, the first ones; None: all.
        """
        hidden = projected
        for place, activation in enumerate(self.activations):
            if place:
                hidden = self.dense_layers[place](hidden)
            mode = {"num_rows": num_rows, "training": training} if isinstance(activation, Dice) else {}
            hidden = activation(hidden, **mode)
            hidden = self.dropouts[place](hidden, keys, training=training)
        return tf.squeeze(self.output_layer(hidden), axis=-1)
