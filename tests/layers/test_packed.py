import math

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.execution import Execution, Mode
from din_dist.layers.packed import segment_ids, segment_softmax, segment_sum

NOWHERE = tf.zeros([0], tf.int32)


@pytest.mark.parametrize("native", [False, True])
def test_segment_ids_skip_empty_segments(native):
    mode = Mode(True, Execution(kernels=native))
    assert_array_equal(segment_ids(tf.constant([2, 0, 1]), mode), [0, 0, 2])
    assert_array_equal(segment_ids(tf.constant([0, 1, 300, 0]), mode), [1] + [2] * 300)
    assert segment_ids(tf.constant([0, 0]), mode).shape == (0,)
    assert segment_ids(NOWHERE, mode).shape == (0,)


def test_segment_sum_of_an_empty_segment_is_zero():
    values = tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert_array_equal(segment_sum(values, tf.constant([0, 0, 2]), 4), [[4, 6], [0, 0], [5, 6], [0, 0]])
    assert_array_equal(segment_sum(tf.zeros([0, 2]), NOWHERE, 2), np.zeros((2, 2)))


def test_segment_softmax_and_its_gradient():
    """exp gives 1 and 3: shares 1/4 and 3/4, and d p_0 / d score = p_0 (1 - p_0), -p_0 p_1. Alone, the share is 1."""
    scores = tf.constant([0.0, math.log(3.0), 7.0])
    with tf.GradientTape() as tape:
        tape.watch(scores)
        shares = segment_softmax(scores, tf.constant([0, 0, 2]), 3)
        first = shares[0]
    assert_allclose(shares, [0.25, 0.75, 1.0], rtol=1e-6)
    assert_allclose(tape.gradient(first, scores), [0.1875, -0.1875, 0.0], rtol=1e-5)


def test_segment_softmax_does_not_overflow():
    """Each segment is shifted by its own largest score: another's may be far away."""
    shares = segment_softmax(tf.constant([1e4, 1e4, -1e4, -1e4]), tf.constant([0, 0, 1, 1]), 2)
    assert_array_equal(shares, [0.5, 0.5, 0.5, 0.5])


def test_segment_softmax_of_no_positions():
    assert segment_softmax(tf.zeros([0]), NOWHERE, 3).shape == (0,)


def test_padding_is_left_out_and_has_no_gradient():
    """Two rows of padding, with values that would show: softmax over [0, ln 3] is [1/4, 3/4]."""
    scores = tf.constant([0.0, np.log(3.0), 1e30, np.nan])
    segment_of = tf.constant([1, 1, -1, -1])
    direction = tf.constant([1.0, 0.0, 0.0, 0.0])
    with tf.GradientTape() as tape:
        tape.watch(scores)
        weights = segment_softmax(scores, segment_of, 3)
        total = tf.reduce_sum((weights * direction)[:2])
    assert_allclose(weights[:2], [0.25, 0.75], rtol=1e-6)
    assert_allclose(tape.gradient(total, scores), [0.1875, -0.1875, 0.0, 0.0], rtol=1e-6)
    assert_array_equal(segment_sum(tf.constant([1.0, 2.0, 4.0]), tf.constant([0, 2, -1]), 3), [1.0, 0.0, 2.0])


def test_no_length_is_walked_twice():
    """A rectangle of these would not fit in memory."""
    lengths = tf.concat([tf.zeros([100_000], tf.int32), [100_000]], axis=0)
    assert_array_equal(tf.unique(segment_ids(lengths))[0], [100_000])
