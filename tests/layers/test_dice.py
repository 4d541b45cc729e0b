import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose

from din_dist.execution import TRAINING, Mode
from din_dist.layers.dice import Dice
from tests.support.reference import padded_din
from tests.support.reference.compare import randomise, weights_of


def built(width, **kwargs):
    layer = Dice(**kwargs)
    layer.build((None, width))
    return layer


def test_the_gate_is_half_open_at_the_mean():
    """p = 1/2 there: x/2 + alpha x / 2, with alpha 0 (its start), 1/4 and 1."""
    layer = built(3)
    layer.standardize.moving_mean.assign([2.0, 2.0, 2.0])
    inputs = tf.constant([[2.0, 2.0, 2.0]])
    assert_allclose(layer(inputs), [[1.0, 1.0, 1.0]], rtol=1e-6)
    layer.alpha.assign([0.0, 0.25, 1.0])
    assert_allclose(layer(inputs), [[1.0, 1.25, 2.0]], rtol=1e-6)


def test_training_gates_by_the_statistics_of_the_batch():
    """1 and 3 lie one deviation below and above their mean: p = sigmoid(-1) = .2689 and sigmoid(1) = .7311."""
    outputs = built(1)(tf.constant([[1.0], [3.0]]), mode=TRAINING)
    assert_allclose(outputs, [[0.2689], [3 * 0.7311]], rtol=1e-3)


@pytest.mark.parametrize(("frozen", "training"), [(False, True), (False, False), (True, True)])
def test_outputs_and_gradients_equal_the_reference(frozen, training):
    layer = built(3, frozen=frozen)
    randomise(layer)
    random = np.random.default_rng(0)
    inputs, direction = random.normal(1, 2, (7, 3)), random.normal(0, 1, (7, 3))
    weights = {**weights_of(layer, layer.path + "/"), "inputs": inputs}
    x = tf.constant(inputs, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = layer(x, mode=Mode(training))
        total = tf.reduce_sum(outputs * direction)
    gradients = tape.gradient(total, {"inputs": x, "alpha": layer.alpha.value})

    def reference(weights):
        return padded_din.dice(weights, weights["inputs"], training and not frozen)

    assert_allclose(outputs, reference(weights), rtol=1e-4, atol=1e-5)
    expected = padded_din.central_differences(lambda w: np.sum(reference(w) * direction), weights, list(gradients))
    for name, gradient in gradients.items():
        assert_allclose(gradient, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_statistics_are_those_of_all_ranks():
    """The other rank, simulated, adds 3 to this rank's 1: sums about 0 are 3, of squares 9, of one row."""
    mode = Mode(training=True, sum_over_ranks=lambda sums: sums + tf.constant([3.0, 9.0, 1.0]))
    assert_allclose(built(1)(tf.constant([[1.0]]), mode=mode), [[0.2689]], rtol=1e-3)


def test_config_round_trip():
    again = Dice.from_config(Dice(frozen=True, name="gate").get_config())
    assert (again.standardize.frozen, again.name) == (True, "gate")
