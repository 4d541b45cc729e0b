import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

from din_dist.features.spec import Owner
from din_dist.layers.local_lookup import LocalLookup
from din_dist.schema import TableSpec
from tests.support.reference.compare import ITEM_FEATURES, RandomFeatures

CATEGORY_OF = np.array([0, 1, 2, 2], np.int32)  # of items 0 to 3


@pytest.fixture
def lookup():
    """Item i is [10 i, 10 i + 1], category c is [-c], the bias of item i is i / 10."""
    layer = LocalLookup([TableSpec("item", 4, 2), TableSpec("category", 3, 1)], {"category": CATEGORY_OF})
    items = np.arange(4.0)[:, None]
    layer.tables[0].assign(10 * items + [0.0, 1.0])
    layer.tables[1].assign(-np.arange(3.0)[:, None])
    layer.item_bias.assign(items / 10)
    return layer


def test_vectors_with_the_embedding_of_the_feature_at_their_side(lookup):
    vectors, biases = lookup(tf.constant([3, 1, 2]))
    assert_array_equal(vectors, [[30, 31, -2], [10, 11, -1], [20, 21, -2]])
    assert_array_equal(biases, np.float32([0.3, 0.1, 0.2]))
    assert lookup.width == 3


def test_rows_and_features_apart(lookup):
    """Of an item with its id hidden, or with another category than its own; any of them twice."""
    vectors, biases = lookup.rows(tf.constant([0, 3, 0]), [tf.constant([2, 1, 2])])
    assert_array_equal(vectors, [[0, 1, -2], [30, 31, -1], [0, 1, -2]])
    assert_array_equal(biases, np.float32([0, 0.3, 0]))


def test_a_batch_of_one_and_of_none_and_no_features():
    lookup = LocalLookup([TableSpec("item", 4, 2)], {})
    for num_items in (0, 1):
        vectors, biases = lookup(tf.zeros([num_items], tf.int32))
        assert vectors.shape == (num_items, 2)
        assert biases.shape == (num_items,)


def test_gradients_name_no_row_twice(lookup):
    """Items 3 and 2, with weights 5 and 2, are both of category 2, which gets one row of their sum."""
    with tf.GradientTape() as tape:
        vectors, biases = lookup(tf.constant([3, 2]))
        total = tf.reduce_sum(vectors * tf.constant([[5.0], [2.0]])) + 10 * tf.reduce_sum(biases)
    tables = [table.value for table in (*lookup.tables, lookup.item_bias)]
    items, categories, biases = tape.gradient(total, tables)
    assert_array_equal(items.indices, [3, 2])
    assert_array_equal(items.values, [[5, 5], [2, 2]])
    assert_array_equal(categories.indices, [2])
    assert_array_equal(categories.values, [[7]])
    assert_array_equal(biases.indices, [3, 2])
    assert_array_equal(biases.values, [[10], [10]])


@pytest.fixture
def sharing(lookup):
    """The same with item 2 in row 0."""
    layer = LocalLookup(lookup.specs, {"category": CATEGORY_OF}, row_of_item=np.array([0, 1, 0, 3], np.int32))
    for weight, value in zip(layer.weights, lookup.weights, strict=True):
        weight.assign(value + 1.0)  # no row of zeros
    return layer


def test_items_without_a_row_and_hidden_ids_are_row_0_with_their_features(sharing):
    vectors, biases = sharing(tf.constant([3, 2, -3, -1, 0]))
    assert_array_equal(vectors, [[31, 32, -1], [1, 2, -1], [1, 2, -1], [1, 2, 0], [1, 2, 1]])
    assert_array_equal(biases, np.float32([1.3, 1, 1, 1, 1]))


def test_gradients_of_shared_rows_name_no_row_twice(sharing):
    """Items 2 and -1 are both of row 0; 1 and -1 of category 1."""
    with tf.GradientTape() as tape:
        vectors, biases = sharing(tf.constant([2, 1, -1]))
        weights = tf.constant([[5.0], [2.0], [1.0]])
        total = tf.reduce_sum(vectors * weights) + 10 * tf.reduce_sum(biases * weights[:, 0])
    tables = [table.value for table in (*sharing.tables, sharing.item_bias)]
    items, categories, biases = tape.gradient(total, tables)
    assert_array_equal(items.indices, [0, 1])
    assert_array_equal(items.values, [[6, 6], [2, 2]])
    assert_array_equal(categories.indices, [2, 1])
    assert_array_equal(categories.values, [[5], [3]])
    assert_array_equal(biases.indices, [0, 1])
    assert_array_equal(biases.values, [[60], [20]])


