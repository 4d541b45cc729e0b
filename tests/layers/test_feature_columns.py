"""Columns of features: each form by hand, and lists of one element against a category."""

from __future__ import annotations

import dataclasses
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.execution import Execution, Mode
from din_dist.features.encoding import Encoding, Lists
from din_dist.features.spec import Encode, FeatureSpec, Kind, Owner, Pooling
from din_dist.layers.feature_columns import FeatureColumns

MODES = {"plain": Mode(training=True), "native": Mode(training=True, execution=Execution(kernels=True))}
ROWS = np.array([[0.5, 0.25], [1, 2], [3, 4], [5, 6]], np.float32)
LISTS = Lists(tf.constant([1, 2, 2, 3]), tf.constant([2, 0, 2]), tf.constant([1.0, 10.0, 100.0, -1.0]))

pytestmark = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def columns_of(kind: Kind, num_rows: int = 0, dimension: int = 0, **spec: object) -> FeatureColumns:
    encoding = Encoding(FeatureSpec("f", Owner.USER, kind, **spec), num_rows, dimension)
    return FeatureColumns([encoding], 2, name="features")


def test_ids(mode):
    columns = columns_of(Kind.CATEGORY, 4)
    columns.tables[0].assign(ROWS)
    with tf.GradientTape() as tape:
        found = columns({"f": tf.constant([2, 0, 2])}, mode=mode)
        total = tf.reduce_sum(found * [[1.0], [10.0], [100.0]])
    assert_array_equal(found, ROWS[[2, 0, 2]])
    gradient = tape.gradient(total, columns.tables[0].value)
    assert_array_equal(gradient.indices, [2, 0])  # each row once
    assert_array_equal(gradient.values, [[101, 101], [10, 10]])


@pytest.mark.parametrize(
    ("pool", "expected", "weights"),
    [
        (Pooling.MEAN, [[2, 3], [0, 0], [4, 5]], [[0.5, 0.5], [0, 0]]),
        (Pooling.SUM, [[4, 6], [0, 0], [8, 10]], [[1, 1], [0, 0]]),
        (Pooling.WEIGHTED, [[31, 42], [0, 0], [295, 394]], [[1, 10], [0, 0]]),
    ],
)
def test_lists(mode, pool, expected, weights):
    """The lists [1, 2], [] and [2, 3]; row 2 is gathered once."""
    columns = columns_of(Kind.CATEGORIES, 4, pool=pool)
    columns.tables[0].assign(ROWS)
    with tf.GradientTape() as tape:
        found = columns({"f": LISTS}, mode=mode)
        total = tf.reduce_sum(found * [[1.0], [0.0], [0.0]])
    assert_array_equal(found, expected)
    gradient = tape.gradient(total, columns.tables[0].value)
    assert_array_equal(gradient.indices, [1, 2, 3])
    assert_array_equal(gradient.values[:, 0], [*weights[0], 0])


@pytest.mark.parametrize("pool", Pooling)
def test_lists_of_one_element_equal_a_category_bit_for_bit(mode, pool):
    ids = tf.constant(np.random.default_rng(0).integers(0, 50, 200), tf.int32)
    lists = Lists(ids, tf.ones_like(ids), tf.ones([200]) if pool is Pooling.WEIGHTED else tf.zeros([0]))
    upstream = tf.constant(np.random.default_rng(1).normal(size=(200, 2)), tf.float32)
    results = []
    for columns, values in (
        (columns_of(Kind.CATEGORY, 50), ids),
        (columns_of(Kind.CATEGORIES, 50, pool=pool, weights="w"), lists),
    ):
        with tf.GradientTape() as tape:
            found = columns({"f": values}, mode=mode)
            total = tf.reduce_sum(found * upstream)
        results.append((found.numpy(), tape.gradient(total, columns.tables[0].value)))
    (category, of_category), (pooled, of_lists) = results
    assert_array_equal(pooled, category)
    assert_array_equal(of_lists.indices, of_category.indices)
    assert_array_equal(of_lists.values, of_category.values)


def test_numbers(mode):
    found = columns_of(Kind.NUMBER)({"f": tf.constant([1.5, np.nan])}, mode=mode)
    assert_array_equal(found, [[1.5, 0], [0, 1]])


