"""Vectors of items in kernels of our own, against TensorFlow's operations and by hand."""

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist import kernels
from din_dist.layers.native.vectors import VectorColumns, beside_product, concatenated, vectors_and_candidates


def constant(*values):
    return tf.constant(values, tf.float32)


def test_vectors_and_gradients_by_hand():
    """Three items with a row each of width 1, and of width 2 the rows 1, 0, 1; item 2 is a candidate twice."""
    own, shared = constant([1.0], [2.0], [3.0]), constant([10.0, 11.0], [20.0, 21.0])
    parts = [VectorColumns(own, None), VectorColumns(shared, tf.constant([1, 0, 1]))]
    with tf.GradientTape() as tape:
        tape.watch([own, shared])
        vectors, candidates = vectors_and_candidates(parts, tf.constant([2, 2]))
        total = tf.reduce_sum(vectors * [[1.0], [2.0], [3.0]]) + tf.reduce_sum(candidates * [[100.0], [1000.0]])
    assert_array_equal(vectors, [[1, 20, 21], [2, 10, 11], [3, 20, 21]])
    assert_array_equal(candidates, [[3, 20, 21]] * 2)
    of_own, of_shared = tape.gradient(total, [own, shared])
    assert_array_equal(of_own, [[1], [2], [1103]])
    assert_array_equal(of_shared, [[2, 2], [1104, 1104]])


def whole(like):
    """The same numbers for the same shape, whose sums are exact."""
    return np.random.default_rng(1).integers(-100, 100, like.shape).astype(np.float32)


@pytest.mark.parametrize("num_threads", [1, 3, 40])
@pytest.mark.parametrize("num_items", [0, 1, 500])
def test_they_equal_tensorflows_operations(num_items, num_threads, monkeypatch):
    """For widths that no thread's part fits, rows that nobody has, and a first part that is shared too."""
    monkeypatch.setattr(kernels, "num_threads", lambda: num_threads)
    random = np.random.default_rng(num_items)
    places = [None, random.integers(0, 7, num_items), random.integers(0, 300, num_items)]
    num_rows, widths = (num_items, 7, 300), (19, 64, 5)
    candidate_places = tf.constant(random.integers(0, max(num_items, 1), 200 if num_items else 0), tf.int32)
    for order in ([0, 1, 2], [1, 0], [0], [2, 1]):
        rows = [tf.constant(random.normal(size=(num_rows[at], widths[at])), tf.float32) for at in order]
        parts = [
            VectorColumns(one, None if places[at] is None else tf.constant(places[at], tf.int32))
            for one, at in zip(rows, order, strict=True)
        ]
        results = []
        for native in (False, True):
            with tf.GradientTape() as tape:
                tape.watch(rows)
                if native:
                    vectors, candidates = vectors_and_candidates(parts, candidate_places)
                else:
                    vectors = concatenated(parts)
                    candidates = tf.gather(vectors, candidate_places)
                total = tf.reduce_sum(vectors * whole(vectors)) + tf.reduce_sum(candidates * whole(candidates))
            results.append((vectors, candidates, tape.gradient(total, rows)))
        (expected, expected_candidates, of_rows), (found, candidates, own) = results
        assert_array_equal(found, expected)
        assert_array_equal(candidates, expected_candidates)
        for one, other in zip(own, of_rows, strict=True):
            assert_array_equal(one, tf.convert_to_tensor(other))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (200, 37)])
def test_beside_product(shape, num_threads, monkeypatch):
    monkeypatch.setattr(kernels, "num_threads", lambda: num_threads)
    random = np.random.default_rng(0)
    a, b = (tf.constant(random.normal(size=shape), tf.float32) for _ in range(2))
    up = random.normal(size=(shape[0], 3 * shape[1])).astype(np.float32)
    with tf.GradientTape() as tape:
        tape.watch([a, b])
        found = beside_product(a, b)
        total = tf.reduce_sum(found * up)
    assert_array_equal(found, np.concatenate([a, b, a * b], axis=1))
    first, second, of_product = np.split(up, 3, axis=1)
    of_a, of_b = tape.gradient(total, [a, b])
    assert_allclose(of_a, first + of_product * b.numpy(), rtol=1e-5, atol=1e-6)
    assert_allclose(of_b, second + of_product * a.numpy(), rtol=1e-5, atol=1e-6)


def test_wrong_calls_are_refused():
    ops, threads = kernels.library(), {"num_threads": 1}
    rows, none, one = tf.zeros([3, 2]), tf.zeros([0], tf.int32), tf.zeros([1], tf.int32)
    for places, candidates in ((one + 3, none), (one - 1, none), (none, one + 3), (none, one - 1)):
        settings = {"shared": [len(places) > 0], **threads}
        with pytest.raises(tf.errors.InvalidArgumentError, match="places must be those of rows"):
            ops.din_dist_vectors([rows], [places], candidates, **settings)
        of_vectors, of_candidates = tf.zeros([len(places) or 3, 2]), tf.zeros([len(candidates), 2])
        with pytest.raises(tf.errors.InvalidArgumentError, match="places must be those of rows"):
            ops.din_dist_vectors_gradient(of_vectors, of_candidates, [rows], [places], candidates, **settings)
    with pytest.raises(tf.errors.InvalidArgumentError, match="equally many items"):
        ops.din_dist_vectors([rows, rows[:2]], [none, none], none, shared=[False, False], **threads)
    with pytest.raises(tf.errors.InvalidArgumentError, match="as large as"):
        ops.din_dist_vectors_gradient(rows[:2], tf.zeros([0, 2]), [rows], [none], none, shared=[False], **threads)
    with pytest.raises(tf.errors.InvalidArgumentError, match="equally many and equally wide"):
        ops.din_dist_beside_product(rows, rows[:2], **threads)
    with pytest.raises(tf.errors.InvalidArgumentError, match="as large as"):
        ops.din_dist_beside_product_gradient(rows, rows, rows, **threads)
