"""Metrics of places in a ranking, by hand and against every order that ties allow."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from din_dist.metrics.retrieval import (
    coverage,
    hit_rate_by_user,
    ndcg_at,
    pairs_that_differ,
    recall_at,
    reciprocal_rank,
)

# Places 1, 3 and 6 without ties; two ties for the places 2 and 3; all of four alike.
GREATER = np.array([0, 2, 5, 1, 0])
TIED = np.array([0, 0, 0, 1, 3])


def test_recall_by_hand():
    assert_allclose(recall_at(1, GREATER, TIED), [1, 0, 0, 0, 1 / 4])
    assert_allclose(recall_at(2, GREATER, TIED), [1, 0, 0, 1 / 2, 1 / 2])
    assert_allclose(recall_at(3, GREATER, TIED), [1, 1, 0, 1, 3 / 4])
    assert_allclose(recall_at(100, GREATER, TIED), 1)


def test_ndcg_by_hand():
    """1 / log2(1 + place): 1, 1/2 for place 3; the tie has the mean of places 2 and 3."""
    second = 1 / math.log2(3)
    assert_allclose(ndcg_at(3, GREATER, TIED), [1, 1 / 2, 0, (second + 1 / 2) / 2, (1 + second + 1 / 2) / 4])
    assert_allclose(ndcg_at(2, GREATER, TIED), [1, 0, 0, second / 2, (1 + second) / 4])
    assert_allclose(ndcg_at(6, GREATER, TIED)[2], 1 / math.log2(7))


def test_reciprocal_rank_by_hand():
    expected = [1, 1 / 3, 1 / 6, (1 / 2 + 1 / 3) / 2, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4]
    assert_allclose(reciprocal_rank(GREATER, TIED), expected)


def test_nothing_was_ranked():
    nothing = np.zeros(0, np.int64)
    assert recall_at(5, nothing, nothing).shape == ndcg_at(5, nothing, nothing).shape == (0,)
    assert reciprocal_rank(nothing, nothing).shape == (0,)
    assert math.isnan(coverage(np.zeros((0, 5)), 0))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 7))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_tie_is_the_mean_over_all_orders(scores, k):
    """The first is the target; each order of the candidates that their scores allow counts the same."""
    places = [
        order.index(0) + 1
        for order in itertools.permutations(range(len(scores)))
        if all(scores[one] >= scores[other] for one, other in itertools.pairwise(order))
    ]
    others = np.array(scores[1:])
    greater, tied = (np.array([np.sum(others > scores[0])]), np.array([np.sum(others == scores[0])]))
    assert_allclose(recall_at(k, greater, tied)[0], np.mean([place <= k for place in places]))
    gains = [1 / math.log2(1 + place) if place <= k else 0 for place in places]
    assert_allclose(ndcg_at(k, greater, tied)[0], np.mean(gains))
    assert_allclose(reciprocal_rank(greater, tied)[0], np.mean([1 / place for place in places]))


def test_a_user_with_several_events_is_hit_by_any_of_them():
    """User 7: none of two; user 3: one of two; user 5: two chances of one half."""
    users, hits = hit_rate_by_user(np.array([0, 0, 1, 0, 0.5, 0.5]), np.array([7, 7, 3, 3, 5, 5]))
    assert users.tolist() == [3, 5, 7]
    assert_allclose(hits, [1, 3 / 4, 0])


def test_pairs_that_differ_by_hand():
    """Items 1 and 2 share a category. Of three items there are three pairs, of one none; 0 is no item."""
    category_of = np.array([0, 4, 4, 5, 0])
    lists = np.array([[1, 2, 3], [1, 3, 0], [4, 1, 3], [2, 0, 0], [0, 0, 0]])
    differ, pairs = pairs_that_differ(lists, category_of)
    assert differ.tolist() == [2, 1, 3, 0, 0]
    assert pairs.tolist() == [3, 1, 3, 0, 0]


def test_coverage_counts_each_item_once_and_no_empty_places():
    assert coverage(np.array([[1, 2], [2, 9], [2, 0]]), 12) == pytest.approx(3 / 12)
