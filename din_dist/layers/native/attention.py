"""The local activation unit by our own kernels: the same function, with a fraction of the memory traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from din_dist.config import AttentionNormalization
from din_dist.execution import Mode
from din_dist.kernels import operations
from din_dist.kernels.operations import FirstKernels, PooledGradient, ScoreScale, SideRows, no_sides
from din_dist.layers.native.dense import Gate, Gated, dense, dense_gradient, has_kernel
from din_dist.layers.pairs import Pairs

if TYPE_CHECKING:
    from din_dist.layers.local_activation_unit import LocalActivationUnit


def has_kernels(unit: LocalActivationUnit) -> bool:
    """Tells whether our kernels know all activations of the unit."""
    return all(map(has_kernel, unit.scorer.activations))


def pool_by_kernels(
    unit: LocalActivationUnit,
    candidate: tf.Tensor,
    behaviours: tf.Tensor,
    pairs: Pairs,
    mode: Mode,
    sides: tf.Tensor | None = None,
) -> tf.Tensor:
    """Returns what `LocalActivationUnit.call` returns, in training.

    Some tens of pairs at a time go through all of a pass while they are in the cache. A pass ends where a layer's
    statistics must be known of all pairs of all ranks. Forward these are the first product, each activation with the
    product that follows, and the last activation with softmax and pooling. Backward they are the same in reverse.
    Between passes only each layer's inputs are kept. Gradients are written out by hand (`kernels/attention.cc`).
    """
    scorer = unit.scorer
    sources = [candidate, behaviours, *unit.first_terms()]
    sources += [scorer.output_layer.kernel.value, scorer.output_layer.bias.value]
    widths = [dense.units for dense in scorer.dense_layers]
    gates = [Gate.of(*pair) for pair in zip(scorer.activations, widths, strict=True)]
    sources += [gate.alpha for gate in gates]
    sources += [dense.kernel.value for dense in scorer.dense_layers[1:]]
    sources += [dense.bias.value for dense in scorer.dense_layers[1:]]
    sources += [] if sides is None else [sides, unit.side_kernel()]
    sources = [*map(tf.convert_to_tensor, sources)]
    update = _Update(unit, gates, pairs, [*map(tf.stop_gradient, sources)], mode)
    interest = update.interest()

    @tf.custom_gradient
    def differentiable(*_: tf.Tensor) -> Any:
        return interest, update.gradients

    return differentiable(*sources)


class _Update:
    """The passes of one update. Gradients flow by `gradients` alone."""

    def __init__(
        self,
        unit: LocalActivationUnit,
        gates: Sequence[Gate],
        pairs: Pairs,
        sources: Sequence[tf.Tensor],
        mode: Mode,
    ) -> None:
        self._sources, self._mode = sources, mode
        depth = len(gates)
        self._candidate, self._behaviours, *first, self._first_bias, output, self._bias = sources[:8]
        self._first, self._output = FirstKernels(*first), tf.squeeze(output, axis=1)
        alphas, weights, sides = sources[8 : 8 + depth], sources[8 + depth : 6 + 3 * depth], sources[6 + 3 * depth :]
        self._sides = SideRows(sides[0], sides[1], pairs.side_of) if sides else no_sides(self._first_bias.shape[0])
        self._gates = [gate._replace(alpha=alpha) for gate, alpha in zip(gates, alphas, strict=True)]
        self._kernels, self._biases = weights[: depth - 1], weights[depth - 1 :]
        softmax = unit.normalization is AttentionNormalization.SOFTMAX
        self._scale = ScoreScale(tf.constant(math.sqrt(self._behaviours.shape[-1]) if softmax else 1.0), softmax)
        self._pairs = (pairs.candidate_of, pairs.behaviour_of)
        self._layers: list[Gated] = []

    def interest(self) -> tf.Tensor:
        """Returns the interests, float32 `[C, H + S]`."""
        candidate, behaviours = self._candidate, self._behaviours
        centre, bfloat16 = self._gates[0].centre, self._mode.execution.bfloat16
        inputs, sums = operations.attention_first(
            candidate, behaviours, self._first, self._first_bias, centre, self._pairs, bfloat16, self._sides
        )
        self._layers = [self._gates[0].before(inputs, sums, self._mode)]
        for kernel, bias, above in zip(self._kernels, self._biases, self._gates[1:], strict=True):
            self._layers.append(dense(self._layers[-1], kernel, bias, above))
        top, num_candidates = self._layers[-1], tf.shape(candidate)[0]
        output = (self._output, self._bias)
        interest, self._weights = operations.attention_pool(
            top.inputs, top.as_inputs, output, behaviours, num_candidates, self._scale, self._pairs, self._sides
        )
        return interest

    def gradients(self, upstream: tf.Tensor) -> list[tf.Tensor]:
        """Returns the gradients of the sources, in their order, given that of the interests `[C, H + S]`."""
        top = self._layers[-1]
        held, of_output, of_bias, of_standardised, of_alpha = operations.attention_pool_gradient(
            *(top.inputs, top.as_inputs, self._output, self._behaviours, (self._weights, upstream)),
            scale=self._scale,
            pairs=self._pairs,
            sides=self._sides,
        )
        of_alphas = [of_alpha]
        of_kernels: list[tf.Tensor] = []
        of_biases: list[tf.Tensor] = []
        for place in reversed(range(1, len(self._layers))):
            layer, below, kernel = self._layers[place], self._layers[place - 1], self._kernels[place - 1]
            statistics = layer.statistics(of_standardised)
            of_dense = dense_gradient(below, kernel, statistics, layer.inputs, held)
            held, of_standardised = of_dense.held, of_dense.of_standardised
            of_alphas, of_kernels = [of_dense.of_alpha, *of_alphas], [of_dense.of_kernel, *of_kernels]
            of_biases = [of_dense.of_bias, *of_biases]
        first = self._layers[0]
        *of_first, of_sides, of_side_kernel = operations.attention_first_gradient(
            (self._candidate, self._behaviours),
            self._first,
            first.inputs,
            first.statistics(of_standardised),
            PooledGradient(held, self._weights, upstream),
            self._pairs,
            self._mode.execution.bfloat16,
            self._sides,
        )
        found = [*of_first, of_output[:, None], of_bias, *of_alphas, *of_kernels, *of_biases]
        found += [of_sides, of_side_kernel][: len(self._sources) - len(found)]
        for gradient, source in zip(found, self._sources, strict=True):
            gradient.set_shape(source.shape)
        return found
