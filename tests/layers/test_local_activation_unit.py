import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.config import Activation, AttentionNormalization
from din_dist.execution import TRAINING
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.layers.packed import segment_ids
from din_dist.layers.pairs import Pairs
from tests.support.reference import padded_din
from tests.support.reference.compare import assert_same_gradients, randomise, weights_of

SOFTMAX, NONE = AttentionNormalization


def built(width, hidden_units, activation=Activation.RELU, normalization=SOFTMAX, **settings):
    unit = LocalActivationUnit(hidden_units, activation, normalization, name="attention", **settings)
    unit.build((None, width))
    return unit


def summing_unit(kernel, normalization):
    """Score = relu(kernel · [q, k, q - k, q * k])."""
    unit = built(len(kernel) // 4, [1], normalization=normalization)
    unit.scorer.dense_layers[0].kernel.assign(np.array(kernel)[:, None])
    unit.scorer.output_layer.kernel.assign([[1.0]])
    return unit


def test_one_behaviour_is_the_interest_and_none_gives_zeros():
    """The softmax of one is 1, whatever the weights."""
    unit = built(2, [5, 4], Activation.DICE)
    randomise(unit)
    pooled = unit(
        tf.constant([[1.0, 0.0], [0.0, 1.0]]), tf.constant([[2.0, 5.0]]), Pairs(tf.constant([0]), tf.constant([0]))
    )
    assert_allclose(pooled, [[2.0, 5.0], [0.0, 0.0]], rtol=1e-6)


def test_the_order_of_the_four_inputs():
    """[q, k, q-k, q*k] = [5, 2, 3, 10]: 5·1 + 2·10 + 3·100 + 10·1000 = 10325, the weight of key 2 without softmax."""
    unit = summing_unit([1.0, 10.0, 100.0, 1000.0], NONE)
    pooled = unit(tf.constant([[5.0]]), tf.constant([[2.0]]), Pairs(tf.constant([0]), tf.constant([0])))
    assert_allclose(pooled, [[2 * 10325.0]], rtol=1e-6)


def test_softmax_of_scores_over_the_root_of_the_width():
    """Score = first element of the key; 0 and 2 ln 3 over sqrt(H = 4) weigh 1/4 and 3/4.

    The second key serves both candidates.
    """
    unit = summing_unit([0.0] * 4 + [1.0, 0.0, 0.0, 0.0] + [0.0] * 8, SOFTMAX)
    keys = tf.constant([[0.0, 8.0, 0.0, 0.0], [2 * math.log(3), 0.0, 4.0, 0.0]])
    pooled = unit(tf.zeros([2, 4]), keys, Pairs(tf.constant([0, 0, 1]), tf.constant([0, 1, 1])))
    assert_allclose(pooled, [[1.5 * math.log(3), 2.0, 3.0, 0.0], keys[1]], rtol=1e-5)


def test_weights_by_hand():
    """As above: 1/4 and 3/4 for the first candidate, all for the only behaviour of the second."""
    unit = summing_unit([0.0] * 4 + [1.0, 0.0, 0.0, 0.0] + [0.0] * 8, SOFTMAX)
    keys = tf.constant([[0.0, 8.0, 0.0, 0.0], [2 * math.log(3), 0.0, 4.0, 0.0]])
    weights = unit.weights_of_pairs(tf.zeros([2, 4]), keys, Pairs(tf.constant([0, 0, 1]), tf.constant([0, 1, 1])))
    assert_allclose(weights, [0.25, 0.75, 1.0], rtol=1e-6)


def test_weights_without_softmax_are_the_scores():
    """[q, k, q-k, q*k] = [5, 2, 3, 10] and [5, 4, 1, 20] against [-1, 10, 100, 1000], and the output layer's -1."""
    unit = summing_unit([-1.0, 10.0, 100.0, 1000.0], NONE)
    unit.scorer.output_layer.kernel.assign([[-1.0]])
    keys, one = tf.constant([[2.0], [4.0]]), tf.constant([0, 0])
    assert_allclose(
        unit.weights_of_pairs(tf.constant([[5.0]]), keys, Pairs(one, tf.constant([1, 0]))), [-20135, -10315], rtol=1e-6
    )


@pytest.mark.parametrize("normalization", AttentionNormalization)
@pytest.mark.parametrize("activation", Activation)
def test_side_information_equals_the_reference(activation, normalization):
    unit = built(3, [5, 4], activation, normalization, side_width=2)
    randomise(unit)
    candidate, keys, mask = random_inputs([3, 0, 1, 6, 2], seed=1)
    random = np.random.default_rng(3)
    sides, side_of = random.normal(0, 1, (4, 2)), random.integers(0, 4, mask.shape)
    direction = random.normal(0, 1, (5, 5))
    q, k, s = (tf.constant(values, tf.float32) for values in (candidate, keys[mask], sides))
    pairs = Pairs(segment_ids(tf.constant(mask.sum(axis=1), tf.int32)), tf.range(tf.shape(k)[0]))
    pairs = pairs._replace(side_of=tf.constant(side_of[mask], tf.int32))
    variables = {weight.path.removeprefix("attention/"): weight.value for weight in unit.trainable_weights}
    with tf.GradientTape() as tape:
        tape.watch([q, k, s])
        total = tf.reduce_sum(unit(q, k, pairs, mode=TRAINING, sides=s) * direction)
    gradients = tape.gradient(total, {**variables, "candidate": q, "keys": k, "sides": s})

    def pooled(weights):
        given = weights["candidate"], weights["keys"], mask, activation, normalization, True, weights["sides"][side_of]
        return padded_din.attend(weights, *given)

    weights = {**weights_of(unit, "attention/"), "candidate": candidate, "keys": keys, "sides": sides}
    assert_allclose(unit(q, k, pairs, mode=TRAINING, sides=s), pooled(weights), rtol=1e-3, atol=1e-4)
    expected = padded_din.central_differences(
        lambda changed: np.sum(pooled(changed) * direction), weights, list(gradients)
    )
    expected["keys"] = expected["keys"][mask]
    assert_same_gradients({name: gradient.numpy() for name, gradient in gradients.items()}, expected)


def random_inputs(lengths, seed, width=3):
    """Candidates `[B, H]`, padded keys `[B, T, H]` (values where nothing is, too) and mask `[B, T]`, in float64."""
    random = np.random.default_rng(seed)
    longest = max(lengths, default=0)
    mask = np.arange(longest) < np.array(lengths, int)[:, None]
    return random.normal(0, 1, (len(lengths), width)), random.normal(0, 1, (*mask.shape, width)), mask


def pool(unit, candidate, keys, mask):
    """The packed call, every position with a key of its own."""
    pairs = Pairs(segment_ids(tf.constant(mask.sum(axis=1), tf.int32)), tf.range(tf.shape(keys)[0]))
    return unit(candidate, keys, pairs, mode=TRAINING)


@given(lengths=st.lists(st.integers(0, 9), max_size=8), normalization=st.sampled_from(AttentionNormalization))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_ragged_batch_equals_the_reference(lengths, normalization):
    unit = built(3, [5, 4], Activation.DICE, normalization)
    randomise(unit)
    candidate, keys, mask = random_inputs(lengths, seed=len(lengths))
    pooled = pool(unit, tf.constant(candidate, tf.float32), tf.constant(keys[mask], tf.float32), mask)
    assert pooled.shape == (len(lengths), 3)
    expected = padded_din.attend(
        weights_of(unit, "attention/"), candidate, keys, mask, Activation.DICE, normalization, batch_statistics=True
    )
    assert_allclose(pooled, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalization", AttentionNormalization)
@pytest.mark.parametrize("activation", Activation)
def test_gradients_equal_the_reference(activation, normalization):
    """Of every weight, the candidates and the keys; keys in the padding have none."""
    unit = built(3, [5, 4], activation, normalization)
    randomise(unit)
    candidate, keys, mask = random_inputs([3, 0, 1, 6, 2], seed=1)
    direction = np.random.default_rng(2).normal(0, 1, candidate.shape)
    q, k = tf.constant(candidate, tf.float32), tf.constant(keys[mask], tf.float32)
    variables = {weight.path.removeprefix("attention/"): weight.value for weight in unit.trainable_weights}
    with tf.GradientTape() as tape:
        tape.watch([q, k])
        total = tf.reduce_sum(pool(unit, q, k, mask) * direction)
    gradients = tape.gradient(total, {**variables, "candidate": q, "keys": k})

    def reference(weights):
        pooled = padded_din.attend(
            weights, weights["candidate"], weights["keys"], mask, activation, normalization, batch_statistics=True
        )
        return np.sum(pooled * direction)

    weights = {**weights_of(unit, "attention/"), "candidate": candidate, "keys": keys}
    expected = padded_din.central_differences(reference, weights, list(gradients))
    assert_array_equal(expected["keys"][~mask], 0)
    expected["keys"] = expected["keys"][mask]
    assert_same_gradients({name: gradient.numpy() for name, gradient in gradients.items()}, expected)


@pytest.mark.parametrize("num_candidates", [0, 1, 3])
@pytest.mark.parametrize("normalization", AttentionNormalization)
@pytest.mark.parametrize("activation", Activation)
def test_no_behaviour_anywhere_gives_zeros_and_zero_gradients(activation, normalization, num_candidates):
    unit = built(3, [5, 4], activation, normalization)
    q, k = tf.ones([num_candidates, 3]), tf.zeros([0, 3])
    with tf.GradientTape() as tape:
        tape.watch([q, k])
        pooled = unit(q, k, Pairs(tf.zeros([0], tf.int32), tf.zeros([0], tf.int32)), mode=TRAINING)
        total = tf.reduce_sum(pooled)
    assert_array_equal(pooled, np.zeros((num_candidates, 3)))
    watched = [q, k, *(weight.value for weight in unit.trainable_weights)]
    for gradient in tape.gradient(total, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO):
        assert_array_equal(gradient, np.zeros(gradient.shape))


def test_config_round_trip():
    unit = built(3, [5, 4], Activation.DICE, NONE)
    again = LocalActivationUnit.from_config(unit.get_config())
    again.build((None, 3))
    again.set_weights(unit.get_weights())
    candidate, keys, mask = random_inputs([3, 0, 1], seed=0)
    inputs = (tf.constant(candidate, tf.float32), tf.constant(keys[mask], tf.float32), mask)
    assert_array_equal(pool(again, *inputs), pool(unit, *inputs))
