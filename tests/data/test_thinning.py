"""Fewer examples are the same examples, of whole users evenly spaced; by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from din_dist.data.splits import Examples
from din_dist.data.thinning import evenly_spaced, of_segments, thin_out

# Users 2, 5, 6 and 9 with 1, 3, 2 and 1 rows, of events 10, 20-22, 30-31 and 40; two draws a row.
EXAMPLES = Examples(
    np.array([2, 5, 6, 9], np.int32), np.array([1, 4, 6, 7], np.int32), np.array([10, 19, 26, 34], np.int32), 2
)


def test_the_hand_made_examples_are_what_they_say() -> None:
    assert_array_equal(EXAMPLES.events(), [10, 20, 21, 22, 30, 31, 40])


def test_some_users_keep_their_events() -> None:
    chosen = of_segments(EXAMPLES, np.array([1, 3]))
    assert_array_equal(chosen.users, [5, 9])
    assert_array_equal(chosen.events(), [20, 21, 22, 40])
    assert chosen.draws_per_row == 2
    assert chosen.row_ends.dtype == np.int32


@pytest.mark.parametrize(("most", "users"), [(14, [2, 5, 6, 9]), (13, [2, 6]), (5, [2, 9]), (3, [2]), (1, [2])])
def test_whole_users_evenly_spaced(most: int, users: list[int]) -> None:
    """6 + 2 examples are too many for 7 only; one user is kept even if it has too many."""
    assert_array_equal(thin_out(EXAMPLES, most).users, users)


def test_busy_users_among_the_chosen_make_it_fewer() -> None:
    """Of 3, 1, 1 and 1 rows every second user has 8 examples, every third too, every fourth 6."""
    busy = Examples(np.arange(4), np.array([3, 4, 5, 6]), np.zeros(4, np.int64), 2)
    assert_array_equal(thin_out(busy, 8).users, [0, 2])
    assert_array_equal(thin_out(busy, 6).users, [0])


def test_a_split_without_examples_stays_so() -> None:
    nothing = np.zeros(0, np.int32)
    assert thin_out(Examples(nothing, nothing, nothing, 2), 10).num_examples == 0


def test_sizes_may_be_of_anything() -> None:
    """Of 0, 5, 0, 5 and 1 every second has 1; whatever comes first is kept."""
    assert_array_equal(evenly_spaced(np.array([0, 5, 0, 5, 1]), 6), [0, 2, 4])
    assert_array_equal(evenly_spaced(np.array([9, 1]), 3), [0])
