"""Places in a ranking against brute force: which events are queries, what they are ranked against, and where they
stand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

import din_dist.evaluation.retrieval
from din_dist import assembly
from din_dist.config import Split
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.data.splits import Examples, split_examples
from din_dist.distributed.runtime import Runtime
from din_dist.evaluation.request import USERS
from din_dist.evaluation.retrieval import (
    ModelScorer,
    PopularityScorer,
    Queries,
    Task,
    by_user,
    coverages,
    drawn_negatives,
    queries_of,
    rank,
)
from din_dist.execution import Mode
from din_dist.layers.packed import segment_sum
from din_dist.layers.pairs import Pairs
from din_dist.models.din import DIN
from din_dist.models.ranking_model import LookedUp, RankingModel
from tests.support.one_of_some import OneOfSome
from tests.support.small_log import small_config

LONGEST = 4


@dataclasses.dataclass
class Case:
    store: EventStore
    examples: Examples
    queries: Queries
    histories: list[list[int]]  # of each query, by hand
    seen: list[list[int]]  # likewise, however long ago


@pytest.fixture(scope="module", params=["events", "labels"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    labels = request.param == "labels"
    config = small_config(folder, labels=labels, split=Split.TEMPORAL, max_history_length=LONGEST)
    store = prepare(config.data)
    examples = split_examples(store, config.data)["test"]
    queries = queries_of(store, examples, LONGEST, 10**9)
    seen = []
    for event, user in zip(queries.events, queries.users, strict=True):
        before = np.arange(store.user_offsets[user], event)
        seen.append([int(store.item_ids[e]) for e in before if store.labels is None or store.labels[e]])
    return Case(store, examples, queries, [items[-LONGEST:] for items in seen], seen)


class FewScores:
    """Scores with many ties, from the item and the history's items."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items

    def one(self, history: list[int], item: int) -> float:
        return float((7 * item + sum(history)) % 5)

    def of_all(self, histories, lengths, tick, askers=None):
        tick(0.5)
        candidates = np.tile(np.arange(1, self.num_items + 1), len(lengths))
        found = self.of_some(histories, lengths, candidates, np.full(len(lengths), self.num_items))
        return found.reshape(len(lengths), self.num_items)

    def of_some(self, histories, lengths, candidates, counts, askers=None):
        parts = np.split(histories, np.cumsum(lengths)[:-1])
        owner = np.repeat(np.arange(len(counts)), counts)
        return np.array([self.one(parts[i].tolist(), c) for i, c in zip(owner, candidates, strict=True)])


def test_queries_are_the_positive_events_of_the_split(case: Case) -> None:
    """With labels, rows of no click are none, and a click may be the first event of its user."""
    events = case.examples.events()
    if case.store.labels is not None:
        events = events[case.store.labels[events] == 1]
        assert 0 < len(events) < case.examples.num_rows
    assert_array_equal(case.queries.events, events)
    assert_array_equal(case.queries.targets, case.store.item_ids[events])
    assert case.queries.num_in_split == len(events)
    queries = case.queries
    for place, history in enumerate(case.histories):
        window = slice(queries.history_starts[place], queries.history_ends[place])
        assert case.store.history_item_ids[window].tolist() == history
    assert max(map(len, case.histories)) == LONGEST < max(map(len, case.seen))


def test_fewer_queries_are_those_of_whole_users(case: Case) -> None:
    few = queries_of(case.store, case.examples, LONGEST, 20)
    assert 0 < len(few) <= 20
    assert few.num_in_split == len(case.queries)
    assert_array_equal(few.events, case.queries.events[np.isin(case.queries.users, few.users)])
    assert len(np.unique(few.users)) > 2


