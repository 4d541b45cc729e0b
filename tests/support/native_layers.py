"""Runs the same layer by TensorFlow's operations and by our kernels, with random weights, so that tests compare them.

assert_units_agree(large_inputs(seed=0, width=4), [5, 3])
interest, gradients = run(built(4, [5, 3]), *large_inputs(seed=0, width=4), mode=KERNELS)
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from numpy.testing import assert_allclose

from din_dist import kernels
from din_dist.config import Activation, AttentionNormalization
from din_dist.execution import TRAINING, Execution, Mode
from din_dist.layers.hidden import HiddenLayers
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.layers.native.dense import run_by_kernels
from din_dist.layers.pairs import Pairs
from din_dist.layers.stages import Stage
from din_dist.layers.standardize import BatchNormalization
from tests.support.reference.compare import assert_same_gradients, randomise

KERNELS = Mode(True, Execution(kernels=True))


def built(width, hidden_units, activation=Activation.DICE, normalization=AttentionNormalization.SOFTMAX, **settings):
    """Returns an attention unit for vectors of `width`, built, with random weights."""
    unit = LocalActivationUnit(hidden_units, activation, normalization, name="attention", **settings)
    unit.build((None, width))
    randomise(unit)
    return unit


def run(unit, candidate, keys, candidate_of, key_of, direction, mode=KERNELS, sides=None, side_of=None):
    """Returns the interest, and the gradients of sum(interest * `direction`) by name: weights, candidates and keys.

    With `sides` `[T, S]`, of which `side_of` names that of each pair, their gradient too.
    """
    watched = {w.path.removeprefix("attention/"): w.value for w in unit.trainable_weights}
    watched |= {"candidate": candidate, "keys": keys} | ({} if sides is None else {"sides": sides})
    with tf.GradientTape() as tape:
        tape.watch([candidate, keys, *([] if sides is None else [sides])])
        interest = unit(candidate, keys, Pairs(candidate_of, key_of, side_of=side_of), mode=mode, sides=sides)
        total = tf.reduce_sum(interest * direction)
    found = tape.gradient(total, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return interest.numpy(), {name: gradient.numpy() for name, gradient in found.items()}


def large_inputs(seed, width, num_candidates=50, num_keys=40, num_pairs=200):
    """Returns random inputs of an attention unit, and a direction for `run`.

    There are more pairs than a tile of the kernels holds, candidates without any pair, and keys in many or in none.
    """
    random = np.random.default_rng(seed)
    return (
        tf.constant(random.normal(size=(num_candidates, width)), tf.float32),
        tf.constant(random.normal(size=(num_keys, width)), tf.float32),
        tf.constant(np.sort(random.integers(0, num_candidates, num_pairs)), tf.int32),
        tf.constant(random.integers(0, num_keys // 2, num_pairs), tf.int32),
        tf.constant(random.normal(size=(num_candidates, width)), tf.float32),
    )


def large_sides(seed, width, num_sides=30, num_pairs=200, num_candidates=50, item_width=0):
    """Returns what `large_inputs` lacks for side information of `width`: `sides`, `side_of`, and a wider direction."""
    random = np.random.default_rng(seed + 1)
    sides = tf.constant(random.normal(size=(num_sides, width)), tf.float32)
    side_of = tf.constant(random.integers(0, num_sides - 3, num_pairs), tf.int32)  # some sides in no pair
    direction = tf.constant(random.normal(size=(num_candidates, item_width + width)), tf.float32)
    return sides, side_of, direction


def assert_units_agree(inputs, *settings, sides=None, side_of=None, **more):
    """Asserts that TensorFlow's operations and the kernels give the same interest, gradients and moving averages."""
    width = inputs[0].shape[1]
    more |= {} if sides is None else {"side_width": sides.shape[1]}
    theirs, ours = (built(width, *settings, **more) for _ in range(2))
    for _ in range(2):  # the second time with moving averages that both have changed
        expected_interest, expected = run(theirs, *inputs, mode=TRAINING, sides=sides, side_of=side_of)
        interest, gradients = run(ours, *inputs, sides=sides, side_of=side_of)
        largest = max(1.0, np.abs(expected_interest).max())
        assert_allclose(interest, expected_interest, rtol=1e-4, atol=1e-5 * largest)
        assert_same_gradients(gradients, expected)
        for own, other in zip(ours.non_trainable_weights, theirs.non_trainable_weights, strict=True):
            assert_allclose(own, other, rtol=1e-5, atol=1e-6, err_msg=own.path)


def with_padding(rows):
    """Pads rows with zeros to a multiple of `kernels.LANES`, as kernels take them."""
    return np.pad(rows, [(0, 0), (0, -rows.shape[1] % kernels.LANES)])


class Head:
    """A head of batch normalization, hidden layers and one output unit, by TensorFlow's operations or by kernels."""

    def __init__(
        self,
        width,
        units,
        activation=Activation.DICE,
        native=False,
        frozen=False,
        dropout=0.0,
        in_bfloat16=False,
        compiled=False,
        sum_over_ranks=tf.identity,
    ):
        self.norm = BatchNormalization(frozen, name="norm")
        self.hidden = HiddenLayers(units, activation, frozen=frozen, dropout=dropout, name="hidden")
        self.mode = Mode(True, Execution(native, compiled, in_bfloat16), sum_over_ranks)
        for layer in (self.norm, self.hidden):
            layer.build((None, width))
            randomise(layer)

    def __call__(self, inputs, keys=None):
        if not self.mode.kernels:
            return self.hidden(self.norm(inputs, mode=self.mode), keys, mode=self.mode)
        stages = [Stage(self.norm, self.hidden.dense_layers[0]), *self.hidden.stages]
        return tf.squeeze(run_by_kernels(stages, inputs, keys, self.mode), axis=1)

    @property
    def averages(self):
        return [*self.norm.non_trainable_weights, *self.hidden.non_trainable_weights]

    def run(self, inputs, direction, keys=None):
        """Returns the outputs, and the gradients of sum(outputs * `direction`) by name: inputs and weights."""
        weights = [*self.norm.trainable_weights, *self.hidden.trainable_weights]
        watched = {weight.path: weight.value for weight in weights} | {"inputs": inputs}
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = self(inputs, keys)
            total = tf.reduce_sum(outputs * direction)
        found = tape.gradient(total, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return outputs.numpy(), {name: gradient.numpy() for name, gradient in found.items()}
