"""ComiRec's re-ranking against a plain greedy, item by item: the order, the places of targets, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

import din_dist.evaluation.retrieval
from din_dist.config import Config, ModelKind, Split
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.data.splits import Examples, split_examples
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.evaluation.request import EVENTS, USERS, EvaluationRequest
from din_dist.evaluation.reranking import Diversity, category_of_items, diverse_order
from din_dist.evaluation.retrieval import Queries, Task, queries_of, rank
from din_dist.metrics.retrieval import pairs_that_differ
from tests.support.one_of_some import OneOfSome
from tests.support.small_log import small_config

LONGEST = 4


def greedy(scores: Mapping[int, float], category_of: np.ndarray, weight: float, length: int) -> list[int]:
    """Returns the items chosen one after the other from the 4 * length best; the lower item first in a tie."""
    left = sorted(scores, key=lambda item: (-scores[item], item))[: 4 * length]
    chosen: list[int] = []
    while left and len(chosen) < length:

        def gain(item: int) -> float:
            return scores[item] + weight * sum(category_of[item] != category_of[other] for other in chosen)

        chosen.append(min(left, key=lambda item: (-gain(item), item)))
        left.remove(chosen[-1])
    return chosen


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 64.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_the_greedy_one(weight: float, seed: int) -> None:
    """Scores are quarters with many ties, so all sums are exact. Some lists have fewer candidates than places."""
    random = np.random.default_rng(seed)
    num_items, length = int(random.integers(20, 60)), int(random.integers(1, 10))
    scores = (random.integers(-6, 7, (40, num_items)) / 4).astype(np.float32)
    scores[random.random(scores.shape) < random.random((40, 1))] = -np.inf
    category_of = random.integers(0, 4, num_items)
    found = diverse_order(scores, category_of, weight, length)
    for row, own in zip(found, scores, strict=True):
        candidates = {item: float(own[item]) for item in np.flatnonzero(own > -np.inf)}
        chosen = greedy(candidates, category_of, weight, length)
        assert row.tolist() == [*chosen, *[-1] * length][:length]
    if weight == 0:  # the order without re-ranking
        best = tf.math.top_k(scores, length)
        assert_array_equal(found, np.where(np.isneginf(best.values), -1, best.indices))


def test_two_categories_alternate() -> None:
    """Four items of one category score 10, and four of the other 9; by weight 1, their gains are often tied."""
    scores = np.array([[10, 10, 10, 10, 9, 9, 9, 9]], np.float32)
    categories = np.array([1, 1, 1, 1, 0, 0, 0, 0])  # 0: without a category, which is alike among themselves
    assert diverse_order(scores, categories, 0.0, 4).tolist() == [[0, 1, 2, 3]]
    assert diverse_order(scores, categories, 5.0, 4).tolist() == [[0, 4, 1, 5]]
    assert diverse_order(scores, categories, 1.0, 4).tolist() == [[0, 1, 4, 2]]


def test_only_the_best_four_times_as_many_are_considered() -> None:
    scores = np.arange(12, 0, -1, np.float32)[None]
    for other, chosen in ((7, 7), (8, 1)):
        categories = (np.arange(12) == other).astype(np.int64)
        assert diverse_order(scores, categories, 100.0, 2).tolist() == [[0, chosen]]


def test_sorted_scores_give_the_new_order() -> None:
    """What is not chosen keeps its scores, and with them its order and its ties."""
    random = np.random.default_rng(3)
    scores = (1e30 * random.integers(-3, 4, (20, 40))).astype(np.float32)
    diversity = Diversity(1e30, random.integers(0, 3, 41))
    chosen = diverse_order(scores, diversity.category_of[1:], 1e30, 9)
    before = scores.copy()
    diversity.rerank(scores, 9)
    assert_array_equal(np.argsort(-scores, axis=1, kind="stable")[:, :9], chosen)
    kept = np.full(scores.shape, True)
    np.put_along_axis(kept, chosen, False, axis=1)
    assert_array_equal(scores[kept], before[kept])
    assert scores[kept].max() < scores[~kept].min() < np.inf


@dataclasses.dataclass
class Case:
    config: Config
    store: EventStore
    splits: dict[str, Examples]

    def queries(self, by: str) -> Queries:
        return queries_of(self.store, self.splits["test"], LONGEST, 10**9, by=by)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("log")
    config = small_config(folder, split=Split.TEMPORAL, max_history_length=LONGEST, model=ModelKind.YOUTUBE_DNN)
    store = prepare(config.data)
    return Case(config, store, split_examples(store, config.data))


class QuarterScores:
    """Scores with many ties, drawn for each event that is asked for."""

    def __init__(self, store: EventStore) -> None:
        shape = len(store.item_ids), store.facts.num_candidates
        self.table = (np.random.default_rng(5).integers(0, 9, shape) / 4).astype(np.float32)

    def of_all(self, histories, lengths, tick, askers=None):
        return self.table[askers.events]

    def of_some(self, histories, lengths, candidates, counts, askers=None):
        raise NotImplementedError


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("by", [EVENTS, USERS])
def test_places_of_targets(case: Case, by: str, exclude: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: chosen ones stand where they were put, the others behind, where their ties still count."""
    store, queries, length, weight = case.store, case.queries(by), 3, 0.5
    monkeypatch.setattr(din_dist.evaluation.retrieval, "QUERIES_AT_ONCE", 3)
    scorer = QuarterScores(store)
    _, category_of = category_of_items(store)
    assert category_of is not None
    diversity = Diversity(weight, category_of)
    places = rank(store, queries, Task(0, exclude, seed=1), scorer, length, Runtime(), diversity=diversity)
    query_of = queries.query_of
    num_chosen = 0
    for query, event in enumerate(queries.events):
        targets = set(queries.targets[query_of == query].tolist())
        seen = set(store.history_item_ids[queries.seen_starts[query] : queries.history_ends[query]].tolist())
        left_out = seen - targets if exclude else set()
        scores = {place + 1: float(score) for place, score in enumerate(scorer.table[event])}
        scores = {item: score for item, score in scores.items() if item not in left_out}
        chosen = greedy(scores, category_of, weight, length)
        assert places.top_items[query].tolist() == chosen
        assert places.num_candidates[query] == len(scores)
        others = {item: score for item, score in scores.items() if item not in chosen}
        for row in np.flatnonzero(query_of == query):
            found, target = (places.greater[row], places.tied[row]), int(queries.targets[row])
            if target in chosen:
                num_chosen += 1
                assert found == (chosen.index(target), 0)
            else:
                greater = length + sum(score > scores[target] for score in others.values())
                assert found == (greater, sum(score == scores[target] for score in others.values()) - 1)
    assert 0 < num_chosen < len(queries.targets)


