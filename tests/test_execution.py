"""How a pass is computed: a chain through XLA against the same chain run one operation at a time."""

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.execution import Execution, Mode, compiled, round_up


def weighted_rows(rows: tf.Tensor, places: tf.Tensor, weights: tf.Tensor, power: int) -> tf.Tensor:
    return tf.gather(rows, places) * weights[:, None] ** power


def run(xla):
    rows, weights = tf.Variable([[1.0, 2.0], [3.0, 4.0]]), tf.constant([1.0, 2.0, 3.0])
    with tf.GradientTape() as tape:
        tape.watch(weights)
        outputs = Execution(xla=xla).fused(weighted_rows)(rows, tf.constant([1, 0, 1]), weights, 2)
        total = tf.reduce_sum(outputs)
    return [outputs, *map(tf.convert_to_tensor, tape.gradient(total, [rows, weights]))]


@pytest.mark.parametrize("xla", [True, False])
def test_outputs_and_gradients(xla):
    """Row 1 is taken with weights 1 and 9, row 0 with 4; the gradient of w^2 * (sum of a row) is 2 w times that sum."""
    outputs, of_rows, of_weights = run(xla)
    assert_allclose(outputs, [[3, 4], [4, 8], [27, 36]])
    assert_allclose(of_rows, [[4, 4], [10, 10]])
    assert_allclose(of_weights, [14, 12, 42])


def test_integers_alone_have_no_gradient():
    assert_array_equal(compiled(_twice)(tf.constant([1, 2])), [2, 4])


def _twice(values: tf.Tensor) -> tf.Tensor:
    return values * 2


def test_inference_compiles_nothing_and_runs_no_kernel():
    execution = Execution(kernels=True, xla=True)
    assert Mode(False, execution).fused(_twice) is _twice
    assert not Mode(False, execution).kernels
    assert Mode(True, execution).fused(_twice) is compiled(_twice)


def test_an_equal_mode_causes_no_new_trace():
    traces = []

    @tf.function
    def pass_through(values, mode):
        traces.append(mode)
        return mode.fused(_twice)(values)

    for _ in range(3):
        pass_through(tf.constant([1]), Mode(True, Execution(xla=True)))
    assert len(traces) == 1


def test_lengths_are_rounded_to_few():
    lengths = np.arange(0, 200_000, 7, dtype=np.int32)
    rounded = round_up(tf.constant(lengths), steps=8).numpy()
    assert (rounded >= lengths).all()
    large = lengths >= 8 * 512
    assert (rounded[large] <= lengths[large] * 9 / 8).all()
    assert (rounded[~large] < lengths[~large] + 512).all()
    some = [int(round_up(tf.constant(length), steps=4)) for length in (0, 1, 512, 513, 32_768, 32_769)]
    assert some == [0, 512, 512, 1024, 32_768, 40_960]
