"""A stack of hidden layers with the activation that the flags name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from din_dist.config import Activation
from din_dist.execution import INFERENCE, Mode
from din_dist.layers.dice import Dice
from din_dist.layers.keyed_dropout import KeyedDropout
from din_dist.layers.native.dense import run_stages
from din_dist.layers.stages import Stage, run_by_operations

# Name -> what makes the layer `[M, W] -> [M, W]`, given whether its statistics are frozen and the layer's name.
ACTIVATIONS: dict[str, Callable[[bool, str], keras.layers.Layer]] = {
    Activation.DICE: lambda frozen, name: Dice(frozen, name=name),
    Activation.PRELU: lambda frozen, name: keras.layers.PReLU(name=name),
    Activation.SIGMOID: lambda frozen, name: keras.layers.Activation("sigmoid", name=name),
    Activation.RELU: lambda frozen, name: keras.layers.Activation("relu", name=name),
}


@keras.saving.register_keras_serializable("din_dist")
class HiddenLayers(keras.layers.Layer):
    """Dense, activation and dropout for each of `units`, then one output unit: `[M, W] -> [M]`.

    Args:
        units: width of each hidden layer.
        activation: a key of `ACTIVATIONS`.
        frozen: batch statistics of the activations are never updated.
        dropout: share of the hidden units left out in training.
    """

    def __init__(
        self, units: Sequence[int], activation: str, *, frozen: bool = False, dropout: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._settings = {"units": list(units), "activation": str(activation), "frozen": frozen, "dropout": dropout}
        make = ACTIVATIONS[activation]
        self.dense_layers = [keras.layers.Dense(width, name=f"dense_{i}") for i, width in enumerate(units)]
        self.activations = [make(frozen, f"activation_{i}") for i in range(len(units))]
        self.dropouts = [KeyedDropout(dropout, stream=i, name=f"dropout_{i}") for i in range(len(units))]
        self.output_layer = keras.layers.Dense(1, name="output")

    def build(self, input_shape: tuple) -> None:
        width = input_shape[-1]
        for dense, activation in zip(self.dense_layers, self.activations, strict=True):
            dense.build((None, width))
            width = dense.units
            activation.build((None, width))
        self.output_layer.build((None, width))

    def call(self, inputs: tf.Tensor, seeds: tf.Tensor | None = None, mode: Mode = INFERENCE) -> tf.Tensor:
        """Returns one number a row, float32 `[M]`; `inputs` is `[M, W]`, `seeds` int64 `[M]` for dropout."""
        return self.after_first(self.dense_layers[0](inputs), seeds, mode)

    def behind(self, gate: keras.layers.Layer, inputs: tf.Tensor, seeds: tf.Tensor | None, mode: Mode) -> tf.Tensor:
        """Returns what the layers make of `gate(inputs)`, `[M]`. Arguments as of `call`."""
        stages = [Stage(gate, self.dense_layers[0]), *self.stages]
        return tf.squeeze(run_stages(stages, inputs, seeds, mode), axis=1)

    @staticmethod
    def combined(outputs: tf.Tensor) -> tf.Tensor:
        """Returns the logits, given the outputs with the biases: these themselves, as there is one label."""
        return outputs

    @property
    def stages(self) -> list[Stage]:
        """The stages behind the first Dense."""
        following = [*self.dense_layers[1:], self.output_layer]
        return [Stage(*each) for each in zip(self.activations, following, self.dropouts, strict=True)]

    def after_first(
        self,
        projected: tf.Tensor,
        seeds: tf.Tensor | None = None,
        mode: Mode = INFERENCE,
        num_rows: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Returns one number a row `[M]`, for callers that have computed the first Dense in a cheaper way.

        Args:
            projected: float32 `[M, units[0]]`, the results of the first Dense.
            seeds: int64 `[M]`, for dropout.
            mode: of the pass.
            num_rows: int32, how many of the M rows count, the first ones; None: all.
        """
        return tf.squeeze(run_by_operations(self.stages, projected, seeds, mode, num_rows), axis=-1)

    def get_config(self) -> dict:
        return {**super().get_config(), **self._settings}
