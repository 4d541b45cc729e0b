"""Attention by products: it is Keras' own attention on padded arrays with a mask, and DIN takes it in every form."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.config import AttentionKind
from din_dist.layers.dot_product_attention import DotProductAttention
from din_dist.layers.pairs import Pairs
from tests.support.reference.compare import (
    FORMS,
    RAGGED,
    assert_same_gradients,
    loss_and_gradients,
    packed,
    padded_batch,
    small_model,
)

LENGTHS = [3, 0, 1, 5]
WIDTH = 4


@pytest.fixture
def arrays() -> tuple[tf.Tensor, tf.Tensor, Pairs]:
    """Candidates `[4, 4]`, behaviours `[6, 4]` and pairs, in which behaviours repeat."""
    random = np.random.default_rng(0)
    candidates = tf.constant(random.normal(size=(4, WIDTH)), tf.float32)
    behaviours = tf.constant(random.normal(size=(6, WIDTH)), tf.float32)
    behaviour_of = tf.constant(random.integers(0, 6, sum(LENGTHS)), tf.int32)
    return candidates, behaviours, Pairs(tf.repeat(tf.range(4), LENGTHS), behaviour_of)


def by_keras(candidates: tf.Tensor, behaviours: tf.Tensor, pairs: Pairs) -> tf.Tensor:
    """Returns what `keras.layers.Attention` pools, `[4, 4]`; the row of an empty history means nothing."""
    rows = tf.RaggedTensor.from_row_lengths(tf.gather(behaviours, pairs.behaviour_of), LENGTHS)
    mask = tf.sequence_mask(LENGTHS)
    padded = rows.to_tensor()
    found = keras.layers.Attention()([candidates[:, None], padded], mask=[None, mask])
    return found[:, 0]


def test_it_is_keras_attention_with_a_mask(arrays: tuple[tf.Tensor, tf.Tensor, Pairs]) -> None:
    candidates, behaviours, pairs = arrays
    unit = DotProductAttention()
    real = np.array(LENGTHS) > 0
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([candidates, behaviours])
        found, expected = unit(candidates, behaviours, pairs), by_keras(candidates, behaviours, pairs)
        ours, theirs = (tf.reduce_sum(tf.boolean_mask(pooled, real) ** 2) for pooled in (found, expected))
    assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-6)
    assert_array_equal(found[1], np.zeros(WIDTH))
    for source in (candidates, behaviours):
        of_ours, of_theirs = (tf.convert_to_tensor(tape.gradient(loss, source)) for loss in (ours, theirs))
        assert_allclose(of_ours, of_theirs, rtol=1e-4, atol=1e-5)
    weights = unit.weights_of_pairs(candidates, behaviours, pairs)
    sums = tf.math.unsorted_segment_sum(weights, pairs.candidate_of, 4)
    assert_allclose(sums, real.astype(float), rtol=1e-6)


def test_side_information_is_pooled_and_changes_no_weight(arrays: tuple[tf.Tensor, tf.Tensor, Pairs]) -> None:
    candidates, behaviours, pairs = arrays
    sides = tf.constant([[1.0, 2.0], [3.0, 5.0]])
    with_sides = pairs._replace(side_of=tf.constant([0, 1, 0, 1, 0, 1, 0, 1, 0]))
    unit = DotProductAttention(side_width=2)
    found = unit(candidates, behaviours, with_sides, sides=sides)
    assert found.shape == (4, WIDTH + 2)
    assert_allclose(found[:, :WIDTH], DotProductAttention()(candidates, behaviours, pairs), rtol=1e-6)
    assert_allclose(found[2, WIDTH:], sides[1], rtol=1e-6)  # of its only behaviour


def test_its_config_makes_it_again() -> None:
    assert DotProductAttention.from_config(DotProductAttention(side_width=3).get_config()).side_width == 3


@pytest.mark.parametrize("form", [name for name in FORMS if name != "plain"])
def test_din_learns_the_same_in_every_form(form: str) -> None:
    batch = packed(padded_batch(RAGGED))
    plain = small_model(attention=AttentionKind.DOT)
    assert not any("attention" in weight.path for weight in plain.weights)
    expected = loss_and_gradients(plain, batch, training=True)
    other = small_model(attention=AttentionKind.DOT, **FORMS[form])
    found = loss_and_gradients(other, batch, training=True)
    assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert_same_gradients(found[2], expected[2])
