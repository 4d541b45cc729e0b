"""Resampled users: weighted metrics against repeated examples, and how often an interval holds the truth."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.metrics.bootstrap import RatiosOfSums, WeightedAuc, intervals, user_weights
from din_dist.metrics.ranking import auc

impressions = st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 1), st.integers(0, 3)), max_size=30)


def test_each_sample_draws_as_many_users_as_there_are():
    """With replacement: the chance of none is (1 - 1/n)^n; the same samples for the same seed."""
    weights = np.stack(list(user_weights(1000, 50, seed=3)))
    assert_array_equal(weights.sum(axis=1), 1000)
    assert (weights == 0).mean() == pytest.approx((1 - 1 / 1000) ** 1000, abs=0.01)
    assert_allclose(weights.mean(axis=0), 1, atol=0.9)
    assert_array_equal(weights, np.stack(list(user_weights(1000, 50, seed=3))))
    assert (weights != np.stack(list(user_weights(1000, 50, seed=4)))).any()


def test_ratios_by_hand():
    """Users weigh 2, 0 and 1: (2 * 1 + 5) / (2 * 2 + 4), and what nobody has is not a number."""
    found = RatiosOfSums(
        {
            "first": (np.array([1, 9, 5]), np.array([2, 9, 4])),
            "of_nobody": (np.array([0, 3, 0]), np.array([0, 3, 0])),
        }
    )
    assert found.names == ("first", "of_nobody")
    assert_allclose(found(np.array([2.0, 0, 1])), [7 / 8, math.nan])


@given(impressions, st.lists(st.integers(0, 3), min_size=4, max_size=4))
@settings(deadline=None, derandomize=True)
def test_a_weighted_auc_is_that_of_repeated_users(rows, weights):
    scores, labels, users = np.array(rows, np.int64).reshape(-1, 3).T
    times = np.array(weights)[users]
    (found,) = WeightedAuc(scores.astype(np.float32), labels, users)(np.array(weights, np.float64))
    assert_allclose(found, auc(np.repeat(scores, times), np.repeat(labels, times)), rtol=1e-12)


def test_the_interval_of_a_mean_is_that_of_the_textbook():
    """Of 400 users with one value each: mean +- 1.96 standard errors."""
    values = np.random.default_rng(1).exponential(size=400)
    ((low, high),) = intervals(RatiosOfSums({"mean": (values, np.ones(400))}), 400, 4000, seed=1)
    error = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.15 * error)


def test_users_not_examples_are_drawn():
    """50 users say the same 20 times: the interval is that of 50 values, not of 1,000."""
    values = np.random.default_rng(2).normal(size=50)
    ((low, high),) = intervals(RatiosOfSums({"mean": (20 * values, np.full(50, 20))}), 50, 2000, seed=1)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(50), rel=0.15)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """200 data sets of 60 users with 1 to 5 examples that depend on each other. The true mean is 0; the true AUC is
    Phi(1 / sqrt(2 * 1.25)), by hand."""
    random = np.random.default_rng(7)
    true_auc = 0.5 * (1 + math.erf(1 / math.sqrt(2 * 1.25) / math.sqrt(2)))
    held = np.zeros(2)
    for seed in range(200):
        sizes = random.integers(1, 6, size=60)
        users = np.repeat(np.arange(60), sizes)
        labels = random.integers(2, size=len(users))
        noise = 0.5 * random.normal(size=60)[users] + random.normal(size=len(users))
        mean = RatiosOfSums({"mean": (np.bincount(users, noise), sizes)})
        area = WeightedAuc(noise + labels, labels, users)
        bounds = intervals(lambda weights, mean=mean, area=area: np.append(mean(weights), area(weights)), 60, 150, seed)
        held += (bounds[:, 0] <= [0, true_auc]) & ([0, true_auc] <= bounds[:, 1])
    assert (held / 200 > 0.90).all()
    assert (held / 200 < 0.985).all()


def test_what_no_sample_defines_has_no_bounds():
    ((low, high),) = intervals(WeightedAuc(np.ones(3), np.ones(3), np.arange(3)), 3, 10, seed=0)
    assert math.isnan(low)
    assert math.isnan(high)
    ((low, high),) = intervals(WeightedAuc(np.zeros(0), np.zeros(0), np.zeros(0, int)), 3, 10, seed=0)
    assert math.isnan(low)


def test_samples_that_do_not_define_it_are_left_out():
    """Of two users, one has the positive and one the negative: half of the samples lack one of them."""
    ((low, high),) = intervals(WeightedAuc(np.array([1.0, 0.0]), np.array([1, 0]), np.arange(2)), 2, 50, seed=0)
    assert (low, high) == (1, 1)
