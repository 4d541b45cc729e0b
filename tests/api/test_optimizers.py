"""Lazy Adam as an optimizer of Keras: the formula in float64, the trainer's own, and rows that stay to the bit."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

import din_dist
from din_dist.config import OptimizerConfig
from din_dist.distributed.row_transports import RowGradients
from din_dist.execution import Execution
from din_dist.training.optimizers import make_optimizer

NUM_ROWS, WIDTH = 6, 3
ROWS_OF_STEP = [[4, 1], [1, 1], [], [0, 4, 1, 0], [2]]  # rows 3 and 5 never, some twice


class Reference:
    """Adam on whole float64 arrays, of which each step changes some rows."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.first, self.second = values.copy(), np.zeros(values.shape), np.zeros(values.shape)

    def change(self, rows: np.ndarray, gradient: np.ndarray, rate: float, step: int) -> None:
        self.first[rows] = 0.9 * self.first[rows] + 0.1 * gradient
        self.second[rows] = 0.999 * self.second[rows] + 0.001 * gradient**2
        rate *= np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        self.values[rows] -= rate * self.first[rows] / (np.sqrt(self.second[rows]) + 1e-7)


def steps():
    """Yields the gradient of a dense variable, and the rows of a table with theirs, of each step."""
    random = np.random.default_rng(1)
    for rows in ROWS_OF_STEP:
        yield random.normal(size=(NUM_ROWS, WIDTH)), rows, random.normal(size=(len(rows), WIDTH))


def summed(rows: list[int], gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each row once, with the sum of its gradients."""
    distinct = np.unique(rows).astype(int)
    found = [gradient[[place for place, own in enumerate(rows) if own == row]].sum(axis=0) for row in distinct]
    return distinct, np.array(found).reshape(len(distinct), WIDTH)


def slices(rows: list[int], gradient: np.ndarray) -> tf.IndexedSlices:
    values = tf.constant(gradient, tf.float32)
    return tf.IndexedSlices(values, tf.constant(rows, tf.int32), tf.constant([NUM_ROWS, WIDTH]))


def first_values() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(NUM_ROWS, WIDTH)), random.normal(size=(NUM_ROWS, WIDTH))


def test_steps_equal_the_reference_and_other_rows_stay_to_the_bit() -> None:
    dense, table = (keras.Variable(values, dtype="float32") for values in first_values())
    optimizer = din_dist.LazyAdam(0.02)
    optimizer.build([dense, table])
    of_dense, of_table = map(Reference, first_values())
    moments = [variable for variable in optimizer.variables if variable.shape == (NUM_ROWS, WIDTH)]
    of_rows = [table, *moments[1::2]]  # both moments stand in the order of the variables
    assert len(of_rows) == 3
    for step, (whole, rows, some) in enumerate(steps(), start=1):
        before = [values.numpy() for values in of_rows]
        optimizer.apply([tf.constant(whole, tf.float32), slices(rows, some)])
        of_dense.change(np.arange(NUM_ROWS), whole, 0.02, step)
        of_table.change(*summed(rows, some), 0.02, step)
        assert_allclose(dense, of_dense.values, rtol=1e-5, atol=1e-6)
        assert_allclose(table, of_table.values, rtol=1e-5, atol=1e-6)
        others = [row for row in range(NUM_ROWS) if row not in rows]
        for values, old in zip(of_rows, before, strict=True):
            assert_array_equal(values.numpy()[others], old[others])


def test_steps_equal_those_of_the_trainer() -> None:
    ours = [keras.Variable(values, dtype="float32") for values in first_values()]
    theirs = [tf.Variable(values, dtype=tf.float32) for values in first_values()]
    optimizer = din_dist.LazyAdam(0.05)
    trained = make_optimizer(OptimizerConfig(), theirs, ["dense", "table"], ["table"], Execution())
    for step, (whole, rows, some) in enumerate(steps(), start=1):
        optimizer.apply([tf.constant(whole, tf.float32), slices(rows, some)], ours)
        distinct, sums = summed(rows, some)
        sparse = RowGradients(tf.constant(distinct, tf.int32), tf.constant(sums, tf.float32))
        gradients = [tf.constant(whole, tf.float32), sparse]
        trained.apply(gradients, trained.values_of(gradients), tf.constant(0.05), tf.constant(step, tf.int64))
        for one, other in zip(ours, theirs, strict=True):
            assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_a_schedule_and_clipping() -> None:
    """The rate halves at each step. A gradient of norm 5 is clipped to 1; a row that stands twice counts once."""
    dense, table = (keras.Variable(np.zeros((rows, 2)), dtype="float32") for rows in (1, 2))
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    optimizer = din_dist.LazyAdam(schedule, global_clipnorm=1.0)
    of_dense, of_table = Reference(np.zeros((1, 2))), Reference(np.zeros((2, 2)))
    for step in (1, 2):
        # Norm of the dense gradient 3, of row 1 in all 4.
        twice = tf.IndexedSlices(tf.constant([[0.0, 1.0], [0.0, 3.0]]), tf.constant([1, 1]), tf.constant([2, 2]))
        optimizer.apply([tf.constant([[3.0, 0.0]]), twice], [dense, table])
        rate = 0.1 * 0.5 ** (step - 1)
        of_dense.change(np.array([0]), np.array([[0.6, 0.0]]), rate, step)
        of_table.change(np.array([1]), np.array([[0.0, 0.8]]), rate, step)
    assert_allclose(dense, of_dense.values, rtol=1e-5)
    assert_allclose(table, of_table.values, rtol=1e-5)


def test_rows_of_a_fit_stay_to_the_bit() -> None:
    model = din_dist.DIN(50, embedding_dim=4)
    model.compile()
    table = model.core.lookup.tables[0]
    before = table.numpy()
    inputs = {"candidate_item_ids": np.array([1, 2, 3, 4]), "history_item_ids": np.array([[5, 6]] * 4)}
    model.fit(inputs, np.array([0.0, 1.0, 0.0, 1.0]), epochs=3, verbose=0)
    changed = (table.numpy() != before).any(axis=1)
    assert_array_equal(np.flatnonzero(changed), [1, 2, 3, 4, 5, 6])


def test_the_configuration_makes_it_again() -> None:
    optimizer = din_dist.LazyAdam(keras.optimizers.schedules.ExponentialDecay(0.1, 7, 0.5), 5.0, "mine")
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert isinstance(again, din_dist.LazyAdam)
    assert again.get_config() == optimizer.get_config()
    assert again.name == "mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": 0.1}, "LazyAdam: takes learning_rate, global_clipnorm and name. Received: 'weight_decay'."),
        ({"use_ema": True}, "LazyAdam: takes learning_rate, global_clipnorm and name. Received: 'use_ema'."),
        ({"global_clipnorm": 0.0}, "global_clipnorm: must be above 0, or None. Received: 0.0."),
    ],
)
def test_settings_that_change_every_row_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(din_dist.InputError) as error:
        din_dist.LazyAdam(**settings)
    assert str(error.value).startswith(message)
