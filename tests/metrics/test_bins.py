import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from din_dist.metrics.bins import equal_mass_bins


def test_equal_mass_by_hand():
    """Six values in three bins: the two smallest, the two in the middle, the two largest, in any order."""
    assert_array_equal(equal_mass_bins(np.array([9.0, 1.0, 5.0, 2.0, 8.0, 6.0]), 3), [2, 0, 1, 0, 2, 1])


def test_ties_stay_together():
    """The four 7s lie around the middle, and no bin is left empty in the numbering: of ten, three are used."""
    assert_array_equal(equal_mass_bins(np.array([7, 1, 7, 7, 7, 9]), 3), [1, 0, 1, 1, 1, 2])
    assert_array_equal(equal_mass_bins(np.array([7, 1, 7, 7, 7, 9]), 10), [1, 0, 1, 1, 1, 2])


def test_a_tie_of_nearly_all_leaves_the_others_a_bin():
    assert_array_equal(equal_mass_bins(np.array([20] * 9 + [3]), 4), [1] * 9 + [0])


def test_nothing_and_one():
    assert_array_equal(equal_mass_bins(np.zeros(0), 5), np.zeros(0))
    assert_array_equal(equal_mass_bins(np.array([3.0]), 5), [0])


@given(st.lists(st.integers(0, 20), min_size=1, max_size=50), st.integers(1, 12))
@settings(deadline=None, derandomize=True)
def test_bins_ascend_with_the_values(values, num_bins):
    values = np.array(values)
    bins = equal_mass_bins(values, num_bins)
    assert set(bins) == set(range(bins.max() + 1))
    assert bins.max() < num_bins
    for low, high in zip(np.argsort(values)[:-1], np.argsort(values)[1:], strict=True):
        assert (bins[low] == bins[high]) if values[low] == values[high] else (bins[low] <= bins[high])
