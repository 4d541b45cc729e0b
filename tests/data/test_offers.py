"""Features of candidates that are looked up in a table by the item and columns of the event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

from din_dist.config import DataConfig
from din_dist.data.event_store import EventStore
from din_dist.data.pipeline import BatchMaker, ExampleFeatures, training_batches
from din_dist.data.prepared import open_prepared, prepare
from din_dist.data.splits import split_examples
from din_dist.data.statistics import describe
from din_dist.errors import InputError
from din_dist.evaluation.slicing import parts_of
from din_dist.execution import Execution
from din_dist.report.gain import permuted
from tests.support.declared_features import Row, config_for, write_table
from tests.support.featured_log import featured_config

FORMATS = [".parquet", ".csv", ".jsonl"]
# Stored as a1 a2 a3 b1 b2, which are items x y x y z. The last event of each user tests.
ROWS: list[Row] = [
    {"user_id": "a", "item_id": "x", "timestamp": 1, "store": 7, "week": "w1"},
    {"user_id": "a", "item_id": "y", "timestamp": 2, "store": 7, "week": "w2"},
    {"user_id": "a", "item_id": "x", "timestamp": 3, "store": 8, "week": "w1"},
    {"user_id": "b", "item_id": "y", "timestamp": 1, "store": None, "week": "w1"},
    {"user_id": "b", "item_id": "z", "timestamp": 2, "store": 7, "week": "w1"},
]
OFFERS: list[Row] = [
    {"item_id": "y", "store": 7, "week": "w2", "shelf": "front", "price": 3.0},
    {"item_id": "x", "store": 7, "week": "w1", "shelf": "back", "price": 5.0},
    {"item_id": "x", "store": 7, "week": "w1", "shelf": "front", "price": 6.0},  # repeats the row before
    {"item_id": "q", "store": 7, "week": "w1", "shelf": "back", "price": 1.0},  # the log has no q
    {"item_id": "z", "store": 8, "week": "w2", "shelf": "back", "price": 1.0},  # no event is in store 8 in week w2
    {"item_id": "z", "store": 7, "week": "w1", "shelf": "side", "price": 9.0},
    {"item_id": "z", "store": 9, "week": "w1", "shelf": "back", "price": 1.0},  # the log has no store 9
    {"item_id": "y", "store": 7, "week": "w1", "shelf": None, "price": None},
]
DECLARED = """
[shelf]
of = "candidate"
kind = "category"
by = ["store", "week"]
[price]
of = "candidate"
kind = "number"
encode = "none"
by = ["store", "week"]
"""


def config_of(folder: Path, suffix: str = ".parquet", offers: list[Row] | None = None, **settings: Any) -> DataConfig:
    declared = settings.pop("declared", DECLARED)
    log = write_table(folder / f"log{suffix}", settings.pop("rows", ROWS))
    table = write_table(folder / f"offers{suffix}", OFFERS if offers is None else offers)
    return config_for(log, declared, item_features=(), offers_path=str(table), **settings)


def values_of(store: EventStore, events: list[int], items: list[str]) -> tuple[list[Any], np.ndarray]:
    """The shelf and the price of some items, by their own ids, as offered at some events."""
    dense = {own: number for number, own in enumerate(store.vocabulary("items").to_pylist(), start=1)}
    found = ExampleFeatures(store).of(
        tf.zeros([len(events)], tf.int64), tf.constant(events, tf.int64), tf.constant([dense[item] for item in items])
    )
    shelves = [None, *store.feature_vocabulary("shelf").to_pylist()]
    assert isinstance(found, dict)
    return [shelves[row] for row in found["shelf"].numpy()], found["price"].numpy()


@pytest.mark.parametrize("suffix", FORMATS)
def test_items_have_the_values_of_the_event_s_circumstances(tmp_path: Path, suffix: str) -> None:
    """Shelf "side" is that of a test event alone, so it is unknown. The first of two rows stays."""
    store = prepare(config_of(tmp_path, suffix))
    shelves, prices = values_of(store, [0, 1, 2, 3, 4], ["x", "y", "x", "y", "z"])
    assert shelves == ["back", "front", None, None, None]
    assert_array_equal(prices, [5, 3, np.nan, np.nan, 9])
    shelves, prices = values_of(store, [1, 0, 0, 4], ["x", "z", "y", "x"])  # as a drawn negative
    assert shelves == [None, None, None, "back"]
    assert_array_equal(prices, [np.nan, 9, np.nan, 5])
    counts = store.features["shelf"].encoding.counts
    assert (counts.distinct, counts.missing, counts.rare) == (3, 2, 1)
    assert (
        "table of offers: 8 rows, 3 without events, 1 repeat an earlier one, which counts; 2 events without a row"
        in (describe(store, 10))
    )
    shelves = parts_of(store, split_examples(store, config_of(tmp_path, suffix))["train"], "shelf")
    assert [shelves.names[part] for part in shelves.part_of[::2]] == ["front"]  # of event a2


def test_numbers_are_standardized_by_the_training_events_that_have_them(tmp_path: Path) -> None:
    """Of events a1 a2 b1 these are 5 and 3. Rows that no training event asks for change nothing."""
    declared = DECLARED.replace('"none"', '"standard"')
    found = prepare(config_of(tmp_path, declared=declared)).features["price"].encoding
    assert (found.mean, found.deviation) == (4, 1)


def test_an_item_whose_id_is_hidden_keeps_its_offer(tmp_path: Path) -> None:
    """Batches have -i in its place."""
    rows = ExampleFeatures(prepare(config_of(tmp_path)))
    users, events = tf.zeros([3], tf.int64), tf.constant([0, 1, 4], tf.int64)
    shown, hidden = (rows.of(users, events, tf.constant([1, 2, 3]) * sign)["price"].numpy() for sign in (1, -1))
    assert_array_equal(shown, [5, 3, 9])
    assert_array_equal(hidden, shown)


def test_integers_match_their_text(tmp_path: Path) -> None:
    offers = [{**row, "store": str(row["store"])} for row in OFFERS]
    prices = values_of(prepare(config_of(tmp_path, offers=offers)), [0, 1, 4], ["x", "y", "z"])[1]
    assert prices.tolist() == [5, 3, 9]


def test_one_column_and_a_feature_of_it(tmp_path: Path) -> None:
    """The column may be a feature of the context as well."""
    declared = DECLARED.replace('["store", "week"]', '["store"]') + '[store]\nof = "context"\nkind = "category"'
    store = prepare(config_of(tmp_path, declared=declared))
    assert values_of(store, [0, 1], ["x", "y"])[0] == ["back", "front"]
    assert store.features["store"].values.tolist() == [1, 1, 0, 0, 1]


def test_permuted_circumstances(tmp_path: Path) -> None:
    """For the gain of a feature: the others keep theirs."""
    store = prepare(config_of(tmp_path))
    shelves, prices = values_of(permuted(store, "shelf", np.array([4, 3, 1, 2, 0])), [0, 1, 2], ["y", "y", "y"])
    assert shelves == [None, None, "front"]
    assert_array_equal(prices, values_of(store, [0, 1, 2], ["y", "y", "y"])[1])


@pytest.mark.parametrize("native", [False, True])
def test_drawn_negatives_have_the_offers_of_their_event(tmp_path: Path, native: bool) -> None:
    """Every value of every batch, against a dictionary of the table."""
    config = featured_config(tmp_path, labels=False).data
    store = prepare(config)
    train = split_examples(store, config)["train"]
    maker = BatchMaker.for_training(store, train, config, 1, execution=Execution(kernels=native))
    import pyarrow.parquet as pq

    table = {(row["item_id"], row["device id"]): row for row in pq.read_table(tmp_path / "offers.parquet").to_pylist()}
    log = {(row["user_id"], row["timestamp"]): row for row in pq.read_table(tmp_path / "log.parquet").to_pylist()}
    users, items = store.vocabulary("users").to_pylist(), store.vocabulary("items").to_pylist()
    perks = [None, *store.feature_vocabulary("perks").to_pylist()]
    encoding = store.features["discount"].encoding
    num_given = 0
    for batch in training_batches(maker, config, global_batch_size=64, steps=range(20)):
        user_of, event_of = train.users_and_events(batch.example_ids.numpy())
        ends = np.cumsum(batch.features["perks"].lengths)
        for place, (user, event) in enumerate(zip(user_of, event_of, strict=True)):
            row = log[users[user], int(store.timestamps[event])]
            offer = table.get((items[batch.candidate_item_ids[place] - 1], row["device id"]), {})
            wanted = np.nan if offer.get("discount") is None else offer["discount"]
            found = batch.features["discount"][place] * encoding.deviation + encoding.mean
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
            rows = batch.features["perks"].values[ends[place] - batch.features["perks"].lengths[place] : ends[place]]
            assert [perks[number] for number in rows] == offer.get("perks", [])
            num_given += bool(offer) and float(batch.labels[place]) == 0
    assert num_given > 100


def test_a_table_that_changed_is_noticed(tmp_path: Path) -> None:
    prepare(config_of(tmp_path))
    config = config_of(tmp_path, offers=OFFERS[:-1])
    with pytest.raises(InputError, match=r"offers\.parquet: this file has changed since the data was prepared"):
        open_prepared(config)


WRONG_TABLES: dict[str, tuple[list[Row], str]] = {
    "a value": (
        [*OFFERS[3:5], {**OFFERS[0], "price": "dear"}],
        r"offers\.csv, row 3: price must hold numbers\. Received",
    ),
    "no column": ([{"item_id": "x", "store": 7, "shelf": "back", "price": 1}], "column 'week' is missing"),
    "other ids": (
        [{**row, "item_id": "nothing"} for row in OFFERS],
        "its ids must be those of the log. Received: none that the log has, for example 'nothing'. Correct "
        "--offers_path, or the column item_id, store, week.",
    ),
}


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_wrong_tables(tmp_path: Path, case: str) -> None:
    offers, message = WRONG_TABLES[case]
    with pytest.raises(InputError, match=message) as caught:
        prepare(config_of(tmp_path, ".csv", offers=offers))
    assert len(str(caught.value).splitlines()) == 1


def test_a_log_without_the_circumstances(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "week"} for row in ROWS]
    with pytest.raises(InputError, match="log.parquet: column 'week' is missing"):
        prepare(config_of(tmp_path, rows=rows))
