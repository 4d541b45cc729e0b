import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from din_dist.data.hashing import hash64
from din_dist.data.negatives import distinct_untouched_items, untouched_items
from din_dist.execution import Execution

NUM_ITEMS = 9


def draw(touched, users, random, num_items=NUM_ITEMS):
    """The negatives of `users` for numbers `random`, where user u touched the ids (from 1) `touched[u]`.

    By TensorFlow's operations and by our kernel.
    """
    gaps = [item - 1 - place for items in touched for place, item in enumerate(sorted(items))]
    offsets = np.cumsum([0, *(len(items) for items in touched)])
    users = np.array(users)
    theirs, ours = (
        untouched_items(
            tf.constant(random, tf.uint64),
            tf.constant(offsets[users], tf.int64),
            tf.constant(offsets[users + 1], tf.int64),
            tf.constant(gaps, tf.int32),
            num_items,
            num_halvings=int(max(len(items) for items in touched)).bit_length(),
            execution=Execution(kernels=native),
        ).numpy()
        for native in (False, True)
    )
    assert_array_equal(ours, theirs)
    assert ours.dtype == theirs.dtype
    return ours


def test_by_hand():
    """Of items 1 to 5 the user touched 1 and 3: 2, 4, 5 are left, for numbers 0, 1, 2, and 3 again for the first."""
    assert_array_equal(draw([{1, 3}], [0, 0, 0, 0], [0, 1, 2, 3], num_items=5), [2, 4, 5, 2])


@given(st.lists(st.sets(st.integers(1, NUM_ITEMS), max_size=NUM_ITEMS - 1), min_size=1, max_size=5).filter(any))
@example([set(), {1}, set()])  # nothing touched, before, between and after
@example([set(range(2, NUM_ITEMS + 1))])  # only the first item is left
@example([set(range(1, NUM_ITEMS)), {9}])  # only the last
@example([{4}, set(range(1, NUM_ITEMS + 1)) - {5}, {1, 9}])  # one in the middle, between other users
@settings(max_examples=60, deadline=None, derandomize=True)
def test_each_untouched_item_has_one_number(touched):
    """Numbers 0 to n - 1 give each user's n untouched items once each, in order, and no touched one."""
    untouched = [sorted(set(range(1, NUM_ITEMS + 1)) - items) for items in touched]
    users = [user for user, items in enumerate(untouched) for _ in items]
    random = [number for items in untouched for number in range(len(items))]
    found = draw(touched, users, random)
    assert found.dtype == np.int32
    assert_array_equal(found, [item for items in untouched for item in items])


@pytest.mark.parametrize("num_touched", [1, 2, 3, 4, 7, 8, 15, 16, 1000])
def test_histories_of_every_length_are_searched_to_the_end(num_touched):
    """The even items are touched: number r stands for item 2 r + 1, up to the last one and past it."""
    touched = [{2}, set(range(2, 2 * num_touched + 1, 2))]
    num_items = 2 * num_touched + 3
    left = [*range(1, 2 * num_touched + 1, 2), *range(2 * num_touched + 1, num_items + 1)]
    assert_array_equal(draw(touched, [1] * len(left), range(len(left)), num_items), left)


def test_large_numbers_are_taken_modulo_what_is_left():
    """With 7 items left, 2**64 - 1 is number 1 (2 = 2**64 mod 7) and 2**63 is number 1 (2**63 = 8**21)."""
    assert_array_equal(draw([{1, 2}], [0, 0], [2**64 - 1, 2**63]), [4, 4])


def test_hashed_numbers_draw_evenly():
    """Seven items left, 70,000 draws: each about 10,000 times, to five standard deviations."""
    random = hash64(1234, tf.range(70_000, dtype=tf.int64)).numpy()
    counts = np.bincount(draw([{3, 8}], np.zeros(70_000, int), random), minlength=NUM_ITEMS + 1)
    assert_array_equal(counts[[0, 3, 8]], 0)
    assert np.abs(counts[[1, 2, 4, 5, 6, 7, 9]] - 10_000).max() < 5 * 93


def draw_distinct(touched, keys, users, counts, num_items=NUM_ITEMS):
    """For each of `keys`, the negatives of its user."""
    gaps = [item - 1 - place for items in touched for place, item in enumerate(sorted(items))]
    offsets, users = np.cumsum([0, *(len(items) for items in touched)]), np.array(users)
    found = distinct_untouched_items(
        tf.constant(keys, tf.int64),
        tf.constant(counts, tf.int64),
        tf.constant(offsets[users], tf.int64),
        tf.constant(offsets[users + 1], tf.int64),
        tf.constant(gaps, tf.int32),
        num_items,
    ).numpy()
    return [part.tolist() for part in np.split(found, np.cumsum(counts)[:-1])]


def test_distinct_negatives_are_distinct_untouched_and_the_same_in_any_company():
    touched = [{1, 3}, set(), set(range(1, NUM_ITEMS))]
    found = draw_distinct(touched, [11, 12, 13, 14], [0, 1, 2, 0], [7, 4, 1, 3])
    assert [len(set(items)) for items in found] == [7, 4, 1, 3]
    assert sorted(found[0]) == [2, 4, 5, 6, 7, 8, 9]  # as many as there are
    assert found[2] == [9]
    assert not {1, 3} & set(found[3])
    assert draw_distinct(touched, [14], [0], [3]) == found[3:]
    assert draw_distinct(touched, [15], [0], [3]) != found[3:]
    assert draw_distinct([set()], [1], [0], [2]) == [draw_distinct([set()], [1], [0], [5])[0][:2]]


def test_distinct_negatives_are_even():
    """Three of the seven that are left: 30,000 draws give each 30,000 * 3 / 7 times, to five standard deviations."""
    found = draw_distinct([{3, 8}], np.arange(30_000), np.zeros(30_000, int), np.full(30_000, 3))
    counts = np.bincount(np.concatenate(found), minlength=NUM_ITEMS + 1)
    assert_array_equal(counts[[0, 3, 8]], 0)
    assert np.abs(counts[[1, 2, 4, 5, 6, 7, 9]] - 30_000 * 3 / 7).max() < 5 * np.sqrt(30_000 * 3 / 7 * 4 / 7)
