"""The intervals of a split's metrics hold the metrics, and come from each user's own part of them."""

import math

import numpy as np
import pytest

from din_dist.evaluation.confidence import affordable_samples, intervals_of_scores
from din_dist.metrics.ranking import auc, gauc, log_loss, pairwise_gauc


def narrow(scores, labels, users, draws):
    """Where all users are alike every sample is the whole: both bounds are the metric."""
    found = intervals_of_scores(scores, labels, users, draws, num_samples=20, seed=1)
    assert all(low == pytest.approx(high) for low, high in found.values())
    return {name: low for name, (low, _) in found.items()}


def test_alike_users_leave_no_doubt():
    scores = np.tile(np.array([0.5, 0.1, 0.9, -0.3, 0.2, 0.2]), 8)
    labels, users = np.tile([1, 0, 0, 1, 0, 0], 8), np.repeat(np.arange(8)[::-1], 6)
    assert narrow(scores, labels, users, draws=3) == {
        "gauc": pytest.approx(gauc(scores, labels, users).gauc),
        "auc": pytest.approx(auc(scores, labels)),
        "log_loss": pytest.approx(log_loss(scores, labels)),
        "pairwise_gauc": pytest.approx(pairwise_gauc(scores.reshape(-1, 3))),
    }
    assert narrow(scores, labels, users, draws=None).keys() == {"gauc", "auc", "log_loss"}


def test_users_with_one_label_count_for_auc_but_not_for_gauc():
    """Seven users with one pair each, won, and seven with a single, lost one: GAUC is 1 in every sample."""
    scores = np.concatenate([np.tile([2.0, 1.0], 7), np.full(7, 3.0)])
    labels = np.concatenate([np.tile([1, 0], 7), np.zeros(7, int)])
    users = np.concatenate([np.repeat(np.arange(7), 2), np.arange(7, 14)])
    found = intervals_of_scores(scores, labels, users, None, num_samples=200, seed=1)
    assert found["gauc"] == (1, 1)
    low, high = found["auc"]
    assert low < auc(scores, labels) < high < 1


def test_nothing_was_ranked_by_anybody():
    found = intervals_of_scores(np.zeros(4), np.ones(4), np.arange(4), None, num_samples=5, seed=1)
    assert math.isnan(found["gauc"][0])
    assert found["log_loss"] == pytest.approx((math.log(2), math.log(2)))


def test_samples_are_as_many_as_can_be_paid():
    assert affordable_samples(1000, 60_000) == 1000
    assert affordable_samples(1000, 8_000_000) == 250
    assert affordable_samples(1000, 10**9) == 100
    assert affordable_samples(50, 10**9) == 50
    assert affordable_samples(0, 0) == 0
