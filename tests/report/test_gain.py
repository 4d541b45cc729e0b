"""The worth of features, of models whose features are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from din_dist.config import Split
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.data.splits import Examples, split_examples
from din_dist.features.spec import Owner
from din_dist.report.gain import gains, permuted
from tests.support.featured_log import featured_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventStore, Examples]:
    config = featured_config(
        tmp_path_factory.mktemp("log"), split=Split.TEMPORAL, validation_from=1_701_000_000, test_from=1_702_000_000
    )
    store = prepare(config.data)
    return store, split_examples(store, config.data)["test"]


def test_only_the_feature_that_a_model_reads_is_worth_something(data: tuple[EventStore, Examples]) -> None:
    """A model that knows the label by a feature, whoever owns it: GAUC 1 without, about 0.5 with a permutation."""
    store, examples = data
    events, users = examples.events(), examples.user_of_example()
    for name, rows in (("price", events), ("device", events), ("brand", store.item_ids[events])):

        def logits(other: EventStore, name: str = name, rows: np.ndarray = rows) -> np.ndarray:
            return other.features[name].values[rows].astype(np.float64) > 1

        labels = logits(store).astype(np.uint8)
        asked: list[Owner] = []

        def logits_with(other: EventStore, owner: Owner, asked: list[Owner] = asked) -> np.ndarray:
            asked.append(owner)
            return logits(other)

        result = {gain.name: gain for gain in gains(store, examples, labels, logits(store), logits_with, seed=1)}
        assert set(result) == set(store.features)
        assert [gain.owner for gain in result.values()] == list(map(str, asked))
        for other, gain in result.items():
            if other == name:
                assert 0.1 < gain.low <= gain.value <= gain.high < 0.8  # one permutation of 30 items is one draw
            else:
                assert (gain.value, gain.low, gain.high) == (0, 0, 0)
    assert len(set(users)) > 10


def test_permuted_features_have_the_values_that_they_had(data: tuple[EventStore, Examples]) -> None:
    store, _ = data
    for name, feature in store.features.items():
        if feature.offers is not None:  # tests/data/test_offers.py
            continue
        num_rows = len(feature.values) if feature.offsets is None else len(feature.offsets) - 1
        order = np.random.default_rng(0).permutation(num_rows)
        other = permuted(store, name, order).features[name]
        assert {other_name for other_name in store.features if store.features[other_name] is not feature} == {
            other_name for other_name in store.features if other_name != name
        }
        for row in range(0, num_rows, 7):
            if feature.offsets is None or other.offsets is None:
                assert_array_equal(other.values[row], feature.values[order[row]])
                continue
            own, before = (
                slice(*offsets[place : place + 2])
                for offsets, place in ((other.offsets, row), (feature.offsets, order[row]))
            )
            assert_array_equal(other.values[own], feature.values[before])
            if feature.weights is not None and other.weights is not None:
                assert_array_equal(other.weights[own], feature.weights[before])
