import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from din_dist.metrics.ranking import Gauc, auc, gauc, log_loss, pairwise_gauc

# Few distinct scores and users: ties and users of one class come up all the time.
impressions = st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 1), st.integers(0, 3)), max_size=30)


def brute_force_auc(scores, labels):
    """Over all pairs of a positive and a negative: won, half won when tied."""
    pairs = [
        1.0 if positive > negative else 0.5 if positive == negative else 0.0
        for positive in scores[labels == 1]
        for negative in scores[labels == 0]
    ]
    return sum(pairs) / len(pairs) if pairs else math.nan


def columns(rows, dtype=np.float32):
    scores, labels, users = np.array(rows, np.int64).reshape(-1, 3).T
    return scores.astype(dtype), labels, users


def test_auc_by_hand():
    """Positives .9 and .4 against .8 and .1: won, won, lost, won."""
    assert auc(np.array([0.9, 0.8, 0.4, 0.1]), np.array([1, 0, 1, 0])) == 0.75


def test_a_tie_is_half_a_win():
    assert auc(np.array([0.5, 0.5]), np.array([1, 0])) == 0.5
    assert auc(np.array([0.5, 0.5, 0.5, 0.2]), np.array([1, 0, 1, 0])) == 0.75


def test_auc_of_one_class_or_nothing_is_nan():
    assert math.isnan(auc(np.array([0.1, 0.2]), np.array([1, 1])))
    assert math.isnan(auc(np.array([0.1, 0.2]), np.array([0, 0])))
    assert math.isnan(auc(np.array([]), np.array([])))


def test_gauc_by_hand():
    """User 7: 1 with 2 impressions; user 2: 1/2 with 4 (two of four pairs); user 5 has positives only.

    (1 * 2 + 1/2 * 4) / 6; the impressions come in any order.
    """
    users = np.array([2, 7, 2, 5, 2, 7, 2])
    scores = np.array([4.0, 0.2, 3.0, 9.0, 2.0, 0.1, 1.0])
    labels = np.array([1, 1, 0, 1, 0, 0, 1])
    assert gauc(scores, labels, users) == Gauc(pytest.approx(2 / 3), num_users=2, num_users_skipped=1)


def test_gauc_of_nobody_is_nan():
    skipped = gauc(np.array([0.1, 0.2]), np.array([1, 0]), np.array([1, 2]))
    assert math.isnan(skipped.gauc)
    assert (skipped.num_users, skipped.num_users_skipped) == (0, 2)
    assert math.isnan(gauc(np.array([]), np.array([]), np.array([])).gauc)


@given(impressions)
@settings(deadline=None, derandomize=True)
def test_auc_equals_all_pairs(rows):
    scores, labels, _ = columns(rows)
    assert_allclose(auc(scores, labels), brute_force_auc(scores, labels), rtol=1e-12)


@given(impressions)
@settings(deadline=None, derandomize=True)
def test_gauc_equals_all_pairs_of_each_user(rows):
    scores, labels, users = columns(rows)
    counted, weights = [], []
    for user in np.unique(users):
        mine = users == user
        of_user = brute_force_auc(scores[mine], labels[mine])
        if not math.isnan(of_user):
            counted.append(of_user)
            weights.append(mine.sum())
    found = gauc(scores, labels, users)
    expected = np.dot(counted, weights) / np.sum(weights) if counted else math.nan
    assert_allclose(found.gauc, expected, rtol=1e-12)
    assert (found.num_users, found.num_users_skipped) == (len(counted), len(np.unique(users)) - len(counted))


def test_a_million_impressions_keep_their_digits():
    """Positives take every place of odd number: exactly (n + 1) / 2n of the pairs are won."""
    n = 500_000
    labels = np.arange(2 * n) % 2
    assert_allclose(auc(np.arange(2 * n), labels), (n + 1) / (2 * n), rtol=1e-12)


def test_pairwise_gauc_by_hand():
    """A tie counts nothing, unlike in `auc`; of three positives with two negatives each, 2 + 0 + 1 of 6 pairs win."""
    assert pairwise_gauc(np.array([[0.9, 0.1], [0.5, 0.5]])) == 0.5
    assert pairwise_gauc(np.array([[3.0, 1.0, 2.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])) == 0.5
    assert math.isnan(pairwise_gauc(np.zeros((0, 2))))


@given(impressions.filter(len))
@settings(deadline=None, derandomize=True)
def test_pairwise_gauc_equals_all_pairs(rows):
    scores, _, _ = columns(rows)
    table = scores.repeat(2).reshape(-1, 2) * [1, -1]
    assert_allclose(pairwise_gauc(table), sum(positive > negative for positive, negative in table) / len(table))


def test_log_loss_by_hand():
    """Logit 0: ln 2. Logit ln 3 is a probability of 3/4: ln(4/3) for a click, ln 4 for none."""
    logits = np.array([0.0, math.log(3), math.log(3)])
    expected = (math.log(2) + math.log(4 / 3) + math.log(4)) / 3
    assert_allclose(log_loss(logits, np.array([1, 1, 0])), expected, rtol=1e-12)
    assert math.isnan(log_loss(np.array([]), np.array([])))


def test_log_loss_of_far_logits_is_finite():
    assert_allclose(log_loss(np.array([1e4, -1e4]), np.array([0, 1])), 1e4)
    assert log_loss(np.array([1e4, -1e4]), np.array([1, 0])) == 0
