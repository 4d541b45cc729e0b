import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.data.hashing import hash64, place_in_random_order
from din_dist.execution import Execution
from tests.support.splitmix import splitmix


def test_the_published_first_number_of_splitmix():
    """SplitMix64 of seed 0 begins with 0xE220A8397B1DCDAF."""
    assert int(hash64(0).numpy()) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize(
    "parts",
    [(1,), (-1,), (2**63, 2**64 - 1), (1234, 1, 0, 198_501, 4), (0, 0), (-(2**63), 2**63 - 1)],
    ids=str,
)
def test_equals_the_fold_in_plain_python(parts):
    """As Python integers and, where they fit, as int64 tensors; and by the kernel, of vectors."""
    assert int(hash64(*parts).numpy()) == splitmix(*parts)
    first, *others = parts
    vector = tf.constant(np.array([first, 5], np.int64 if first < 0 else np.uint64))
    expected = [splitmix(*parts), splitmix(5, *others)]
    assert hash64(vector, *others, execution=Execution(kernels=True)).numpy().tolist() == expected
    if all(-(2**63) <= part < 2**63 for part in parts):
        assert int(hash64(*(tf.constant(part, tf.int64) for part in parts)).numpy()) == splitmix(*parts)


def test_parts_broadcast_and_a_graph_gives_the_same():
    events, draws = tf.constant([[5], [-6]], tf.int64), tf.constant([0, 1, 2], tf.int32)
    expected = [[splitmix(9, event, draw) for draw in (0, 1, 2)] for event in (5, -6)]
    hashed = hash64(9, events, draws)
    assert hashed.dtype == tf.uint64
    assert_array_equal(hashed, np.array(expected, np.uint64))
    assert_array_equal(tf.function(hash64)(9, events, draws), hashed)


def test_the_order_and_number_of_parts_count():
    assert len({int(hash64(*parts).numpy()) for parts in ((1, 2), (2, 1), (1,), (1, 2, 0), (3,))}) == 5


def test_every_bit_is_even_and_follows_every_bit_of_the_part():
    """Of 65,536 consecutive numbers, each bit is set in half; flipping any bit flips each bit half of the time."""
    numbers = tf.range(65_536, dtype=tf.int64)

    def bits(hashed):
        return np.unpackbits(hashed.numpy().view(np.uint8).reshape(-1, 8), axis=1)

    original = bits(hash64(7, numbers))
    assert_allclose(original.mean(axis=0), 0.5, atol=0.012)  # six standard deviations
    for bit in (0, 15, 16, 31, 32, 62):
        flipped = bits(hash64(7, tf.bitwise.bitwise_xor(numbers, tf.constant(1 << bit, tf.int64))))
        assert_allclose((original != flipped).mean(axis=0), 0.5, atol=0.02)


@pytest.mark.parametrize("end", [1, 2, 3, 4, 5, 16, 17, 100])
def test_a_random_order_has_every_place_once_for_each_key(end):
    """Also of fewer places than the largest; another key, another order."""
    for largest in (end, 3 * end):
        places, keys = np.tile(np.arange(end), 3), np.repeat([5, 6, 2**62], end)
        found = place_in_random_order(
            tf.constant(places, tf.int64), tf.constant(end, tf.int64), largest, tf.constant(keys, tf.int64), 1
        )
        orders = found.numpy().reshape(3, end)
        assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(end), (3, 1)))
        if end >= 16:
            assert len({tuple(order) for order in orders.tolist()}) == 3


@pytest.mark.parametrize("end", [3, 7, 16])
def test_over_many_keys_each_pair_of_first_places_is_as_frequent(end):
    """To five standard deviations."""
    num_keys = 1000 * end * end
    keys = tf.range(num_keys, dtype=tf.int64)
    first, second = (
        place_in_random_order(tf.fill([num_keys], tf.constant(place, tf.int64)), tf.constant(end, tf.int64), end, keys)
        for place in (0, 1)
    )
    counts = np.bincount((first * end + second).numpy(), minlength=end * end).reshape(end, end)
    expected = num_keys / (end * (end - 1))
    assert_array_equal(np.diag(counts), 0)
    assert np.abs(counts[~np.eye(end, dtype=bool)] - expected).max() < 5 * np.sqrt(expected)
