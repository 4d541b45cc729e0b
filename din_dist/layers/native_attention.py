"""The local activation unit in kernels of its own: the same function, and a fraction of the memory traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from din_dist.config import AttentionNormalization
from din_dist.layers import kernels
from din_dist.layers.dice import Dice
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.layers.standardize import Standardize


class NativeActivationUnit(LocalActivationUnit):
    """In training some tens of pairs at a time go through all of a pass while they are in the cache.

    A pass ends where a layer's statistics must be known of all pairs of all ranks: forward the first product; each
    activation with the product that follows; the last activation with softmax and pooling; and the same backward.
    Between passes only each layer's inputs are kept. Gradients are written out by hand (`kernels/attention.cc`).
    """

    needs_few_lengths = False

    def call(
        self,
        candidate: tf.Tensor,
        keys: tf.Tensor,
        candidate_of: tf.Tensor,
        key_of: tf.Tensor,
        training: bool = False,
        num_pairs: tf.Tensor | None = None,
    ) -> tf.Tensor:
        if not training:
            return super().call(candidate, keys, candidate_of, key_of, training, num_pairs)
        scorer = self.scorer
        sources = [candidate, keys, *self.first_terms(candidate, keys)]
        sources += [scorer.output_layer.kernel.value, scorer.output_layer.bias.value]
        sources += [_alpha_of(*pair) for pair in zip(scorer.activations, scorer.dense_layers, strict=True)]
        sources += [dense.kernel.value for dense in scorer.dense_layers[1:]]
        sources += [dense.bias.value for dense in scorer.dense_layers[1:]]
        sources = [*map(tf.convert_to_tensor, sources)]
        update = _Update(self, candidate_of, key_of, [*map(tf.stop_gradient, sources)])
        interest = update.interest()

        @tf.custom_gradient
        def differentiable(*_: tf.Tensor) -> Any:
            return interest, update.gradients

        return differentiable(*sources)


class _Layer(NamedTuple):
    """An activation as it is in one update, and what it is applied to."""

    inputs: tf.Tensor  # [P, padded W]
    mean: tf.Tensor
    scale: tf.Tensor
    alpha: tf.Tensor
    num_pairs: tf.Tensor | None  # of all ranks, if the statistics are theirs

    @property
    def gate(self) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return self.mean, self.scale, self.alpha


class _Update:
    """One update's passes. All tensors may be what the batch made them; no gradient flows but by `gradients`."""

    def __init__(
        self, unit: NativeActivationUnit, candidate_of: tf.Tensor, key_of: tf.Tensor, sources: Sequence[tf.Tensor]
    ) -> None:
        self._sources = sources
        self._activations = unit.scorer.activations
        depth = len(self._activations)
        self._candidate, self._keys, self._by_candidate, self._by_key, self._product, output, self._bias = sources[:7]
        self._output = tf.squeeze(output, axis=1)
        self._alphas, dense = sources[7 : 7 + depth], sources[7 + depth :]
        self._kernels, self._biases = dense[: depth - 1], dense[depth - 1 :]
        self._kinds = [kernels.ACTIVATIONS.index(_name_of(activation)) for activation in self._activations]
        softmax = unit.normalization is AttentionNormalization.SOFTMAX
        self._divisor = tf.constant(math.sqrt(self._keys.shape[-1]) if softmax else 1.0)
        self._ops, self._threads = kernels.library(), {"num_threads": kernels.num_threads()}
        self._pairs = {"candidate_of": candidate_of, "key_of": key_of, **self._threads}
        self._last = {"activation": self._kinds[-1], "softmax": softmax, **self._pairs}
        self._layers: list[_Layer] = []

    def interest(self) -> tf.Tensor:
        """`[C, H]`."""
        candidate, keys = self._candidate, self._keys
        inputs, sums = self._ops.din_dist_first(
            candidate, keys, self._by_candidate, self._by_key, self._product, self._centre(0), **self._pairs
        )
        self._layers = [self._layer(0, inputs, sums)]
        for place, (kernel, bias) in enumerate(zip(self._kernels, self._biases, strict=True)):
            below = self._layers[-1]
            inputs, sums = self._ops.din_dist_dense(
                below.inputs,
                kernel,
                bias,
                self._centre(place + 1),
                *below.gate,
                activation=self._kinds[place],
                **self._threads,
            )
            self._layers.append(self._layer(place + 1, inputs, sums))
        top = self._layers[-1]
        interest, self._weights = self._ops.din_dist_pool(
            top.inputs, self._output, self._bias, *top.gate, keys, tf.shape(candidate)[0], self._divisor, **self._last
        )
        interest.set_shape([None, keys.shape[-1]])
        return interest

    def gradients(self, upstream: tf.Tensor) -> list[tf.Tensor]:
        """Of the sources, in their order, given that of the interest."""
        top = self._layers[-1]
        of_scores, of_output, of_bias, sums = self._ops.din_dist_pool_gradient(
            top.inputs, self._output, *top.gate, self._keys, self._weights, upstream, self._divisor, **self._last
        )
        of_alphas: list[tf.Tensor] = []
        of_kernels: list[tf.Tensor] = []
        of_biases: list[tf.Tensor] = []
        # Of a layer's outputs: a row for each pair; of the last, whose only consumer is the score, a factor for each.
        above = [of_scores, self._output]
        for place in reversed(range(1, len(self._layers))):
            layer, below = self._layers[place], self._layers[place - 1]
            *means, of_alpha = self._means(place, sums)
            of_outputs, of_kernel, of_its_bias, sums = self._ops.din_dist_dense_gradient(
                below.inputs,
                layer.inputs,
                self._kernels[place - 1],
                *below.gate,
                *layer.gate,
                *means,
                *above,
                activation=self._kinds[place - 1],
                next_activation=self._kinds[place],
                **self._threads,
            )
            above = [of_outputs, tf.zeros([0])]
            of_alphas, of_kernels = [of_alpha, *of_alphas], [of_kernel, *of_kernels]
            of_biases = [of_its_bias, *of_biases]
        *means, of_alpha = self._means(0, sums)
        first = self._layers[0]
        of_candidate, of_keys, of_product, of_by_candidate, of_by_key = self._ops.din_dist_first_gradient(
            self._candidate,
            self._keys,
            self._product,
            first.inputs,
            *first.gate,
            *means,
            *above,
            self._weights,
            upstream,
            activation=self._kinds[0],
            **self._pairs,
        )
        found = [of_candidate, of_keys, of_by_candidate, of_by_key, of_product]
        found += [of_output[:, None], of_bias, of_alpha, *of_alphas, *of_kernels, *of_biases]
        for gradient, source in zip(found, self._sources, strict=True):
            gradient.set_shape(source.shape)
        return found

    def _layer(self, place: int, inputs: tf.Tensor, sums: tf.Tensor) -> _Layer:
        """Given the `sums` of its inputs about `_centre`."""
        alpha, standardize = self._alphas[place], self._standardize(place)
        if standardize is None:
            return _Layer(inputs, tf.zeros_like(alpha), tf.zeros_like(alpha), alpha, None)
        if standardize.frozen:
            return _Layer(inputs, *standardize.moving_statistics, alpha, None)
        mean, scale, num_pairs = standardize.statistics_of(sums, tf.size(self._pairs["key_of"]))
        return _Layer(inputs, mean, scale, alpha, num_pairs)

    def _standardize(self, place: int) -> Standardize | None:
        activation = self._activations[place]
        return activation.standardize if isinstance(activation, Dice) else None

    def _centre(self, place: int) -> tf.Tensor:
        standardize = self._standardize(place)
        return standardize.moving_mean.value if standardize else tf.zeros_like(self._alphas[place])

    def _means(self, place: int, sums: tf.Tensor) -> list[tf.Tensor]:
        """Of the standardised inputs' gradient and of that times them, over all ranks; and alpha's gradient, here."""
        of_gradient, of_product, of_alpha = tf.split(sums, 3)
        standardize, num_pairs = self._standardize(place), self._layers[place].num_pairs
        if standardize is None or num_pairs is None:
            return [tf.zeros_like(of_gradient), tf.zeros_like(of_product), of_alpha]
        message = tf.concat([of_gradient, of_product], axis=0)
        message.set_shape([2 * standardize.moving_mean.shape[0]])
        means = standardize.sum_over_ranks(message) / num_pairs
        return [*tf.split(means, 2), of_alpha]


def _name_of(activation: keras.layers.Layer) -> str:
    if isinstance(activation, keras.layers.Activation):
        return activation.activation.__name__
    return type(activation).__name__.lower()


def _alpha_of(activation: keras.layers.Layer, dense: keras.layers.Dense) -> tf.Tensor:
    """`[W]`; zeros for those that have none."""
    return activation.alpha.value if hasattr(activation, "alpha") else tf.zeros([dense.units])