@pytest.mark.parametrize("exclude", [True, False])
def test_places_among_all_items(case: Case, exclude: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    num_items = case.store.facts.num_items
    monkeypatch.setattr(din_dist.evaluation.retrieval, "SCORES_BYTES", 4 * num_items * 7)  # seven queries at once
    monkeypatch.setattr(din_dist.evaluation.retrieval, "QUERIES_AT_ONCE", 3)
    scorer = FewScores(num_items)
    places = rank(case.store, case.queries, Task(0, exclude, seed=1), scorer, 28, Runtime())
    for place, target in enumerate(case.queries.targets):
        left_out = set(case.seen[place]) - {target} if exclude else set()
        scores = {item: scorer.one(case.histories[place], item) for item in range(1, num_items + 1)}
        scores = {item: score for item, score in scores.items() if item not in left_out}
        others = [score for item, score in scores.items() if item != target]
        assert places.num_candidates[place] == len(scores)
        assert places.greater[place] == sum(score > scores[target] for score in others)
        assert places.tied[place] == sum(score == scores[target] for score in others)
        best = sorted(scores, key=lambda item: (-scores[item], item))
        assert places.top_items[place].tolist() == [*best, *[0] * 28][:28]
    assert (places.tied > 0).mean() > 0.9


def test_places_among_drawn_items(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are distinct items that the user never touched; the same ones in blocks of any size."""
    store, queries, scorer = case.store, case.queries, FewScores(case.store.facts.num_items)
    task = Task(20, exclude_history=False, seed=1)
    flat, counts = drawn_negatives(store, queries, task)
    negatives = np.split(flat, np.cumsum(counts)[:-1])
    places = rank(store, queries, task, scorer, 25, Runtime())
    for place, (target, user) in enumerate(zip(queries.targets, queries.users, strict=True)):
        touched = set(store.item_ids[store.user_offsets[user] : store.user_offsets[user + 1]].tolist())
        drawn = negatives[place].tolist()
        assert len(drawn) == len(set(drawn)) == min(20, store.facts.num_items - len(touched))
        assert not touched & set(drawn)
        scores = {int(item): scorer.one(case.histories[place], int(item)) for item in [target, *drawn]}
        others = [score for item, score in scores.items() if item != target]
        assert places.num_candidates[place] == len(scores)
        assert places.greater[place] == sum(score > scores[target] for score in others)
        assert places.tied[place] == sum(score == scores[target] for score in others)
        best = sorted(scores, key=lambda item: (-scores[item], item))
        assert places.top_items[place].tolist() == [*best, *[0] * (25 - len(best))]
    assert (counts < 20).any()  # some have touched too many
    monkeypatch.setattr(din_dist.evaluation.retrieval, "PAIRS_AT_ONCE", 1000)
    again = rank(store, queries, task, scorer, 25, Runtime())
    for name in ("greater", "tied", "num_candidates", "top_items"):
        assert_array_equal(getattr(again, name), getattr(places, name))
    other, _ = drawn_negatives(store, queries, Task(20, exclude_history=False, seed=2))
    assert len(other) == len(flat)
    assert (other != flat).any()


@dataclasses.dataclass
class Asked:
    """What a user is asked once, by hand."""

    event: int
    seen: list[int]
    targets: list[int]


def asked_users(case: Case) -> dict[int, Asked]:
    store, found = case.store, {}
    for user in range(store.facts.num_users):
        begin, end = store.user_offsets[user : user + 2]
        own = [event for event in range(begin, end) if event in set(case.examples.events().tolist())]
        chosen = [event for event in own if store.labels is None or store.labels[event]]
        if chosen:
            before = [e for e in range(begin, own[0]) if store.labels is None or store.labels[e]]
            targets = sorted({int(store.item_ids[event]) for event in chosen})
            found[user] = Asked(own[0], [int(store.item_ids[event]) for event in before], targets)
    return found


def test_users_are_asked_once_for_all_that_they_chose(case: Case) -> None:
    queries, expected = queries_of(case.store, case.examples, LONGEST, 10**9, by=USERS), asked_users(case)
    assert queries.users.tolist() == list(expected)
    assert queries.num_in_split == len(expected)
    assert queries.targets.tolist() == [item for asked in expected.values() for item in asked.targets]
    assert queries.num_targets is not None
    assert queries.num_targets.tolist() == [len(asked.targets) for asked in expected.values()]
    assert len(queries.targets) < len(case.queries)  # some chose an item twice
    for place, asked in enumerate(expected.values()):
        window = slice(queries.history_starts[place], queries.history_ends[place])
        assert queries.events[place] == asked.event
        assert case.store.history_item_ids[window].tolist() == asked.seen[-LONGEST:]
    some = queries[2:5]
    assert some.users.tolist() == list(expected)[2:5]
    assert some.targets.tolist() == [item for asked in [*expected.values()][2:5] for item in asked.targets]
    assert some.query_of.tolist() == np.repeat(np.arange(3), queries.num_targets[2:5]).tolist()
    few = queries_of(case.store, case.examples, LONGEST, 5, by=USERS)
    assert 0 < len(few) <= 5
    assert few.num_in_split == len(expected)
    assert few.targets.tolist() == [item for user in few.users for item in expected[user].targets]


@pytest.mark.parametrize("exclude", [True, False])
def test_places_of_all_that_users_chose(case: Case, exclude: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other targets are candidates like every other item, and none of them is left out."""
    num_items, scorer = case.store.facts.num_items, FewScores(case.store.facts.num_items)
    monkeypatch.setattr(din_dist.evaluation.retrieval, "SCORES_BYTES", 4 * num_items * 7)
    monkeypatch.setattr(din_dist.evaluation.retrieval, "QUERIES_AT_ONCE", 3)
    queries, expected = queries_of(case.store, case.examples, LONGEST, 10**9, by=USERS), asked_users(case)
    places = rank(case.store, queries, Task(0, exclude, seed=1), scorer, 28, Runtime())
    target_place = 0
    for query, asked in enumerate(expected.values()):
        left_out = set(asked.seen) - set(asked.targets) if exclude else set()
        every = set(range(1, num_items + 1)) - left_out
        scores = {item: scorer.one(asked.seen[-LONGEST:], item) for item in every}
        assert places.num_candidates[query] == len(scores)
        best = sorted(scores, key=lambda item: (-scores[item], item))
        assert places.top_items[query].tolist() == [*best, *[0] * 28][:28]
        for target in asked.targets:
            others = [score for item, score in scores.items() if item != target]
            assert places.greater[target_place] == sum(score > scores[target] for score in others)
            assert places.tied[target_place] == sum(score == scores[target] for score in others)
            target_place += 1
    assert target_place == len(places.greater)


def test_places_of_all_that_users_chose_among_drawn_items(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    store, scorer, expected = case.store, FewScores(case.store.facts.num_items), asked_users(case)
    queries, task = queries_of(store, case.examples, LONGEST, 10**9, by=USERS), Task(4, False, seed=1)
    flat, counts = drawn_negatives(store, queries, task)
    negatives = np.split(flat, np.cumsum(counts)[:-1])
    places = rank(store, queries, task, scorer, 12, Runtime())
    target_place = 0
    for query, asked in enumerate(expected.values()):
        drawn = negatives[query].tolist()
        assert not set(drawn) & set(asked.targets)
        scores = {int(item): scorer.one(asked.seen[-LONGEST:], int(item)) for item in [*asked.targets, *drawn]}
        assert places.num_candidates[query] == len(scores)
        best = sorted(scores, key=lambda item: (-scores[item], item))
        assert places.top_items[query].tolist() == [*best, *[0] * 12][:12]
        for target in asked.targets:
            others = [score for item, score in scores.items() if item != target]
            assert places.greater[target_place] == sum(score > scores[target] for score in others)
            assert places.tied[target_place] == sum(score == scores[target] for score in others)
            target_place += 1
    monkeypatch.setattr(din_dist.evaluation.retrieval, "PAIRS_AT_ONCE", 50)
    again = rank(store, queries, task, scorer, 12, Runtime())
    for name in ("greater", "tied", "num_candidates", "top_items"):
        assert_array_equal(getattr(again, name), getattr(places, name))


def test_two_ranks_that_ask_users_are_one(case: Case) -> None:
    queries, task = queries_of(case.store, case.examples, LONGEST, 10**9, by=USERS), Task(0, True, seed=1)
    scorer = FewScores(case.store.facts.num_items)
    whole = rank(case.store, queries, task, scorer, 5, Runtime())
    parts = [rank(case.store, queries, task, scorer, 5, OneOfSome(number)) for number in range(2)]
    for name in ("greater", "tied", "num_candidates", "top_items"):
        assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


class Sums(RankingModel):
    """A toy model that `CatalogueScorer` does not know; its head does not see the candidate by itself."""

    def interest(self, items: LookedUp, pairs: Pairs, mode: Mode, history: int = 0) -> tf.Tensor:
        rows = tf.gather(items.behaviours, pairs.behaviour_of)
        return segment_sum(rows, pairs.candidate_of, tf.shape(items.candidate)[0])

    def head_inputs(self, interests: Sequence[tf.Tensor], candidate: tf.Tensor, mode: Mode) -> tf.Tensor:
        return interests[0] * candidate


@pytest.mark.parametrize("kind", [DIN, Sums])
def test_a_model_ranks_as_one_by_one(
    case: Case, tmp_path: Path, kind: type[RankingModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of a model; what it gives the targets among drawn items it gives them among all."""
    monkeypatch.setattr(din_dist.evaluation.retrieval, "PAIRS_AT_ONCE", 7)  # a history takes many parts
    facts, features = case.store.facts, case.store.item_features
    model = assembly.make_model(small_config(tmp_path).model, facts, features, seed=3, model_class=kind)
    model.lookup.item_bias.assign(0.01 * np.arange(case.store.facts.num_items + 1)[:, None])
    scorer = ModelScorer(model, case.store.facts.num_items)
    lengths = np.array([len(history) for history in case.histories])
    flat = np.array([item for history in case.histories for item in history], np.int64)
    told: list[float] = []
    of_all = scorer.of_all(flat, lengths, told.append)
    assert told == sorted(told)
    assert told[-1] == 1
    counts = np.full(len(lengths), 3)
    some = np.tile([2, 9, 30], len(lengths))
    of_some = scorer.of_some(flat, lengths, some, counts).reshape(-1, 3)
    assert_allclose(of_all[:, [1, 8, 29]], of_some, rtol=1e-5, atol=1e-6)
    places = rank(case.store, case.queries, Task(0, False, seed=1), scorer, 5, Runtime())
    of_target = of_all[np.arange(len(lengths)), case.queries.targets - 1][:, None]
    assert_array_equal(places.greater, (of_all > of_target).sum(axis=1))


def test_two_ranks_end_to_end_are_one(case: Case) -> None:
    """Each takes its run; what they gather is the whole."""
    task, scorer = Task(0, True, seed=1), FewScores(case.store.facts.num_items)
    whole = rank(case.store, case.queries, task, scorer, 5, Runtime())
    parts = [rank(case.store, case.queries, task, scorer, 5, OneOfSome(number)) for number in range(2)]
    assert_array_equal(np.concatenate([part.top_items for part in parts]), whole.top_items)
    assert_array_equal(np.concatenate([part.greater for part in parts]), whole.greater)


def test_logits_that_are_no_numbers_are_refused(case: Case) -> None:
    """They would all stand behind the target."""
    scorer = PopularityScorer(np.full(case.store.facts.num_items + 1, np.nan))
    for task in (Task(0, False, seed=1), Task(3, False, seed=1)):
        with pytest.raises(FloatingPointError, match="must be numbers. Received: NaN"):
            rank(case.store, case.queries, task, scorer, 5, Runtime())


def test_progress_is_told_in_between(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks, each told half-way and at its end."""
    num_items, half = case.store.facts.num_items, -(-len(case.queries) // 2)
    monkeypatch.setattr(din_dist.evaluation.retrieval, "SCORES_BYTES", 4 * num_items * half)
    monkeypatch.setattr(din_dist.evaluation.retrieval, "REPORT_SECONDS", 0.0)
    told: list[float] = []
    rank(case.store, case.queries, Task(0, True, 1), FewScores(num_items), 5, Runtime(), lambda s, _: told.append(s))
    first = half / len(case.queries)
    assert told == pytest.approx([first / 2, first, (1 + first) / 2, 1])


def test_metrics_by_hand() -> None:
    """User 3 has events in places 1 and 4, user 8 one in place 2: recall@2 is 2/3, and both have a hit.

    The lists of two name items 5 (chosen 10 times in training) and 6 (twice) of eight. The second and third targets
    were chosen twice and never, which is rare.
    """
    none = np.zeros(3, np.int64)
    queries = Queries(none, np.array([3, 3, 8]), np.array([5, 6, 7]), none, none, none, 3)
    top_items = np.array([[5, 6], [5, 6], [6, 0]])
    places = din_dist.evaluation.retrieval.TargetPositions(np.array([0, 3, 1]), none, none + 4, top_items)
    popularity = np.array([99, 0, 0, 0, 0, 10, 2, 0, 0])
    category_of = np.array([0, 1, 1, 1, 1, 1, 2, 1, 1])
    parts = by_user(queries, places, popularity, [1, 2], category_of)
    ratios = {name: above.sum() / below.sum() for name, (above, below) in parts.items()}
    second = 1 / math.log2(3)
    expected = {
        "mrr": (1 + 1 / 4 + 1 / 2) / 3,
        "recall@1": 1 / 3,
        "recall@2": 2 / 3,
        "ndcg@1": 1 / 3,
        "ndcg@2": (1 + second) / 3,
        "hit_rate@1": 1 / 2,
        "hit_rate@2": 1,
        "mean_popularity@1": (10 + 10 + 2) / 3,
        "mean_popularity@2": (12 + 12 + 2) / 5,
        "rare_mrr": (1 / 4 + 1 / 2) / 2,
        "rare_recall@1": 0,
        "rare_recall@2": 1 / 2,
        "rare_ndcg@1": 0,
        "rare_ndcg@2": second / 2,
        "rare_hit_rate@1": 0,
        "rare_hit_rate@2": 1 / 2,
        "diversity@2": 1,  # the third list has one item, and no pair
    }
    assert ratios == {name: pytest.approx(value) for name, value in expected.items()}
    assert_array_equal(parts["recall@2"][0], [1, 1])
    assert coverages(places, 8, [1, 2]) == {"coverage@1": 2 / 8, "coverage@2": 2 / 8}


def test_metrics_of_users_by_hand() -> None:
    """User 3 sought items 5, 6 and 7 and finds them in places 1, 4 and 2; user 8 sought item 5, in place 2.

    Chosen ten times, twice and never: the median of four targets is 6, so items 6 and 7 are rare.
    """
    none = np.zeros(2, np.int64)
    num_targets = np.array([3, 1])
    queries = Queries(none, np.array([3, 8]), np.array([5, 6, 7, 5]), none, none, none, 2, num_targets)
    top_items = np.array([[5, 7], [6, 5]])
    greater = np.array([0, 3, 1, 1])
    places = din_dist.evaluation.retrieval.TargetPositions(greater, np.zeros(4, np.int64), none + 4, top_items)
    popularity = np.array([99, 0, 0, 0, 0, 10, 2, 0, 0])

    def ratios(*, of_hits: bool) -> dict[str, float]:
        parts = by_user(queries, places, popularity, [1, 2, 4], ideal_of_hits=of_hits)
        return {name: above.sum() / below.sum() for name, (above, below) in parts.items()}

    second, third, fourth = (1 / math.log2(1 + place) for place in (2, 3, 4))
    ideal_of_three = 1 + second + third
    expected = {
        "mrr": (1 + 1 / 2) / 2,
        "recall@1": (1 / 3 + 0) / 2,
        "recall@2": (2 / 3 + 1) / 2,
        "recall@4": 1,
        "ndcg@1": (1 + 0) / 2,
        "ndcg@2": ((1 + second) / (1 + second) + second) / 2,
        "ndcg@4": ((1 + second + fourth) / ideal_of_three + second) / 2,
        "hit_rate@1": 1 / 2,
        "hit_rate@2": 1,
        "hit_rate@4": 1,
        "mean_popularity@1": (10 + 2) / 2,
        "mean_popularity@2": (10 + 0 + 2 + 10) / 4,
        "mean_popularity@4": (10 + 0 + 2 + 10) / 4,
        "rare_mrr": 1 / 2,
        "rare_recall@1": 0,
        "rare_recall@2": 1 / 2,
        "rare_recall@4": 1,
        "rare_ndcg@1": 0,
        "rare_ndcg@2": second / (1 + second),
        "rare_ndcg@4": (second + fourth) / (1 + second),
        "rare_hit_rate@1": 0,
        "rare_hit_rate@2": 1,
        "rare_hit_rate@4": 1,
    }
    found = ratios(of_hits=False)
    assert found == {name: pytest.approx(value) for name, value in expected.items()}
    of_hits = {
        "ndcg@1": (1 + 0) / 2,
        "ndcg@2": (1 + second) / 2,
        "rare_ndcg@2": second,
        "rare_ndcg@4": (second + fourth) / (1 + second),
    }
    assert ratios(of_hits=True) == {name: pytest.approx(value) for name, value in {**expected, **of_hits}.items()}
