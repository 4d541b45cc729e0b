import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist import kernels
from din_dist.execution import TRAINING, Execution, Mode
from din_dist.layers.standardize import BatchNormalization, Standardize
from tests.support.reference import padded_din
from tests.support.reference.compare import randomise, weights_of
from tests.support.reference.ranks import ThreadedRanks

SHRUNK = 4.001**-0.5  # 1 / sqrt(variance 4 + epsilon)


def built(layer, width=1):
    layer.build((None, width))
    return layer


def mode_of(native, sum_over_ranks=tf.identity):
    return Mode(True, Execution(kernels=native), sum_over_ranks)


def test_training_uses_and_records_the_statistics_of_the_batch():
    """Mean 2, variance 4. The averages start at 0 and 1 and take one hundredth of the way: 0.02 and 1.03."""
    layer = built(Standardize())
    assert_allclose(layer(tf.constant([[0.0], [4.0]]), mode=TRAINING), [[-2 * SHRUNK], [2 * SHRUNK]], rtol=1e-6)
    assert_allclose(layer.moving_mean, [0.02], rtol=1e-6)
    assert_allclose(layer.moving_variance, [1.03], rtol=1e-6)


@pytest.mark.parametrize(("frozen", "training"), [(False, False), (True, False), (True, True)])
def test_inference_and_frozen_use_the_moving_averages_and_leave_them(frozen, training):
    layer = built(Standardize(frozen))
    layer.moving_mean.assign([1.0])
    layer.moving_variance.assign([4.0])
    assert_allclose(layer(tf.constant([[1.0], [3.0]]), mode=Mode(training)), [[0.0], [2 * SHRUNK]], rtol=1e-6)
    assert_array_equal(layer.moving_mean, [1.0])
    assert_array_equal(layer.moving_variance, [4.0])


def test_batch_normalization_scales_and_shifts():
    layer = built(BatchNormalization())
    layer.gamma.assign([3.0])
    layer.beta.assign([10.0])
    outputs = layer(tf.constant([[0.0], [4.0]]), mode=TRAINING)
    assert_allclose(outputs, [[10 - 6 * SHRUNK], [10 + 6 * SHRUNK]], rtol=1e-6)


def test_frozen_batch_normalization_starts_as_the_authors_ran():
    """Mean 0 and variance 1 for ever: x / sqrt(1.001)."""
    layer = built(BatchNormalization(frozen=True))
    for _ in range(3):
        outputs = layer(tf.constant([[0.0], [4.0]]), mode=TRAINING)
    assert_allclose(outputs, [[0.0], [4 / 1.001**0.5]], rtol=1e-6)


def test_one_example_and_none():
    """One example varies by nothing: zeros. None leaves the averages alone; a gradient is never NaN."""
    layer = built(Standardize())
    for num_rows, averages in ((0, (0.0, 1.0)), (1, (0.05, 0.99))):
        inputs = tf.fill([num_rows, 1], 5.0)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, mode=TRAINING)
        assert_array_equal(outputs, np.zeros((num_rows, 1)))
        assert_array_equal(tape.gradient(outputs, inputs), np.zeros((num_rows, 1)))
        assert_allclose([layer.moving_mean[0], layer.moving_variance[0]], averages, rtol=1e-6)


def test_columns_far_from_zero_keep_their_digits():
    """E[x^2] - E[x]^2 in float32 would be wrong by 10^8 / 2^24 = 6 here, where the variance is 1/4."""
    layer = built(Standardize())
    layer.moving_mean.assign([10_000.0])
    inputs = 10_000 + np.random.default_rng(0).normal(0, 0.5, (256, 1)).astype(np.float32)
    exact = (inputs - inputs.mean(dtype=np.float64)) / np.sqrt(inputs.var(dtype=np.float64) + 1e-3)
    assert_allclose(layer(tf.constant(inputs), mode=TRAINING), exact, atol=5e-3)