@pytest.mark.parametrize("by", [EVENTS, USERS])
def test_a_weight_makes_lists_differ_more(case: Case, by: str) -> None:
    _, category_of = category_of_items(case.store)
    assert category_of is not None
    shares = []
    for diversity in (None, Diversity(0.0, category_of), Diversity(0.25, category_of), Diversity(100.0, category_of)):
        scorer, task = QuarterScores(case.store), Task(0, False, seed=1)
        places = rank(case.store, case.queries(by), task, scorer, 5, Runtime(), diversity=diversity)
        differ, pairs = pairs_that_differ(places.top_items, category_of)
        shares.append(differ.sum() / pairs.sum())
    assert shares[0] == shares[1] < shares[2] < shares[3] == 1  # each list of five has all five categories


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_find_what_one_does(case: Case, world_size: int) -> None:
    _, category_of = category_of_items(case.store)
    assert category_of is not None
    diversity = Diversity(0.5, category_of)
    found = []
    for runtime in [Runtime(), *(OneOfSome(number, world_size) for number in range(world_size))]:
        scorer, task = QuarterScores(case.store), Task(0, True, seed=1)
        found.append(rank(case.store, case.queries(USERS), task, scorer, 5, runtime, diversity=diversity))
    whole, *parts = found
    for name in ("greater", "tied", "num_candidates", "top_items"):
        assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_it_needs_a_model_that_finds_and_a_category(case: Case) -> None:
    asked = EvaluationRequest("test", 0, True, (5,), None, 0, diversity_weight=0.5)
    assert asked.fitted(case.config, case.store, case.splits) == asked
    without = dataclasses.replace(case.store, item_features={})
    message = (
        "--diversity_weight: needs a category of items, their first feature. Received: 0.5. "
        "Train with --item_features, or drop it."
    )
    with pytest.raises(InputError, match=f"^{message}$"):
        asked.fitted(case.config, without, case.splits)
    ranks = case.config.replace(model=ModelKind.DIN, negatives_per_positive=1)
    message = "--diversity_weight: is for models that find items, and din ranks. Received: 0.5. Drop it."
    with pytest.raises(InputError, match=f"^{message}$"):
        asked.fitted(ranks, case.store, case.splits)
    neither = dataclasses.replace(asked, diversity_weight=0.0)
    assert neither.fitted(ranks, without, case.splits) == neither
