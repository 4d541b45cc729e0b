"""Dense layers and the activations before them in kernels of our own: an activation's outputs never reach memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from din_dist import kernels
from din_dist.execution import Mode
from din_dist.kernels import operations
from din_dist.kernels.operations import GateInputs, GateStatistics
from din_dist.layers.dice import Dice
from din_dist.layers.keyed_dropout import KeyedDropout
from din_dist.layers.stages import Stage, run_by_operations
from din_dist.layers.standardize import BatchNormalization, Standardize


def has_kernel(gate: keras.layers.Layer | None) -> bool:
    """Tells whether our kernels know what this layer does to each element. None is the identity."""
    return kernels.has_activation(_name_of(gate))


class Gate(NamedTuple):
    """An element-wise function of `[M, W]`: an activation, a batch normalization, or the identity."""

    activation: str  # its name in `kActivations` of kernels/attention.h
    standardize: Standardize | None
    alpha: tf.Tensor  # [W]; zeros if the activation has none
    beta: tf.Tensor  # [W]; zeros if the activation has none

    @classmethod
    def of(cls, layer: keras.layers.Layer | None, width: int) -> Gate:
        """Returns the gate of a layer that has a kernel; None is the identity."""
        name, nothing = _name_of(layer), tf.zeros([width])
        match layer:
            case None:
                return cls(name, None, tf.ones([width]), nothing)
            case BatchNormalization():
                return cls(name, layer.standardize, layer.gamma.value, layer.beta.value)
            case Dice():
                return cls(name, layer.standardize, layer.alpha.value, nothing)
            case keras.layers.PReLU():
                return cls(name, None, layer.alpha.value, nothing)
        return cls(name, None, nothing, nothing)

    @property
    def centre(self) -> tf.Tensor:
        """The numbers `[W]` about which a kernel sums the inputs."""
        return self.standardize.moving_mean.value if self.standardize else tf.zeros_like(self.alpha)

    @property
    def needs_sums(self) -> bool:
        """True if batch statistics are computed."""
        return self.standardize is not None and not self.standardize.frozen

    def before(self, inputs: tf.Tensor, sums: tf.Tensor, mode: Mode) -> Gated:
        """Places the gate before `inputs` and updates its moving averages.

        Args:
            inputs: float32 `[M, padded W]`.
            sums: float32 `[2W + 1]`, of `inputs` less `centre`, of its square, and of 1 for each row.
            mode: of the pass.
        """
        if self.standardize is None:
            return Gated(self, inputs, tf.zeros_like(self.alpha), tf.ones_like(self.alpha), None, mode)
        if self.standardize.frozen:
            return Gated(self, inputs, *self.standardize.moving_statistics, None, mode)
        return Gated(self, inputs, *self.standardize.statistics_of(sums, mode), mode)


class Gated(NamedTuple):
    """A gate in one update, and its inputs."""

    gate: Gate
    inputs: tf.Tensor  # [M, padded W]
    mean: tf.Tensor
    scale: tf.Tensor
    num_rows: tf.Tensor | None  # [1], over all ranks, if the statistics are theirs
    mode: Mode

    @property
    def as_inputs(self) -> GateInputs:
        """The gate as kernels take it."""
        return GateInputs(self.gate.activation, self.mean, self.scale, self.gate.alpha, self.gate.beta)

    def statistics(self, of_standardised: tf.Tensor | None) -> GateStatistics:
        """Returns the statistics for the inputs' gradient, summed over all ranks.

        Args:
            of_standardised: float32 `[2W]`, this rank's sums of the standardised inputs' gradient, and of the gradient
                times these inputs; None if there are none.
        """
        sums, num_rows = tf.zeros([2 * self.gate.alpha.shape[0]]), tf.ones([1])
        if of_standardised is not None and self.num_rows is not None:
            of_standardised.set_shape(sums.shape)
            sums, num_rows = self.mode.sum_over_ranks(of_standardised), self.num_rows
        return GateStatistics(self.mean, self.scale, sums, num_rows)


def dense(below: Gated, kernel: tf.Tensor, bias: tf.Tensor, above: Gate, factors: tf.Tensor | None = None) -> Gated:
    """Returns `(below * factors) kernel + bias` as the inputs of `above`.

    Args:
        below: the layer's inputs and their gate.
        kernel: float32 `[W, units]`.
        bias: float32 `[units]`.
        above: the gate that follows.
        factors: float32 `[M, padded W]`; None: all are 1.
    """
    bfloat16 = below.mode.execution.bfloat16
    values, sums = operations.dense(
        below.inputs, below.as_inputs, kernel, bias, above.centre, _or_nothing(factors), bfloat16
    )
    return above.before(values, sums, below.mode)


class DenseGradient(NamedTuple):
    """The gradients of a Dense layer's inputs, weights and gate."""

    held: tf.Tensor  # of the inputs of the gate below, [M, padded W], with their statistics held fixed
    of_kernel: tf.Tensor
    of_bias: tf.Tensor
    of_standardised: tf.Tensor  # for `Gated.statistics` of the gate below
    of_alpha: tf.Tensor  # of that gate
    of_beta: tf.Tensor


