import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.config import Activation
from din_dist.execution import TRAINING, Mode
from din_dist.layers.hidden import ACTIVATIONS, HiddenLayers
from tests.support.reference import padded_din
from tests.support.reference.compare import assert_same_gradients, randomise, weights_of


def built(width, *args, **kwargs):
    layers = HiddenLayers(*args, name="hidden", **kwargs)
    layers.build((None, width))
    return layers


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (Activation.RELU, [5.0, 1.0]),
        (Activation.PRELU, [5.0, 0.5]),
        (Activation.SIGMOID, [1 + 2 * 0.8808, 1 + 2 * 0.1192]),
        (Activation.DICE, [1 + 4 * 0.8808, 1 - 4 * 0.1192]),
    ],
)
def test_by_hand(activation, expected):
    """Sums 2 and -2, through the activation, times 2 plus 1; sigmoid(2) = .8808, PReLU's slope is 1/8."""
    layers = built(2, [1], activation, frozen=True)
    layers.dense_layers[0].kernel.assign([[1.0], [1.0]])
    layers.output_layer.kernel.assign([[2.0]])
    layers.output_layer.bias.assign([1.0])
    if activation is Activation.PRELU:
        layers.activations[0].alpha.assign([0.125])
    assert_allclose(layers(tf.constant([[3.0, -1.0], [-3.0, 1.0]]), mode=TRAINING), expected, rtol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", Activation)
def test_outputs_and_gradients_equal_the_reference(activation, training):
    layers = built(3, [5, 4], activation)
    randomise(layers)
    random = np.random.default_rng(0)
    inputs, direction = random.normal(0, 1, (6, 3)), random.normal(0, 1, 6)
    weights = {**weights_of(layers, "hidden/"), "inputs": inputs}
    x = tf.constant(inputs, tf.float32)
    variables = {weight.path.removeprefix("hidden/"): weight.value for weight in layers.trainable_weights}
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = layers(x, mode=Mode(training))
        total = tf.reduce_sum(outputs * direction)
    gradients = tape.gradient(total, {**variables, "inputs": x})

    def reference(weights):
        return padded_din.perceptron(weights, weights["inputs"], activation, training)

    assert_allclose(outputs, reference(weights), rtol=1e-4, atol=1e-5)
    expected = padded_din.central_differences(lambda w: np.sum(reference(w) * direction), weights, list(gradients))
    assert_same_gradients({name: gradient.numpy() for name, gradient in gradients.items()}, expected)


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_one_output_a_row(num_rows):
    """A batch of one stays a batch."""
    assert built(2, [5, 4], Activation.RELU)(tf.zeros([num_rows, 2])).shape == (num_rows,)


def test_after_first_continues_from_the_first_projection():
    layers = built(2, [5, 4], Activation.SIGMOID)
    randomise(layers)
    inputs = tf.constant([[3.0, -1.0], [0.5, 1.0]])
    projected = inputs @ layers.dense_layers[0].kernel + layers.dense_layers[0].bias
    assert_allclose(layers.after_first(projected), layers(inputs), rtol=1e-6)


def test_dropout_follows_each_activation_in_training():
    """With both kernels ones and rate 1/2, each of 64 units gives 0 or 2 * 1, and the layers draw apart."""
    layers = built(1, [64, 64], Activation.RELU, dropout=0.5)
    for dense in layers.dense_layers:
        dense.kernel.assign(np.eye(*dense.kernel.shape) if dense.kernel.shape[0] > 1 else np.ones((1, 64)))
    layers.output_layer.kernel.assign(np.ones((64, 1)))
    inputs, keys = tf.ones([200, 1]), tf.range(200, dtype=tf.int64)
    assert_allclose(layers(inputs, keys), np.full(200, 64.0))
    kept_twice = layers(inputs, keys, mode=TRAINING) / 4
    assert_allclose(np.mean(kept_twice) / 64, 0.25, atol=0.02)
    with pytest.raises(ValueError, match="dropout_seeds"):
        layers(inputs, mode=TRAINING)


def test_an_unknown_activation_is_refused():
    with pytest.raises(KeyError, match="swish"):
        HiddenLayers([3], "swish")


class Softsign(keras.layers.Layer):
    """A toy: nobody has written a kernel for it."""

    def call(self, inputs):
        return inputs / (1 + tf.abs(inputs))


def test_an_activation_without_a_kernel_is_one_line(monkeypatch):
    """x / (1 + |x|) of 3 and -1, then times 2."""
    monkeypatch.setitem(ACTIVATIONS, "softsign", lambda frozen, name: Softsign(name=name))
    layers = built(1, [1], "softsign")
    layers.dense_layers[0].kernel.assign([[1.0]])
    layers.output_layer.kernel.assign([[2.0]])
    assert_allclose(layers(tf.constant([[3.0], [-1.0]]), mode=TRAINING), [1.5, -1.0], rtol=1e-6)


def test_config_round_trip():
    layers = built(3, [5, 4], Activation.DICE, frozen=True, dropout=0.25)
    again = HiddenLayers.from_config(layers.get_config())
    again.build((None, 3))
    again.set_weights(layers.get_weights())
    inputs = tf.constant(np.random.default_rng(0).normal(0, 1, (7, 3)), tf.float32)
    assert_array_equal(again(inputs), layers(inputs))
    assert [dropout.rate for dropout in again.dropouts] == [0.25, 0.25]
    assert again.activations[0].standardize.frozen


def test_the_layers_of_a_stack_start_apart():
    first, second = built(6, [6, 6], Activation.RELU).dense_layers
    assert np.abs(first.kernel.numpy() - second.kernel.numpy()).max() > 0.01
    assert_array_equal(first.bias, np.zeros(6))