@pytest.mark.parametrize("native", [False, True])
def test_statistics_of_sums(native):
    """About 10, of 4 rows: of 11, 11, 13 and 13; of 12 each, with squares a little too small; and of NaN."""
    layer = built(Standardize(), 3)
    layer.moving_mean.assign([10.0] * 3)
    mean, scale, count = layer.statistics_of(tf.constant([8.0, 8.0, np.nan, 20.0, 15.99, 1.0, 4.0]), mode_of(native))
    assert_allclose(mean, [12, 12, np.nan])
    assert_allclose(scale, [1.001**-0.5, 0.001**-0.5, np.nan], rtol=1e-6)
    assert_array_equal(count, [4])
    assert_allclose(layer.moving_mean, [10.02, 10.02, np.nan], rtol=1e-6)
    assert_allclose(layer.moving_variance, [1.0, 0.99, np.nan], rtol=1e-6)


@pytest.mark.parametrize("native", [False, True])
def test_statistics_of_nothing(native):
    layer = built(Standardize(), 1)
    layer.moving_mean.assign([3.0])
    mean, scale, count = layer.statistics_of(tf.zeros([3]), mode_of(native))
    assert_array_equal([mean[0], count[0], layer.moving_mean[0], layer.moving_variance[0]], [3, 1, 3, 1])
    assert_allclose(scale, 0.001**-0.5, rtol=1e-6)


def test_wrong_sums_are_refused_by_the_kernel():
    with pytest.raises(tf.errors.InvalidArgumentError, match="statistics must be of the layer's columns"):
        kernels.library().din_dist_statistics(tf.zeros([4]), [1.0], [1.0], [0.9, 0.1])


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_equal_the_reference(training):
    layer = built(BatchNormalization(), 3)
    randomise(layer)
    random = np.random.default_rng(0)
    inputs, direction = random.normal(1, 2, (7, 3)), random.normal(0, 1, (7, 3))
    weights = {**weights_of(layer, layer.path + "/"), "inputs": inputs}
    x = tf.constant(inputs, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = layer(x, mode=Mode(training))
        total = tf.reduce_sum(outputs * direction)
    gradients = tape.gradient(total, {"inputs": x, "gamma": layer.gamma.value, "beta": layer.beta.value})

    def reference(weights):
        return padded_din.batch_norm(weights, weights["inputs"], training)

    assert_allclose(outputs, reference(weights), rtol=1e-4, atol=1e-5)
    expected = padded_din.central_differences(lambda w: np.sum(reference(w) * direction), weights, list(gradients))
    for name, gradient in gradients.items():
        assert_allclose(gradient, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("cuts", [(2, 8), (1, 1), (0, 5)], ids=["uneven", "one_has_none", "first_has_none"])
def test_many_ranks_equal_one_big_batch(cuts):
    """Outputs, gradients and moving averages, when three ranks sum their statistics and one may have no rows."""
    random = np.random.default_rng(0)
    inputs, direction = random.normal(3, 2, (2, 8, 4)).astype(np.float32)

    def train(layer, x, direction, sum_over_ranks=tf.identity):
        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, mode=mode_of(False, sum_over_ranks))
            total = tf.reduce_sum(outputs * direction)
        return outputs.numpy(), tape.gradient(total, x).numpy(), [average.numpy() for average in layer.weights]

    outputs, gradient, averages = train(built(Standardize(), 4), inputs, direction)
    ranks = ThreadedRanks(3)
    layers = [built(Standardize(), 4) for _ in range(3)]
    shares = list(zip(np.split(inputs, cuts), np.split(direction, cuts), strict=True))
    results = ranks.run(lambda rank: train(layers[rank], *shares[rank], ranks.sum_over_ranks(rank)))
    assert_allclose(np.concatenate([result[0] for result in results]), outputs, rtol=1e-4, atol=1e-5)
    assert_allclose(np.concatenate([result[1] for result in results]), gradient, rtol=1e-4, atol=1e-5)
    for _, _, own in results:
        assert_allclose(own, averages, rtol=1e-5)


def test_config_round_trip():
    again = Standardize.from_config(Standardize(frozen=True, momentum=0.5, epsilon=0.1, name="s").get_config())
    assert (again.frozen, again.momentum, again.epsilon, again.name) == (True, 0.5, 0.1, "s")
    again = BatchNormalization.from_config(BatchNormalization(frozen=True, name="b").get_config())
    assert (again.standardize.frozen, again.name) == (True, "b")
