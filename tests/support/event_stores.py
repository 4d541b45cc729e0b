"""Makes event stores from rows in a test, and checks any store against a slow grouping in plain Python.

store = store_of([{"user_id": "u", "item_id": "i", "timestamp": 1, "category_id": "c"}], tmp_path / "store", 99)
check_against_plain_python(store, rows)
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.data import blocks as blocks_module
from din_dist.data import event_store
from din_dist.data.builders.base import EventTally, write_beside
from din_dist.data.event_store import EventStore, open_store, pack
from din_dist.data.log_reader import Columns, read_log


def store_of(rows: list[dict], folder: Path, events_per_block: int) -> EventStore:
    """Writes `rows` as a log, then reads, sorts, packs and opens it, as `prepare` does but without TFDS's records.

    Args:
        rows: each has user_id, item_id, category_id and timestamp, and may have label.
        folder: is made; holds the log and the store.
        events_per_block: about how many events each block of whole users has.
    """
    folder.mkdir()
    table = pa.Table.from_pylist(rows)
    if pa.types.is_null(table["category_id"].type):
        table = table.set_column(3, "category_id", table["category_id"].cast(pa.string()))
    pq.write_table(table, folder / "log.parquet")
    with mock.patch.object(blocks_module, "EVENTS_PER_BLOCK", events_per_block):
        log = read_log([folder / "log.parquet"], Columns())
    tally = EventTally()
    for block in log.blocks:
        tally.add(block)
    write_beside(folder, log, tally, {}, "fingerprint")
    pack(folder, event_store.read_facts(folder), log.blocks)
    return open_store(folder, ["category_id"])


def check_against_plain_python(store: EventStore, rows: list[dict]) -> None:
    """Asserts that `store` holds the events of `rows`, grouped by user, in the order of time, with their histories."""
    labelled = "label" in rows[0]
    users, items = (list(dict.fromkeys(row[name] for row in rows)) for name in ("user_id", "item_id"))
    categories = list(dict.fromkeys(row["category_id"] for row in rows if row["category_id"] is not None))
    assert store.vocabulary("users").to_pylist() == users
    assert store.vocabulary("items").to_pylist() == items
    assert store.vocabulary("category_id").to_pylist() == categories
    facts = store.facts
    assert (facts.num_users, facts.num_items, facts.num_events) == (len(users), len(items), len(rows))
    assert facts.has_labels == labelled == (store.labels is not None)
    assert facts.item_features == {"category_id": len(categories)}
    assert facts.first_timestamp == min(row["timestamp"] for row in rows)
    assert facts.last_timestamp == max(row["timestamp"] for row in rows)
    for item, name in enumerate(items, start=1):
        category = next(row["category_id"] for row in rows if row["item_id"] == name)
        expected = 0 if category is None else categories.index(category) + 1
        assert store.item_features["category_id"][item] == expected
    assert store.item_features["category_id"][0] == 0

    event = 0
    for user, name in enumerate(users):
        own = sorted((row for row in rows if row["user_id"] == name), key=lambda row: row["timestamp"])
        assert store.user_offsets[user : user + 2].tolist() == [event, event + len(own)]
        history: list[int] = []  # of all that comes before
        for row in own:
            if labelled:
                earlier = [row for row in own if row["label"] and row["timestamp"] < store.timestamps[event]]
                history = [items.index(row["item_id"]) + 1 for row in earlier]
            item = items.index(row["item_id"]) + 1
            assert store.item_ids[event] == item
            assert store.timestamps[event] == row["timestamp"]
            end = event if store.history_ends is None else store.history_ends[event]
            assert store.history_item_ids[store.history_offsets[user] : end].tolist() == history
            if store.labels is not None:
                assert store.labels[event] == row["label"]
            history = [*history, item]
            event += 1
        if store.touched_gaps is not None and store.touched_offsets is not None:
            touched = sorted({items.index(row["item_id"]) + 1 for row in own})
            gaps = store.touched_gaps[store.touched_offsets[user] : store.touched_offsets[user + 1]]
            assert gaps.tolist() == [item - 1 - rank for rank, item in enumerate(touched)]
            untouched = [item for item in range(1, len(items) + 1) if item not in touched]
            drawn = [r + 1 + int(np.searchsorted(gaps, r, side="right")) for r in range(len(untouched))]
            assert drawn == untouched  # what the gaps are for
    assert event == len(store.item_ids) == store.user_offsets[-1]