def dense_gradient(
    below: Gated,
    kernel: tf.Tensor,
    statistics: GateStatistics,
    above: tf.Tensor,
    held: tf.Tensor,
    factors: tf.Tensor | None = None,
) -> DenseGradient:
    """Returns the gradient of `dense`.

    Args:
        below: the layer's inputs and their gate.
        kernel: float32 `[W, units]`.
        statistics: of the gate above, by `Gated.statistics`.
        above: float32 `[M, padded units]`, that gate's inputs.
        held: float32, as large: their gradient with their statistics held fixed.
        factors: float32 `[M, padded W]`; None: all are 1.
    """
    bfloat16 = below.mode.execution.bfloat16
    found = operations.dense_gradient(
        below.inputs, below.as_inputs, kernel, above, statistics, held, _or_nothing(factors), bfloat16
    )
    return DenseGradient(*found)


def run_by_kernels(stages: Sequence[Stage], inputs: tf.Tensor, seeds: tf.Tensor | None, mode: Mode) -> tf.Tensor:
    """Returns the last Dense's results `[M, units]` in training; `inputs` is `[M, W]`, `seeds` int64 `[M]`."""
    widths = [inputs.shape[-1], *(stage.dense.units for stage in stages)]
    gates = [Gate.of(layer, width) for layer, width in zip([*(s.gate for s in stages), None], widths, strict=True)]
    factors = [_factors(stage.dropout, seeds, width, mode) for stage, width in zip(stages, widths[:-1], strict=True)]
    weights = [weight.value for stage in stages for weight in (stage.dense.kernel, stage.dense.bias)]
    sources = [inputs, *weights, *(parameter for gate in gates[:-1] for parameter in (gate.alpha, gate.beta))]
    held_inputs, *held = map(tf.stop_gradient, sources)
    pairs = [*zip(held[::2], held[1::2], strict=True)]
    layers, parameters = pairs[: len(stages)], pairs[len(stages) :]
    gates = [gate._replace(alpha=a, beta=b) for gate, (a, b) in zip(gates, [*parameters, gates[-1][2:]], strict=True)]

    sums = operations.sums_about(held_inputs, gates[0].centre) if gates[0].needs_sums else None
    gated = [gates[0].before(_with_padding(held_inputs), sums, mode)]
    for (kernel, bias), above, factor in zip(layers, gates[1:], factors, strict=True):
        gated.append(dense(gated[-1], kernel, bias, above, factor))

    def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
        upstream.set_shape([None, widths[-1]])
        held, statistics = _with_padding(upstream), gated[-1].statistics(None)
        of_weights: list[tf.Tensor] = []
        of_parameters: list[tf.Tensor] = []
        for place in reversed(range(len(stages))):
            below, above, kernel = gated[place], gated[place + 1].inputs, layers[place][0]
            of_dense = dense_gradient(below, kernel, statistics, above, held, factors[place])
            held, statistics = of_dense.held, below.statistics(of_dense.of_standardised)
            of_weights = [of_dense.of_kernel, of_dense.of_bias, *of_weights]
            of_parameters = [of_dense.of_alpha, of_dense.of_beta, *of_parameters]
        of_inputs = operations.normalised_gradient(held_inputs, held[:, : widths[0]], statistics)
        found = [of_inputs, *of_weights, *of_parameters]
        for own, source in zip(found, sources, strict=True):
            own.set_shape(source.shape)
        return found

    @tf.custom_gradient
    def differentiable(*_: tf.Tensor) -> Any:
        outputs = gated[-1].inputs[:, : widths[-1]]
        outputs.set_shape([None, widths[-1]])
        return outputs, gradient

    found = differentiable(*sources)
    found.set_shape([None, widths[-1]])  # a custom gradient forgets it in a graph
    return found


def run_stages(stages: Sequence[Stage], inputs: tf.Tensor, seeds: tf.Tensor | None, mode: Mode) -> tf.Tensor:
    """Returns the last Dense's results `[M, units]`, by our kernels if they know every gate.

    Args:
        stages: one after the other, each with a Dense.
        inputs: float32 `[M, W]`.
        seeds: int64 `[M]`, for dropout.
        mode: of the pass.
    """
    by_kernels = mode.kernels and all(has_kernel(stage.gate) for stage in stages)
    return (run_by_kernels if by_kernels else run_by_operations)(stages, inputs, seeds, mode)


def _name_of(layer: keras.layers.Layer | None) -> str:
    """Returns the name by which kernels would know what a layer does to each element; None is the identity."""
    match layer:
        case None | BatchNormalization():
            return "scaled"
        case Dice():
            return "dice"
        case keras.layers.PReLU():
            return "prelu"
        case keras.layers.Activation():
            return layer.activation.__name__
    return type(layer).__name__


def _or_nothing(factors: tf.Tensor | None) -> tf.Tensor:
    return tf.zeros([0]) if factors is None else factors


def _factors(dropout: KeyedDropout | None, seeds: tf.Tensor | None, width: int, mode: Mode) -> tf.Tensor | None:
    return _with_padding(dropout.factors(seeds, width, mode)) if dropout is not None and dropout.rate else None


def _with_padding(rows: tf.Tensor) -> tf.Tensor:
    """Returns `[M, W]` as `[M, padded W]`, as the kernels want it."""
    missing = -rows.shape[-1] % kernels.LANES
    return tf.pad(rows, [[0, 0], [0, missing]]) if missing else rows
