"""Fewer examples have the scores that they had; slices and the correction for drawn negatives, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from din_dist import assembly
from din_dist.config import DataConfig, Split
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.data.splits import item_counts, split_examples
from din_dist.data.thinning import thin_out
from din_dist.distributed.runtime import Runtime
from din_dist.evaluation.evaluator import Evaluator
from din_dist.evaluation.request import EvaluationRequest
from din_dist.evaluation.retrieval import ModelScorer
from din_dist.evaluation.summary import rank_split
from din_dist.metrics.calibration import calibration
from din_dist.metrics.ranking import log_loss
from din_dist.report import retrieval
from din_dist.report.scoring import MODEL, ScoredExamples, evaluate, score
from tests.support.small_log import small_config


@pytest.fixture(scope="module")
def store_and_config(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventStore, object]:
    config = small_config(tmp_path_factory.mktemp("log"), split=Split.LEAVE_TWO_OUT)
    return prepare(config.data), config


def test_thinned_examples_get_the_scores_they_had(store_and_config) -> None:
    """Also the drawn negatives are the same; and the floors still count the whole training data."""
    store, config = store_and_config
    splits = split_examples(store, config.data)
    model = assembly.make_model(config.model, store.facts, store.item_features, seed=1)
    thinned = thin_out(splits["test"], 30)
    assert 0 < thinned.num_examples <= 30 < splits["test"].num_examples
    evaluator = Evaluator(config, store, {**splits, "scored": thinned}, Runtime())
    whole, part = (score(evaluator, name, ex, model) for name, ex in (("test", splits["test"]), ("scored", thinned)))
    kept = np.isin(whole.users, thinned.users)
    for name in whole.rankings:
        np.testing.assert_allclose(part.rankings[name], whole.rankings[name][kept], rtol=1e-5, atol=1e-6)
    for name in ("labels", "users", "candidates", "history_lengths"):
        assert_array_equal(getattr(part, name), getattr(whole, name)[kept])


def test_the_evaluation_is_the_evaluators(store_and_config) -> None:
    store, config = store_and_config
    splits = split_examples(store, config.data)
    model = assembly.make_model(config.model, store.facts, store.item_features, seed=1)
    evaluator = Evaluator(config, store, splits, Runtime())
    scored = score(evaluator, "test", splits["test"], model)
    found = evaluate(scored, store, config.data, item_counts(store, splits), "test", len(scored.labels))
    expected = evaluator.evaluate("test", model)
    model_ranking, *floors = found.rankings
    assert (model_ranking.gauc, model_ranking.auc) == pytest.approx((expected["gauc"], expected["auc"]))
    assert found.log_loss == pytest.approx(expected["log_loss"])
    assert {floor.name: floor.gauc for floor in floors} == {
        name: pytest.approx(values["gauc"]) for name, values in evaluator.floors("test").items()
    }
    assert [table.title for table in found.tables] == ["history length", "item popularity", "category_id"]
    for table in found.tables:
        assert sum(part.num_examples for part in table.slices) == found.num_examples
        assert all(part.num_positives == part.num_examples / 2 for part in table.slices), table.title
    assert {part.name for part in found.tables[2].slices} <= {f"c{i}" for i in range(5)}
    assert found.base_log_loss == pytest.approx(math.log(2))
    best = max(floor.gauc for floor in floors)
    assert found.gain.value == pytest.approx(model_ranking.gauc - best, abs=1e-6)
    for table in found.tables:
        for part, gain in zip(table.slices, table.gains, strict=True):
            ours, *others = part.values.values()
            assert gain.value == pytest.approx(ours - max(others), abs=1e-6)
            assert gain.low - 1e-9 <= gain.value <= gain.high + 1e-9


def test_the_first_places_are_those_of_evaluate(store_and_config) -> None:
    store, config = store_and_config
    splits = split_examples(store, config.data)
    model = assembly.make_model(config.model, store.facts, store.item_features, seed=1)
    scorer = ModelScorer(model, store.facts.num_candidates, store)
    found = retrieval.find(store, splits["test"], config, item_counts(store, splits), scorer)
    assert found is not None
    asked = EvaluationRequest("test", 0, found.excludes_history, retrieval.KS[:2], None, 0)
    expected = rank_split(asked, config, store, splits, scorer, Runtime(), lambda _: None)
    assert [row.k for row in found.rows] == [1, 10]  # of 30 items
    for row in found.rows:
        assert row.ours == pytest.approx(expected["metrics"][f"recall@{row.k}"])
        assert row.popularity == pytest.approx(expected["floors"]["popularity"][f"recall@{row.k}"])
        assert row.low <= row.gain <= row.high
    assert found.num_events == expected["num_events"]
    assert found.repeats == pytest.approx(expected["num_events_of_repeats"] / expected["num_events"])


def test_drawn_negatives_go_with_their_event() -> None:
    scored = ScoredExamples({}, np.zeros(6), np.zeros(6), np.array([7, 1, 2, 8, 3, 4]), np.zeros(6), draws_per_row=3)
    assert_array_equal(scored.by_row(scored.candidates), [7, 7, 7, 8, 8, 8])


def test_the_correction_for_drawn_negatives(store_and_config) -> None:
    """A model that was right for 4 negatives per positive: odds 1/4 where they are 1 here."""
    store, _ = store_and_config
    logits = np.full(4, math.log(1 / 4))
    labels, zeros = np.array([1, 0, 1, 0]), np.zeros(4, np.int64)
    scored = ScoredExamples({MODEL: logits}, labels, np.array([0, 0, 1, 1]), zeros + 1, zeros + 1, draws_per_row=2)
    counts = np.zeros(store.facts.num_items + 1, np.int64)
    found = evaluate(scored, store, DataConfig(negatives_per_positive=4), counts, "test", 4)
    assert found.calibration.error == pytest.approx(0.3)  # .2 was said, .5 came
    assert found.corrected == (pytest.approx(math.log(2)), calibration(np.full(4, 0.5), labels))
    assert found.log_loss == pytest.approx(log_loss(logits, labels))
    assert evaluate(scored, store, DataConfig(), counts, "test", 4).corrected is None


def test_own_ids(store_and_config) -> None:
    store, _ = store_and_config
    first, unknown = store.own_ids("category_id", np.array([1, 0]))
    assert first.startswith("c")
    assert unknown == "(unknown)"


def test_a_log_with_labels_has_no_mixture_to_correct(tmp_path: Path) -> None:
    """Its examples are sliced each by its own candidate."""
    config = small_config(tmp_path, labels=True, split=Split.TEMPORAL, negatives_per_positive=4)
    store = prepare(config.data)
    splits = split_examples(store, config.data)
    model = assembly.make_model(config.model, store.facts, store.item_features, seed=1)
    scored = score(Evaluator(config, store, splits, Runtime()), "test", splits["test"], model)
    found = evaluate(scored, store, config.data, item_counts(store, splits), "test", len(scored.labels))
    assert found.corrected is None
    assert scored.draws_per_row == 1
    categories = {part.name: part.num_examples for part in found.tables[2].slices}
    names = store.own_ids("category_id", store.item_features["category_id"][scored.candidates])
    assert categories == {name: names.count(name) for name in set(names)}