def test_projected_numbers(mode):
    columns = columns_of(Kind.NUMBER, width=2)
    columns.projections["f"].kernel.assign([[2.0, 3.0], [10.0, 20.0]])
    columns.projections["f"].bias.assign([0.5, 0.0])
    assert_array_equal(columns({"f": tf.constant([1.5, np.nan])}, mode=mode), [[3.5, 4.5], [10.5, 20]])


def test_periodic_numbers(mode):
    """A missing number is 0, whose cosine is 1, with its indicator."""
    columns = columns_of(Kind.NUMBER, encode=Encode.parse("periodic:2,0.1"))
    assert np.abs(columns.frequencies["f"]).max() < 1
    columns.frequencies["f"].assign([0.25, 0.5])
    with tf.GradientTape() as tape:
        found = columns({"f": tf.constant([1.0, np.nan])}, mode=mode)
        total = tf.reduce_sum(found[:, :2])
    assert_allclose(found, [[1, 0, 0, -1, 0], [0, 0, 1, 1, 1]], atol=1e-6)
    assert_allclose(tape.gradient(total, columns.frequencies["f"].value), [0, -2 * math.pi], atol=1e-5)


def test_vectors(mode):
    columns = columns_of(Kind.VECTOR, dimension=2)
    columns.projections["f"].kernel.assign([[1.0, 0.0], [0.0, 2.0], [7.0, 8.0]])
    columns.projections["f"].bias.assign([0.0, 0.5])
    values = tf.constant([[1.5, -1.0], [np.nan, np.nan]], tf.float16)
    assert_array_equal(columns({"f": values}, mode=mode), [[1.5, -1.5], [7, 8.5]])
    assert not columns.tables


def test_trained_vectors_start_as_they_are(mode):
    spec = FeatureSpec("f", Owner.USER, Kind.VECTOR, trained=True)
    start = np.array([[0, 0, 0], [1, 2, 3]], np.float16)
    encoding = Encoding(spec, num_rows=2, dimension=3)
    columns = FeatureColumns([encoding], 3, starts={"f": start}, name="features")
    assert_array_equal(columns({"f": tf.constant([1, 0])}, mode=mode), start[[1, 0]])
    narrow = FeatureColumns([encoding], 2, starts={"f": start}, name="features")
    narrow.projections["f"].kernel.assign([[1.0, 0], [1.0, 0], [0, 1.0]])
    assert_array_equal(narrow({"f": tf.constant([1, 0])}, mode=mode), [[3, 3], [0, 0]])


def test_all_forms_of_no_rows_and_of_missing_ones(mode):
    specs = [
        FeatureSpec("ids", Owner.USER, Kind.CATEGORY),
        FeatureSpec("lists", Owner.USER, Kind.CATEGORIES),
        FeatureSpec("number", Owner.CONTEXT, Kind.NUMBER),
        FeatureSpec("vector", Owner.CANDIDATE, Kind.VECTOR, width=4),
    ]
    columns = FeatureColumns([Encoding(spec, num_rows=3, dimension=5) for spec in specs], 2, name="features")
    assert columns.width == 2 + 2 + 2 + 4
    for num_rows in (0, 3):
        found = columns(columns.missing(num_rows), mode=mode)
        assert found.shape == (num_rows, columns.width)
    assert_array_equal(found[:, 2:4], [[0, 0]] * 3)
    assert_array_equal(found[:, 4:6], [[0, 1]] * 3)
    assert columns(columns.missing(3), mode=mode, owners=(Owner.CANDIDATE,)).shape == (3, 4)


def test_configuration_survives(mode):
    columns = columns_of(Kind.NUMBER, encode=Encode.parse("periodic:2,0.1"), width=3)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(columns))
    assert again.encodings == columns.encodings
    assert [weight.path for weight in again.weights] == [weight.path for weight in columns.weights]
    again.set_weights(columns.get_weights())
    values = {"f": tf.constant([1.0, np.nan])}
    assert_array_equal(again(values, mode=mode), columns(values, mode=mode))


def test_no_two_weights_start_equal(mode):
    spec = FeatureSpec("a", Owner.USER, Kind.CATEGORY)
    encodings = [Encoding(dataclasses.replace(spec, name=name), num_rows=5) for name in "abc"]
    tables = FeatureColumns(encodings, 2, name="features").tables
    assert len({table.numpy().tobytes() for table in tables}) == 3
