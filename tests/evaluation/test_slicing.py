"""Parts of the examples by features of every kind, against the rows of the log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.data.splits import Examples, split_examples
from din_dist.evaluation.slicing import MISSING, parts_of
from tests.support.featured_log import featured_config


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventStore, Examples, list[dict]]:
    """The events to test, each with its row of the log."""
    folder: Path = tmp_path_factory.mktemp("log")
    config = featured_config(folder)
    store = prepare(config.data)
    examples = split_examples(store, config.data)["test"]
    rows = {(row["user_id"], row["timestamp"]): row for row in pq.read_table(folder / "log.parquet").to_pylist()}
    users = store.vocabulary("users").to_pylist()
    events = examples.events()
    found = [
        rows[users[user], int(store.timestamps[event])]
        for user, event in zip(examples.user_of_example(), events, strict=True)
    ]
    return store, examples, found


def test_categories_and_days_are_named(case: tuple[EventStore, Examples, list[dict]]) -> None:
    store, examples, rows = case
    for name, column in (("age", "age"), ("device", "device id"), ("brand", "brand")):
        parts = parts_of(store, examples, name)
        found = [parts.names[part] for part in parts.part_of]
        expected = [MISSING if row[column] is None else str(row[column]) for row in rows]
        known = set(store.feature_vocabulary(name).to_pylist())
        expected = [text if text in map(str, known) else MISSING for text in expected]
        assert found == expected, name
    days = parts_of(store, examples, "weekday")
    assert {days.names[part] for part in days.part_of} <= {
        *("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    }


def test_numbers_are_ranges_and_missing_ones_apart(case: tuple[EventStore, Examples, list[dict]]) -> None:
    store, examples, rows = case
    for name, column in (("income", "income"), ("price", "price"), ("page größe", "page"), ("weight", "weight")):
        parts = parts_of(store, examples, name)
        for row, part in zip(rows, parts.part_of, strict=True):
            text = parts.names[part]
            assert (row[column] is None) == (text == MISSING)
            if row[column] is not None:
                low, _, high = text.partition(" to ")
                tolerance = 1e-4 * abs(row[column]) + 1e-6
                assert float(low) - tolerance <= row[column] <= float(high or low) + tolerance
        assert len(parts.names) >= 3


def test_lists_are_cut_by_their_length_and_vectors_by_being_there(
    case: tuple[EventStore, Examples, list[dict]],
) -> None:
    store, examples, rows = case
    parts = parts_of(store, examples, "badges")
    lengths = np.array([len(row["badges"]) for row in rows])
    for part in set(parts.part_of.tolist()):
        here = lengths[parts.part_of == part]
        low, _, high = parts.names[part].partition("–")
        assert int(low) == here.min() and int(high or low) == here.max()
    for name, column in (("taste", "taste"), ("picture", "picture"), ("text", "text"), ("style", "taste")):
        parts = parts_of(store, examples, name)
        assert [parts.names[part] for part in parts.part_of] == [
            MISSING if row[column] is None else "given" for row in rows
        ], name