def test_what_has_no_known_id(lookup, sharing):
    """A hidden id is known; that of item 2 has no row where it shares that of unknown ones."""
    assert_array_equal(lookup.unknown(tf.constant([3, 2, 0])), [[False, False, True], [False, False, True]])
    unknown = sharing.unknown(tf.constant([3, 2, 0, -3]))
    assert_array_equal(unknown, [[False, True, True, False], [False, False, True, False]])


def test_rows_that_are_all_their_own_change_nothing(lookup):
    """Vectors, biases and gradients to the bit, in the same order."""
    other = LocalLookup(lookup.specs, {"category": CATEGORY_OF}, row_of_item=np.arange(4, dtype=np.int32))
    values = np.random.default_rng(0).normal(size=(4, 2))
    found = []
    for layer in (lookup, other):
        layer.tables[0].assign(values)
        layer.tables[1].assign(values[:3, :1])
        layer.item_bias.assign(values[:, :1])
        with tf.GradientTape() as tape:
            vectors, biases = layer(tf.constant([2, 3, 1]))
            total = tf.reduce_sum(vectors**2) + tf.reduce_sum(biases**3)
        tables = [table.value for table in (*layer.tables, layer.item_bias)]
        gradients = tape.gradient(total, tables)
        found.append([vectors, biases, *(part for g in gradients for part in (g.indices, g.values))])
    for one, same in zip(*found, strict=True):
        assert_array_equal(same, one)


def test_tables_start_by_the_seed_and_apart():
    """Tables of one shape as well; biases start at zero."""

    def tables(seed):
        specs = [TableSpec("item", 4, 2), TableSpec("category", 4, 2)]
        lookup = LocalLookup(specs, {"category": CATEGORY_OF}, seed=seed)
        assert_array_equal(lookup.item_bias, np.zeros((4, 1)))
        return np.stack([table.numpy() for table in lookup.tables])

    assert_array_equal(tables(1), tables(1))
    assert np.abs(tables(1) - tables(5)).max() > 0.01
    item, category = tables(1)
    assert np.abs(item - category).max() > 0.01


@pytest.mark.parametrize("row_of_item", [None, np.array([0, 1, 0, 3], np.int32)])
def test_config_round_trip(row_of_item):
    layer = LocalLookup(
        [TableSpec("item", 4, 2), TableSpec("category", 3, 1)], {"category": CATEGORY_OF}, 7, row_of_item, name="lookup"
    )
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert again.specs == layer.specs
    items = tf.constant([3, 1, 2])
    for found, expected in zip(again(items), layer(items), strict=True):  # the same seed gives the same weights
        assert_array_equal(found, expected)


def test_item_features_extend_the_vector_and_survive_the_config():
    """Features of every form, for items of which one is hidden; the numbers are those of `FeatureColumns`."""
    features = RandomFeatures((Owner.ITEM,))
    tables = [TableSpec("item", 13, 2), TableSpec("category", 5, 1)]
    layer = LocalLookup(tables, ITEM_FEATURES, 7, np.arange(13, dtype=np.int32), features.stored, name="lookup")
    items = tf.constant([3, -1, 12])
    vectors, _ = layer(items)
    assert vectors.shape[1] == layer.width == 3 + layer.columns.width
    assert_array_equal(vectors[:, 3:], layer.columns(layer.feature_values(items)))
    assert_array_equal(layer(tf.abs(items))[0][:, 3:], vectors[:, 3:])
    with_ids = ["item", "category", "item_category", "item_trained"]
    assert [spec.name for spec in layer.specs_of_ids] == with_ids
    assert layer.unknown(items).shape == (len(with_ids), 3)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert [weight.path for weight in again.weights] == [weight.path for weight in layer.weights]
    assert_array_equal(again(items)[0], vectors)
