import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

from din_dist.layers.local_lookup import LocalLookup
from din_dist.schema import TableSpec

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


def test_distinct_vectors_with_the_embedding_of_the_feature_at_their_side(lookup):
    vectors, places = lookup(tf.constant([3, 1, 3, 0]))
    assert_array_equal(vectors, [[30, 31, -2], [10, 11, -1], [0, 1, 0]])
    assert_array_equal(places, [0, 1, 0, 2])
    assert lookup.width == 3


def test_bias(lookup):
    assert_array_equal(lookup.bias(tf.constant([3, 1, 3])), np.float32([0.3, 0.1, 0.3]))
    for num_items in (0, 1):  # a batch of one stays a batch
        assert lookup.bias(tf.zeros([num_items], tf.int32)).shape == (num_items,)


def test_gradients_are_rows_of_the_distinct_items(lookup):
    """Item 3 stands at two places with weights 1 and 4: its row gets 5, item 2's gets 2, item 0 and 1 have no row.

    Both are of category 2, which gets a row from each.
    """
    with tf.GradientTape() as tape:
        vectors, places = lookup(tf.constant([3, 2, 3]))
        total = tf.reduce_sum(tf.gather(vectors, places) * tf.constant([[1.0], [2.0], [4.0]]))
    items, categories = tape.gradient(total, [table.value for table in lookup.tables])
    assert_array_equal(items.indices, [3, 2])
    assert_array_equal(items.values, [[5, 5], [2, 2]])
    assert_array_equal(categories.indices, [2, 2])
    assert_array_equal(categories.values, [[5], [2]])


def test_the_gradient_of_the_bias_is_rows(lookup):
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(lookup.bias(tf.constant([3, 1, 3])))
    gradient = tape.gradient(total, lookup.item_bias.value)
    assert_array_equal(tf.math.unsorted_segment_sum(gradient.values, gradient.indices, 4), [[0], [1], [0], [2]])
    assert isinstance(gradient, tf.IndexedSlices)


def test_no_items_and_no_features():
    lookup = LocalLookup([TableSpec("item", 4, 2)], {})
    vectors, places = lookup(tf.zeros([0], tf.int32))
    assert vectors.shape == (0, 2)
    assert places.shape == (0,)
    assert lookup.width == 2


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
