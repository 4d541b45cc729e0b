"""Metrics of queries with several targets, by hand and against every order that ties allow."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from din_dist.metrics.several_targets import SeveralTargets

# Query 0: targets at the places 1, 3 and 5. Query 1: none. Query 2: one at place 2. Query 3: two of the places 2 to 4.
BY_HAND = SeveralTargets(
    np.array([0, 0, 0, 2, 3, 3]), np.array([0, 2, 4, 1, 1, 1]), np.array([0, 0, 0, 0, 2, 2]), num_queries=4
)
SECOND, FIFTH = 1 / math.log2(3), 1 / math.log2(6)  # gains; the first is 1, the third 1/2
FOURTH = 1 / math.log2(5)


def test_recall_and_hits_by_hand() -> None:
    assert BY_HAND.num_targets.tolist() == [3, 0, 1, 2]
    assert_allclose(BY_HAND.recall_at(1), [1 / 3, 0, 0, 0])
    assert_allclose(BY_HAND.recall_at(2), [1 / 3, 0, 1, 1 / 3])
    assert_allclose(BY_HAND.recall_at(3), [2 / 3, 0, 1, 2 / 3])
    assert_allclose(BY_HAND.recall_at(5), [1, 0, 1, 1])
    assert_allclose(BY_HAND.hit_at(1), [1, 0, 0, 0])
    assert_allclose(BY_HAND.hit_at(2), [1, 0, 1, 2 / 3])
    assert_allclose(BY_HAND.hit_at(3), [1, 0, 1, 1])


def test_ndcg_by_hand() -> None:
    """The ideal of query 0 is 1 + 1/log2(3) + 1/2 from three places on, and of query 3 1 + 1/log2(3) from two on."""
    assert_allclose(BY_HAND.ndcg_at(1), [1, 0, 0, 0])
    assert_allclose(BY_HAND.ndcg_at(3)[0], (1 + 1 / 2) / (1 + SECOND + 1 / 2))
    assert_allclose(BY_HAND.ndcg_at(5)[0], (1 + 1 / 2 + FIFTH) / (1 + SECOND + 1 / 2))
    # Each of the two is at each of the three places in two orders of three.
    assert_allclose(BY_HAND.ndcg_at(4)[3], 2 / 3 * (SECOND + 1 / 2 + FOURTH) / (1 + SECOND))
    assert_allclose(BY_HAND.ndcg_at(4)[1:3], [0, SECOND])


def test_ndcg_as_comirec_has_it_by_hand() -> None:
    """The first target alone is ideal if no other was found. The three orders of query 3 find two, one or one in 3."""
    assert_allclose(BY_HAND.ndcg_at(1, ideal_of_hits=True), [1, 0, 0, 0])
    assert_allclose(BY_HAND.ndcg_at(2, ideal_of_hits=True), [1, 0, SECOND, 2 / 3 * SECOND])
    assert_allclose(BY_HAND.ndcg_at(3, ideal_of_hits=True)[0], (1 + 1 / 2) / (1 + SECOND))
    both = (SECOND + 1 / 2) / (1 + SECOND)
    assert_allclose(BY_HAND.ndcg_at(3, ideal_of_hits=True)[3], (both + SECOND + 1 / 2) / 3)


def test_the_first_target_by_hand() -> None:
    """The first of two among the places 2 to 4 is at 2 in two of three pairs of places, and otherwise at 3."""
    assert_allclose(BY_HAND.first_reciprocal_rank(), [1, 0, 1 / 2, 2 / 3 / 2 + 1 / 3 / 3])


def test_no_target_at_all() -> None:
    nothing = np.zeros(0, np.int64)
    none = SeveralTargets(nothing, nothing, nothing, num_queries=2)
    for found in (none.recall_at(3), none.hit_at(3), none.ndcg_at(3), none.ndcg_at(3, ideal_of_hits=True)):
        assert found.tolist() == [0, 0]
    assert none.first_reciprocal_rank().tolist() == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6), st.integers(1, 7))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_a_tie_is_the_mean_over_all_orders(candidates: list[tuple[int, bool]], k: int) -> None:
    """Each order of the candidates that their scores allow counts the same; a query of one target stands beside it."""
    scores = np.array([score for score, _ in candidates])
    targets = np.flatnonzero([is_target for _, is_target in candidates])
    greater = np.array([(scores > scores[target]).sum() for target in targets], np.int64)
    tied = np.array([(scores == scores[target]).sum() - 1 for target in targets], np.int64)
    found = SeveralTargets(np.append(np.ones(len(targets), np.int64), 0), np.append(greater, 1), np.append(tied, 1), 2)
    sums = np.zeros(5)
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[one] >= scores[other] for one, other in itertools.pairwise(order))
    ]
    for order in orders:
        places = sorted(order.index(target) + 1 for target in targets)
        hits = [place for place in places if place <= k]
        gain = sum(1 / math.log2(1 + place) for place in hits)
        ideal = sum(1 / math.log2(1 + place) for place in range(1, min(k, len(places)) + 1))
        of_hits = sum(1 / math.log2(1 + place) for place in range(1, len(hits) + 1))
        sums += [
            len(hits) / max(len(places), 1),
            bool(hits),
            gain / ideal if places else 0,
            gain / of_hits if hits else 0,
            1 / places[0] if places else 0,
        ]
    ours = [
        *(found.recall_at(k), found.hit_at(k), found.ndcg_at(k)),
        *(found.ndcg_at(k, ideal_of_hits=True), found.first_reciprocal_rank()),
    ]
    assert_allclose([values[1] for values in ours], sums / len(orders), atol=1e-12)
    chance = {1: 0, 2: 1 / 2}.get(k, 1)  # the other query has one target, at place 2 or 3
    assert_allclose([ours[0][0], ours[1][0], ours[4][0]], [chance, chance, (1 / 2 + 1 / 3) / 2])
