import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.execution import TRAINING, Mode
from din_dist.layers.keyed_dropout import KeyedDropout

RANDOM_KEYS = np.random.default_rng(0).integers(-(2**63), 2**63, 4096)
UNITS = 64


def kept(keys, rate=0.5, stream=0):
    """Which of the units of each key are kept: bool `[len(keys), UNITS]`."""
    layer = KeyedDropout(rate, stream)
    return layer(tf.ones([len(keys), UNITS]), tf.constant(keys, tf.int64), mode=TRAINING).numpy() > 0


def test_kept_units_are_scaled_and_the_rest_are_zero():
    """By 1 / (1 - 3/4) = 4, in the gradient too; expectations stay."""
    inputs = tf.constant(np.arange(1.0, 1 + 64 * UNITS).reshape(64, UNITS), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = KeyedDropout(0.75)(inputs, tf.constant(RANDOM_KEYS[:64]), mode=TRAINING)
    mask = kept(RANDOM_KEYS[:64], 0.75)
    assert_allclose(outputs, np.where(mask, 4 * inputs, 0))
    assert_allclose(tape.gradient(outputs, inputs), 4.0 * mask)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_nothing_is_left_out_in_inference_or_at_rate_zero(rate):
    inputs = tf.ones([2, 3])
    assert_array_equal(KeyedDropout(rate)(inputs, None, mode=Mode(rate == 0.0)), inputs)


def test_training_needs_keys():
    with pytest.raises(ValueError, match="Pass dropout_seeds in training"):
        KeyedDropout(0.5)(tf.ones([2, 3]), None, mode=TRAINING)


@pytest.mark.parametrize("keys", [RANDOM_KEYS, np.arange(4096)], ids=["random", "consecutive"])
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
def test_the_share_left_out_is_the_rate(rate, keys):
    """Over all, in each unit, and in each example, to 6 standard deviations of independent draws."""
    left_out = ~kept(keys, rate)
    for axis, draws in ((None, left_out.size), (0, len(keys)), (1, UNITS)):
        shares = left_out.mean(axis=axis)
        assert np.abs(shares - rate).max() < 6 * np.sqrt(rate * (1 - rate) / draws)


def test_a_mask_belongs_to_its_key():
    """However the batch is split or ordered, and whoever else is in it."""
    order = np.random.default_rng(1).permutation(len(RANDOM_KEYS))
    together = kept(RANDOM_KEYS)
    assert_array_equal(kept(RANDOM_KEYS[order]), together[order])
    assert_array_equal(np.concatenate([kept(share) for share in np.split(RANDOM_KEYS, [1, 1, 7])]), together)
    assert kept([]).shape == (0, UNITS)


@pytest.mark.parametrize("low", [0, 1, 2**32 - 1, 2**40], ids=lambda low: f"{low:x}")
def test_other_keys_have_other_masks(low):
    """Keys that differ by one bit, anywhere in the 64, agree by chance only: in half of the units at rate 1/2."""
    flipped = np.uint64(low) ^ (np.uint64(1) << np.arange(64, dtype=np.uint64))
    agreement = (kept(flipped.view(np.int64)) == kept([low])).mean(axis=1)
    assert_allclose(agreement.mean(), 0.5, atol=0.05)
    assert agreement.max() < 0.85


def test_streams_and_units_draw_apart():
    mask = kept(RANDOM_KEYS)
    for other in (kept(RANDOM_KEYS, stream=1), np.roll(mask, 1, axis=1), np.roll(mask, 1, axis=0)):
        assert_allclose(np.mean(mask == other), 0.5, atol=0.01)


def test_config_round_trip():
    again = KeyedDropout.from_config(KeyedDropout(0.3, stream=2, name="dropout").get_config())
    assert (again.rate, again.stream, again.name) == (0.3, 2, "dropout")
