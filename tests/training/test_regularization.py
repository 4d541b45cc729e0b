import functools

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist import kernels
from din_dist.config import OptimizerConfig
from din_dist.distributed.row_transports import RowGradients
from din_dist.execution import Execution
from din_dist.training.optimizers import Sgd
from din_dist.training.regularization import Regularization, clip

NAMES = ["lookup/item", "lookup/item_bias", "head/dense_0/kernel", "head/dense_0/bias", "head_norm/gamma"]
TABLE = tf.Variable([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
VARIABLES = [TABLE, tf.Variable(tf.ones([3, 1])), *(tf.Variable([[2.0]]) for _ in range(3))]
COUNTS = np.array([0.0, 99.0, 4.0])  # of the events with each row of the table
GRADIENTS = [
    RowGradients(tf.constant([2, 0]), tf.constant([[10.0, 20.0], [30.0, 40.0]])),
    RowGradients(tf.constant([2, 0]), tf.constant([[7.0], [8.0]])),
    *(tf.constant([[1.0]]) for _ in range(3)),
]


@pytest.fixture(params=["operations", "kernel"])
def regularize(request):
    """What is added, by name; of rows, in the order of the gradient."""

    def added_by(**config):
        native = request.param == "kernel"
        regularization = Regularization(OptimizerConfig(**config), {"lookup/item": COUNTS}, Execution(kernels=native))
        values = Sgd(VARIABLES, NAMES, execution=Execution(kernels=native)).values_of(GRADIENTS)
        found, norm = regularization(GRADIENTS, values, NAMES)
        added, squares = {}, 0.0
        for name, after, before in zip(NAMES, found, GRADIENTS, strict=True):
            if isinstance(before, RowGradients):
                assert_array_equal(after.row_ids, before.row_ids)
                after, before = after.rows, before.rows
            squares += np.sum(np.square(after))
            if np.any(after != before):
                added[name] = after - before
        assert_allclose(norm, np.sqrt(squares), rtol=1e-6)
        return added

    return added_by


def test_nothing_is_added_by_default(regularize):
    assert regularize() == {}


def test_l2_is_for_kernels(regularize):
    """Not for biases, norms or tables: a tenth of the kernel's 2."""
    added = regularize(l2=0.1)
    assert list(added) == ["head/dense_0/kernel"]
    assert_allclose(added["head/dense_0/kernel"], [[0.2]], rtol=1e-5)


def test_embedding_l2_is_for_the_rows_of_the_batch(regularize):
    """A tenth of rows 2 and 0; the item's bias is no embedding."""
    added = regularize(embedding_l2=0.1)
    assert list(added) == ["lookup/item"]
    assert_allclose(added["lookup/item"], [[0.5, 0.6], [0.1, 0.2]], rtol=1e-4)


def test_mini_batch_aware_l2_is_divided_by_the_count_of_the_row(regularize):
    """Row 2 occurs in 4 events; row 0, an unknown id, in none and is taken for one."""
    added = regularize(mini_batch_aware_l2=0.4)
    assert list(added) == ["lookup/item"]
    assert_allclose(added["lookup/item"], [[0.1 * 5, 0.1 * 6], [0.4 * 1, 0.4 * 2]], rtol=1e-4)


def test_penalties_add_up(regularize):
    added = regularize(embedding_l2=0.1, mini_batch_aware_l2=0.4, l2=0.5)
    assert_allclose(added["lookup/item"], [[0.2 * 5, 0.2 * 6], [0.5 * 1, 0.5 * 2]], rtol=1e-4)
    assert_allclose(added["head/dense_0/kernel"], [[1.0]], rtol=1e-5)


@pytest.mark.parametrize("native", [False, True])
def test_the_norm_is_of_dense_values_and_rows_together(native):
    """sqrt(3^2 + 4^2 + 12^2) = 13."""
    gradients = [tf.constant([[3.0, 0.0]]), RowGradients(tf.constant([7, 2]), tf.constant([[4.0], [12.0]]))]
    regularize, values = (
        Regularization(OptimizerConfig(), {}, Execution(kernels=native)),
        [tf.zeros([1, 2]), tf.zeros([2, 1])],
    )
    found, norm = regularize(gradients, values, "ab")
    assert_allclose(norm, 13.0)
    assert found == gradients


@pytest.mark.parametrize("native", [False, True])
def test_of_parts_of_the_rows_the_norm_is_that_of_all(native):
    """This rank has (1 + 3)^2 + 2^2 + 4^2 = 36, the first penalised, of 40; with 3^2 of a whole gradient, 7^2."""
    table = tf.Variable([[3.0], [0.0]])
    gradients = [
        RowGradients(tf.constant([0]), tf.constant([[1.0]]), tf.constant(2)),
        tf.constant([3.0]),
        RowGradients(tf.constant([1, 0]), tf.constant([[2.0], [4.0]]), tf.constant(3)),
    ]
    regularize = Regularization(OptimizerConfig(embedding_l2=1.0), {"a": np.ones(2)}, Execution(kernels=native))
    values = [table if native else tf.gather(table, [0]), tf.zeros([1]), tf.zeros([2, 1])]
    parts = []

    def sum_of_parts(part):
        parts.append(float(part))
        return part + 4.0

    _, norm = regularize(gradients, values, "abc", sum_of_parts)
    assert parts == [36.0]
    assert_allclose(norm, 7.0)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_kernel_equals_float64_on_gradients_of_any_size(num_threads, monkeypatch):
    """More rows than one part of the kernel has, rows wider than one, few and no rows, and numbers beside them."""
    monkeypatch.setattr(kernels, "num_threads", lambda: num_threads)
    random = np.random.default_rng(0)
    shapes = {"wide": (3, 5000), "long": (700, 17), "some": (5, 64), "none": (0, 8)}
    counts = {name: np.arange(1000.0) for name in shapes}
    regularization = Regularization(
        OptimizerConfig(embedding_l2=0.3, mini_batch_aware_l2=2.0), counts, execution=Execution(kernels=True)
    )
    ids = {name: random.choice(1000, rows, replace=False) for name, (rows, _) in shapes.items()}
    rows = {name: random.normal(0, 1, shape) for name, shape in shapes.items()}
    tables = {name: random.normal(0, 1, (1000, width)) for name, (_, width) in shapes.items()}
    dense = [random.normal(0, 1, shape) for shape in ((), (9001,), (0,), (7, 3))]
    as_tensor = functools.partial(tf.constant, dtype=tf.float32)
    gradients = [*map(as_tensor, dense)]
    gradients += [RowGradients(tf.constant(ids[name], tf.int32), as_tensor(rows[name])) for name in shapes]
    values = [*map(tf.zeros_like, gradients[: len(dense)])]
    values += [tf.Variable(table, dtype=tf.float32) for table in tables.values()]
    found, norm = regularization(gradients, values, ["", "", "", "", *shapes])
    weights = {name: (0.3 + 2.0 / np.maximum(ids[name], 1.0))[:, None] for name in shapes}
    expected = {name: rows[name] + weights[name] * tables[name][ids[name]] for name in shapes}
    for gradient, name in zip(found[len(dense) :], shapes, strict=True):
        assert_allclose(gradient.rows, expected[name], rtol=1e-5, atol=1e-6)
    assert_allclose(norm, np.sqrt(sum(np.sum(np.square(each)) for each in (*dense, *expected.values()))), rtol=1e-6)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("value", "expected"), [(np.nan, np.nan), (-np.inf, np.inf), (1e30, np.inf)])
def test_the_norm_tells_of_what_is_not_finite(value, expected, native):
    """By it an update is refused; also one whose squares, which optimizers keep, are not."""
    _, norm = Regularization(OptimizerConfig(), {}, Execution(kernels=native))(
        [tf.constant([1.0, value])], [tf.zeros([2])], ["w"]
    )
    assert_array_equal(norm, np.float32(expected))


def test_wrong_calls_of_the_kernel_are_refused():
    rows, ids, weights, table = tf.zeros([2, 3]), tf.constant([0, 3]), tf.zeros([4]), tf.Variable(tf.zeros([4, 3]))

    def refused(gradients=(rows,), tables=(table,), row_ids=(ids,), row_weights=(weights,)):
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            handles = [table.handle for table in tables]
            kernels.library().din_dist_regularize(
                0.0, gradients, handles, row_ids, row_weights, num_row_gradients=1, num_threads=1
            )
        return caught.value.message.partition("}} ")[2].partition(" [Op")[0]

    for wrong in (-1, 4):
        assert refused(row_ids=[tf.constant([0, wrong])]) == "rows must be those of the table"
    a_row = "a gradient's rows must have ids, and be as wide as the table's"
    assert refused(row_ids=[ids[:1]]) == a_row
    assert refused(tables=[tf.Variable(tf.zeros([4, 2]))]) == a_row
    assert refused(tables=[tf.Variable(tf.zeros([12]))]) == a_row
    assert refused(gradients=[tf.zeros([6])]) == a_row
    assert refused(row_weights=[weights[:3]]) == "each row of a table must have its weight"
    assert refused(tables=[tf.Variable(tf.zeros([4, 3], tf.float64))]) == "a variable must be of float32"
    twice = refused(tables=[table, tf.Variable(table)], row_ids=[ids] * 2, row_weights=[weights] * 2)
    assert twice == "what is penalised must be among the gradients of rows"


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
