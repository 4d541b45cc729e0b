import math

import numpy as np
import pytest

from din_dist.metrics.calibration import calibration, wilson_interval


def test_expected_calibration_error_by_hand():
    """Two bins of two: .1 and .3 with one positive (|.2 - .5| = .3), .8 and 1.0 with two (|.9 - 1| = .1)."""
    found = calibration(np.array([0.8, 0.1, 1.0, 0.3]), np.array([1, 1, 1, 0]), num_bins=2)
    assert [(b.num_examples, b.predicted, b.observed) for b in found.bins] == [
        (2, pytest.approx(0.2), 0.5),
        (2, pytest.approx(0.9), 1.0),
    ]
    assert found.error == pytest.approx((2 * 0.3 + 2 * 0.1) / 4)


def test_bins_count_by_their_examples():
    """Three tied at .5 with two positives (|.5 - 2/3| = 1/6), one at .9 that is none (.9): (3/6 + .9) / 4."""
    found = calibration(np.array([0.5, 0.9, 0.5, 0.5]), np.array([1, 0, 0, 1]), num_bins=4)
    assert [b.num_examples for b in found.bins] == [3, 1]
    assert found.error == pytest.approx((0.5 + 0.9) / 4)


def test_what_is_right_on_average_has_no_error():
    found = calibration(np.full(8, 0.25), np.array([1, 1, 0, 0, 0, 0, 0, 0]))
    assert found.error == 0
    assert len(found.bins) == 1


def test_nothing_has_no_calibration():
    found = calibration(np.zeros(0), np.zeros(0))
    assert found.bins == ()
    assert math.isnan(found.error)


def test_wilson_interval_by_hand():
    """5 of 10: 1.96² = 3.8416; the middle is .5, the half width 1.96 / 1.38416 * sqrt(.025 + .009604)."""
    assert wilson_interval(0.5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    low, high = wilson_interval(0.0, 10)
    assert low == pytest.approx(0, abs=1e-12)
    assert high == pytest.approx(3.8416 / 13.8416)
