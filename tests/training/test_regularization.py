import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.config import OptimizerConfig
from din_dist.distributed.gradients import RowGradients
from din_dist.training.regularization import Regularization, clip, global_norm

NAMES = ["lookup/item", "lookup/item_bias", "head/dense_0/kernel", "head/dense_0/bias", "head_norm/gamma"]
TABLE = tf.Variable([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
VARIABLES = [TABLE, tf.Variable(tf.ones([3, 1])), *(tf.Variable([[2.0]]) for _ in range(3))]
GRADIENTS = [
    RowGradients(tf.constant([2, 0]), tf.constant([[10.0, 20.0], [30.0, 40.0]])),
    RowGradients(tf.constant([2, 0]), tf.constant([[7.0], [8.0]])),
    *(tf.constant([[1.0]]) for _ in range(3)),
]


def regularize(**config):
    """What is added, by name; of rows, in the order of the gradient."""
    regularization = Regularization(OptimizerConfig(**config), {"lookup/item": np.array([0.0, 99.0, 4.0])})
    added = {}
    for name, after, before in zip(NAMES, regularization(GRADIENTS, VARIABLES, NAMES), GRADIENTS, strict=True):
        if isinstance(before, RowGradients):
            assert_array_equal(after.row_ids, before.row_ids)
            after, before = after.rows, before.rows
        if np.any(after != before):
            added[name] = after - before
    return added


def test_nothing_is_added_by_default():
    assert regularize() == {}


def test_l2_is_for_kernels():
    """Not for biases, norms or tables: a tenth of the kernel's 2."""
    added = regularize(l2=0.1)
    assert list(added) == ["head/dense_0/kernel"]
    assert_allclose(added["head/dense_0/kernel"], [[0.2]], rtol=1e-5)


def test_embedding_l2_is_for_the_rows_of_the_batch():
    """A tenth of rows 2 and 0; the item's bias is no embedding."""
    added = regularize(embedding_l2=0.1)
    assert list(added) == ["lookup/item"]
    assert_allclose(added["lookup/item"], [[0.5, 0.6], [0.1, 0.2]], rtol=1e-4)


def test_mini_batch_aware_l2_is_divided_by_the_count_of_the_row():
    """Row 2 occurs in 4 events; row 0, an unknown id, in none and is taken for one."""
    added = regularize(mini_batch_aware_l2=0.4)
    assert list(added) == ["lookup/item"]
    assert_allclose(added["lookup/item"], [[0.1 * 5, 0.1 * 6], [0.4 * 1, 0.4 * 2]], rtol=1e-4)


def test_penalties_add_up():
    added = regularize(embedding_l2=0.1, mini_batch_aware_l2=0.4, l2=0.5)
    assert_allclose(added["lookup/item"], [[0.2 * 5, 0.2 * 6], [0.5 * 1, 0.5 * 2]], rtol=1e-4)
    assert_allclose(added["head/dense_0/kernel"], [[1.0]], rtol=1e-5)


def test_global_norm_is_of_dense_values_and_rows_together():
    """sqrt(3^2 + 4^2 + 12^2) = 13."""
    gradients = [tf.constant([[3.0, 0.0]]), RowGradients(tf.constant([7, 2]), tf.constant([[4.0], [12.0]]))]
    assert_allclose(global_norm(gradients), 13.0)


@pytest.mark.parametrize(("largest", "scale"), [(6.5, 0.5), (13.0, 1.0), (50.0, 1.0)])
def test_clip_scales_all_alike_and_never_up(largest, scale):
    dense, rows = clip(
        [tf.constant([[3.0, 4.0]]), RowGradients(tf.constant([7]), tf.constant([[12.0]]))], tf.constant(13.0), largest
    )
    assert_allclose(dense, scale * np.array([[3.0, 4.0]]))
    assert_array_equal(rows.row_ids, [7])
    assert_allclose(rows.rows, [[scale * 12.0]])


def test_clip_of_a_zero_gradient_is_zero():
    assert_array_equal(clip([tf.zeros([2])], tf.constant(0.0), 5.0)[0], [0.0, 0.0])
