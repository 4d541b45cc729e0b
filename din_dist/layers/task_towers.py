"""Heads that predict several labels of one example.

Letters of shapes: M rows, T tasks, W the width of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from din_dist.config import TaskHead
from din_dist.execution import INFERENCE, Mode
from din_dist.layers.hidden import ACTIVATIONS
from din_dist.layers.keyed_dropout import KeyedDropout
from din_dist.layers.native.dense import run_stages
from din_dist.layers.stages import Stage, activated

_NEAREST_TO_0 = -1e-30  # of the logarithm of a probability, so that its logit is finite


@keras.saving.register_keras_serializable("din_dist")
class TaskTowers(keras.layers.Layer):
    """A tower of hidden layers for each of T labels, over the same inputs: `[M, W] -> [M, T]`.

    Like `HiddenLayers` it begins with a Dense layer: the first layers of all towers side by side, or those of all
    experts and then the gates of each tower. It serves wherever `HiddenLayers` does.

    Args:
        units: width of each hidden layer of a tower. The first is that of an expert, where there are any.
        activation: a key of `ACTIVATIONS`.
        num_tasks: T.
        kind: as of `TaskHead`.
        experts: as of `TaskHead`.
        frozen: batch statistics of the activations are never updated.
        dropout: share of the hidden units left out in training.
    """

    def __init__(
        self,
        units: Sequence[int],
        activation: str,
        num_tasks: int,
        kind: str = TaskHead.SHARED,
        experts: int = 0,
        *,
        frozen: bool = False,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._settings = {
            **{"units": list(units), "activation": str(activation), "num_tasks": num_tasks, "kind": kind},
            **{"experts": experts, "frozen": frozen, "dropout": dropout},
        }
        self.num_tasks, self.kind, self.experts = num_tasks, kind, experts
        self._make = ACTIVATIONS[activation]
        self._frozen, self._dropout, self._num_dropouts = frozen, dropout, 0
        self.widths = [units[0]] * (experts or num_tasks) + [experts] * (num_tasks if experts else 0)
        first = keras.layers.Dense(sum(self.widths), kernel_initializer=side_by_side(self.widths), name="dense_0")
        self.dense_layers = [first]
        if experts:
            self.expert_activation, self.expert_dropout = self._gate("experts")
        self.towers = [self._tower(units, f"task_{task}") for task in range(num_tasks)]

    def _tower(self, units: Sequence[int], name: str) -> list[Stage]:
        """Returns the stages behind the first Dense, or behind the mixture of experts."""
        denses = [keras.layers.Dense(width, name=f"{name}_dense_{i}") for i, width in enumerate(units[1:], 1)]
        denses.append(keras.layers.Dense(1, name=f"{name}_output"))
        stages = []
        for i, dense in enumerate(denses):
            # The experts have an activation of their own.
            gate, dropout = (None, None) if self.experts and not i else self._gate(f"{name}_{i}")
            stages.append(Stage(gate, dense, dropout))
        return stages

    def _gate(self, name: str) -> tuple[keras.layers.Layer, KeyedDropout]:
        dropout = KeyedDropout(self._dropout, stream=self._num_dropouts, name=f"{name}_dropout")
        self._num_dropouts += 1
        return self._make(self._frozen, f"{name}_activation"), dropout

    def build(self, input_shape: tuple) -> None:
        (first,) = self.dense_layers
        first.build((None, input_shape[-1]))
        if self.experts:
            self.expert_activation.build((None, self.experts * self.widths[0]))
        for stages in self.towers:
            width = self.widths[0]
            for stage in stages:
                if stage.gate is not None:
                    stage.gate.build((None, width))
                stage.dense.build((None, width))
                width = stage.dense.units

    def call(self, inputs: tf.Tensor, seeds: tf.Tensor | None = None, mode: Mode = INFERENCE) -> tf.Tensor:
        """Returns the logits `[M, T]`; `inputs` is `[M, W]`, `seeds` int64 `[M]` for dropout."""
        return self.combined(self.after_first(self.dense_layers[0](inputs), seeds, mode))

    def behind(self, gate: keras.layers.Layer, inputs: tf.Tensor, seeds: tf.Tensor | None, mode: Mode) -> tf.Tensor:
        """Returns what the towers make of `gate(inputs)`, `[M, T]`. Arguments as of `call`."""
        projected = run_stages([Stage(gate, self.dense_layers[0])], inputs, None, mode)
        return self.after_first(projected, seeds, mode)

    def after_first(self, projected: tf.Tensor, seeds: tf.Tensor | None = None, mode: Mode = INFERENCE) -> tf.Tensor:
        """Returns one number a row and task `[M, T]`, for callers that have computed the first Dense in a cheaper way.

        Args:
            projected: the results of the first Dense.
            seeds: int64 `[M]`, for dropout.
            mode: of the pass.
        """
        inputs = self._mixtures(projected, seeds, mode) if self.experts else tf.split(projected, self.num_tasks, axis=1)
        outputs = [run_stages(stages, own, seeds, mode) for stages, own in zip(self.towers, inputs, strict=True)]
        return tf.concat(outputs, axis=1)

    def _mixtures(self, projected: tf.Tensor, seeds: tf.Tensor | None, mode: Mode) -> list[tf.Tensor]:
        """Returns the inputs of each tower, `[M, units[0]]`: the experts, weighed by the tower's gates."""
        experts, gates = tf.split(projected, [self.experts * self.widths[0], self.num_tasks * self.experts], axis=1)
        experts = self.expert_dropout(activated(self.expert_activation, experts, mode), seeds, mode=mode)
        experts = tf.reshape(experts, [-1, self.experts, self.widths[0]])
        weights = tf.nn.softmax(tf.reshape(gates, [-1, self.num_tasks, self.experts]))
        return tf.unstack(tf.matmul(weights, experts), num=self.num_tasks, axis=1)

    def combined(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the logits of the labels, given the towers' outputs with the biases, `[M, T]`."""
        return logits_of_chain(outputs) if self.kind == TaskHead.ESMM else outputs

    def get_config(self) -> dict:
        return {**super().get_config(), **self._settings}


def side_by_side(widths: Sequence[int]) -> Callable[..., tf.Tensor]:
    """Returns an initializer of a kernel that holds kernels of those widths, each drawn as if it stood alone."""

    def initialize(shape: Sequence[int], dtype: Any = None) -> tf.Tensor:
        kernels = [keras.initializers.GlorotUniform()((shape[0], width), dtype) for width in widths]
        return tf.concat(kernels, axis=1)

    return initialize


def logits_of_chain(conditional: tf.Tensor) -> tf.Tensor:
    """Returns the logits of labels of which each supposes those before it, `[M, T]`.

    The probability of label t is the product of `sigmoid(conditional[:, s])` for s = 0 to t.
    """
    logarithms = tf.cumsum(tf.math.log_sigmoid(conditional), axis=1)
    return tf.concat([conditional[:, :1], _logit_of_exp(logarithms[:, 1:])], axis=1)


@tf.custom_gradient
def _logit_of_exp(logarithms: tf.Tensor) -> Any:
    """Returns the logits of probabilities whose logarithms are given."""
    bounded = tf.minimum(logarithms, _NEAREST_TO_0)
    rest = -tf.math.expm1(bounded)  # 1 - probability, without loss of digits

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return upstream / rest

    return bounded - tf.math.log(rest), gradient
