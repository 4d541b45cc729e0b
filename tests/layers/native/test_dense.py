"""Dense layers and their activations in kernels of our own, against the same layers by TensorFlow's operations."""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist import kernels
from din_dist.config import Activation
from din_dist.execution import Execution, Mode
from din_dist.layers.hidden import ACTIVATIONS
from din_dist.layers.native.dense import has_kernel, run_by_kernels
from din_dist.layers.stages import Stage
from din_dist.layers.standardize import BatchNormalization
from tests.support.native_layers import Head
from tests.support.reference.compare import assert_same_gradients
from tests.support.reference.ranks import ThreadedRanks

KEYS = np.random.default_rng(0).integers(-(2**63), 2**63, 500)


def assert_heads_agree(width, units, num_rows=200, keys=None, mean=3.0, **settings):
    random = np.random.default_rng(width)
    inputs = tf.constant(random.normal(mean, 2.0, (num_rows, width)), tf.float32)
    direction = tf.constant(random.normal(size=num_rows), tf.float32)
    theirs, ours = (Head(width, units, native=native, **settings) for native in (False, True))
    for _ in range(2):  # the second time with moving averages that both have changed
        expected_outputs, expected = theirs.run(inputs, direction, keys)
        outputs, gradients = ours.run(inputs, direction, keys)
        assert_allclose(outputs, expected_outputs, rtol=1e-4, atol=2e-6 * np.abs(expected_outputs).max(initial=50))
        assert_same_gradients(gradients, expected)
        for own, other in zip(ours.averages, theirs.averages, strict=True):
            assert_allclose(own, other, rtol=1e-5, atol=1e-6, err_msg=own.path)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", Activation)
def test_they_equal_tensorflows_operations(activation, frozen, num_threads, monkeypatch):
    """For widths that are no multiple of anything and those of the paper, one layer and many."""
    monkeypatch.setattr(kernels, "num_threads", lambda: num_threads)
    for width, units in ((19, [20, 17, 9]), (384, [80, 40]), (1, [3]), (32, [16])):
        assert_heads_agree(width, units, activation=activation, frozen=frozen)


@pytest.mark.parametrize("num_rows", [0, 1, 63, 64, 65, 500])
def test_any_number_of_rows(num_rows):
    assert_heads_agree(37, [20, 5], num_rows)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_units_are_left_out(compiled):
    """After each activation, and none of the inputs."""
    for activation, units in itertools.product((Activation.RELU, Activation.DICE), ([40], [17, 33])):
        keys = tf.constant(KEYS[:200])
        assert_heads_agree(19, units, keys=keys, activation=activation, dropout=0.4, compiled=compiled)


def test_dropout_needs_keys():
    with pytest.raises(ValueError, match="Pass dropout_seeds in training"):
        Head(4, [3], native=True, dropout=0.5)(tf.ones([2, 4]))


def test_ranks_with_parts_of_the_rows_do_what_one_does_with_all():
    random = np.random.default_rng(0)
    inputs, direction = random.normal(1.0, 2.0, (100, 6)), random.normal(size=100)
    as_tensor = functools.partial(tf.constant, dtype=tf.float32)
    expected_outputs, expected = Head(6, [5, 4]).run(as_tensor(inputs), as_tensor(direction))
    parts, ranks = [slice(0, 30), slice(30, 30), slice(30, 100)], ThreadedRanks(3)

    def work(rank):
        head = Head(6, [5, 4], native=True, sum_over_ranks=ranks.sum_over_ranks(rank))
        return head.run(as_tensor(inputs[parts[rank]]), as_tensor(direction[parts[rank]]))

    outputs, gradients = zip(*ranks.run(work), strict=True)
    assert_allclose(np.concatenate(outputs), expected_outputs, rtol=1e-4, atol=1e-4)
    found = {name: sum(each[name] for each in gradients) for name in expected if name != "inputs"}
    found["inputs"] = np.concatenate([each["inputs"] for each in gradients])
    assert_same_gradients(found, expected)


def test_nan_and_infinity_show():
    """A trainer stops at them, and so must hear of them."""
    for value in (np.nan, np.inf):
        inputs = tf.constant([[1.0, 2.0], [value, 0.0], [3.0, 1.0]])
        outputs, gradients = Head(2, [3], native=True).run(inputs, tf.ones([3]))
        assert not np.isfinite(outputs).all()
        assert not np.isfinite(gradients["inputs"]).all()


def test_a_layer_alone():
    """(1, 2) minus the mean (2, 3), by 1 / sqrt(1 + .001), through the kernel ((1, 0), (1, 1)) and bias (0, 10)."""
    norm, last = BatchNormalization(), Head(2, [2]).hidden.dense_layers[0]
    norm.build((None, 2))
    last.kernel.assign([[1.0, 0.0], [1.0, 1.0]])
    last.bias.assign([0.0, 10.0])
    outputs = run_by_kernels(
        [Stage(norm, last)], tf.constant([[1.0, 2.0], [3.0, 4.0]]), None, Mode(True, Execution(kernels=True))
    )
    n = 1 / np.sqrt(1.001)
    assert_allclose(outputs, [[-2 * n, 10 - n], [2 * n, 10 + n]], rtol=1e-6)
    assert_array_equal(outputs.shape, [2, 2])


def test_all_activations_of_the_flags_have_a_kernel_and_others_have_none():
    assert all(has_kernel(make(False, "activation")) for make in ACTIVATIONS.values())
    assert has_kernel(BatchNormalization())
    assert not has_kernel(keras.layers.Activation("gelu"))
    assert not has_kernel(keras.layers.LeakyReLU())


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("name", ["", "Dice", "relu6"])
def test_an_unknown_activation_is_refused(name, in_graph):
    one = tf.ones([1])

    def run():
        return kernels.library().din_dist_dense(
            *(tf.ones([1, 16]), tf.ones([1, 1]), one, one, one, one, one, one, tf.zeros([0])),
            activation=name,
            in_bfloat16=False,
            num_threads=1,
        )

    known = "activation must be one of dice, prelu, sigmoid, relu, scaled"
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{known}\. Received: '{name}'\."):
        (tf.function(run) if in_graph else run)()
