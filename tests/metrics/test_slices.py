import numpy as np
import pytest
from numpy.testing import assert_array_equal

from din_dist.metrics.slices import Slice, largest_parts, range_names, slices


def test_slices_by_hand():
    """In the first part user 1 ranks right and user 2 wrong by the model: (1 * 2 + 0 * 2) / 4; the floor ties: 1/2.

    In the second part no user has both labels, so AUC speaks: .9 over .2.
    """
    labels = np.array([1, 0, 1, 0, 1, 0])
    users = np.array([1, 1, 2, 2, 3, 4])
    rankings = {"model": np.array([0.8, 0.1, 0.3, 0.4, 0.9, 0.2]), "floor": np.zeros(6)}
    found = slices(rankings, labels, users, np.array([0, 0, 0, 0, 2, 2]), ["short", "empty", "long"])
    assert found == [
        Slice("short", 4, 2, "GAUC", {"model": pytest.approx(0.5), "floor": pytest.approx(0.5)}),
        Slice("long", 2, 1, "AUC", {"model": 1.0, "floor": 0.5}),
    ]


def test_names_of_ranges():
    values, parts = np.array([3, 1200, 5, 7, 4]), np.array([0, 2, 0, 1, 0])
    assert range_names(values, parts) == ["3–5", "7", "1,200"]
    assert range_names(np.zeros(0), np.zeros(0, int)) == []


def test_the_largest_parts_come_first_and_the_rest_is_one():
    kept, part_of = largest_parts(np.array([4, 9, 9, 7, 9, 7, 2]), most=2)
    assert_array_equal(kept, [9, 7])
    assert_array_equal(part_of, [2, 0, 0, 1, 0, 1, 2])


def test_fewer_values_than_parts_leave_no_rest():
    kept, part_of = largest_parts(np.array([5, 5, 3]), most=8)
    assert_array_equal(kept, [5, 3])
    assert_array_equal(part_of, [0, 0, 1])
