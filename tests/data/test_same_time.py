"""Events of one user at one time: with labels none of them is in the history of another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist import assembly, schema
from din_dist.config import Config, Split
from din_dist.data import event_store
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import open_prepared, prepare
from din_dist.data.splits import SPLITS
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.schema import Batch
from din_dist.serving.batch.histories import UserHistories
from din_dist.tables.ids import Ids
from din_dist.training.checkpoint import CheckpointStore
from din_dist.training_state import TrainingState
from tests.support.small_log import small_config

PAGES_PER_USER, ITEMS_PER_PAGE = 12, 5
NUM_CATEGORIES, ITEMS_PER_CATEGORY = 30, 8


def pages(num_users: int, seed: int = 0) -> list[dict]:
    """Pages of items of one category that are shown at one time; one of each is clicked, at random."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        for page in range(PAGES_PER_USER):
            category = int(random.integers(NUM_CATEGORIES))
            items = category * ITEMS_PER_CATEGORY + random.choice(ITEMS_PER_CATEGORY, ITEMS_PER_PAGE, replace=False)
            clicked = random.integers(ITEMS_PER_PAGE)
            rows += [
                {
                    "user_id": f"u{user}",
                    "item_id": f"i{item}",
                    "category_id": f"c{category}",
                    "timestamp": 1000 + page,
                    "label": int(place == clicked),
                }
                for place, item in enumerate(items)
            ]
    return rows


def in_two_files(rows: list[dict], folder: Path) -> None:
    for name, label in (("clicks", 1), ("impressions", 0)):
        write(folder / f"{name}.parquet", [row for row in rows if row["label"] == label])


def write(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


ORDERS: dict[str, Callable[[list[dict], Path], None]] = {
    "clicked first": lambda rows, folder: write(folder / "log.parquet", sorted(rows, key=lambda row: -row["label"])),
    "clicked last": lambda rows, folder: write(folder / "log.parquet", sorted(rows, key=lambda row: row["label"])),
    "shuffled": lambda rows, folder: write(folder / "log.parquet", np.random.default_rng(1).permutation(rows).tolist()),
    "two files": in_two_files,
}


def config_of(folder: Path, order: str, rows: list[dict], **settings: object) -> Config:
    log = folder / "log"
    log.mkdir()
    ORDERS[order](rows, log)
    return small_config(folder, data_path=str(log), split=Split.TEMPORAL, **settings)


def histories(store: EventStore) -> list[list[str]]:
    """Each event's history, in the ids of the log."""
    assert store.history_ends is not None
    users = np.repeat(np.arange(store.facts.num_users), np.diff(store.user_offsets))
    starts = store.history_offsets[users]
    windows = zip(starts, store.history_ends, strict=True)
    return [store.own_ids(event_store.ITEMS, store.history_item_ids[start:end]) for start, end in windows]


def test_a_history_ends_before_the_time_of_its_event(tmp_path: Path) -> None:
    shown = [("i9", 10, 1), ("i1", 20, 1), ("i2", 20, 0), ("i3", 20, 0), ("i4", 20, 0)]
    rows = [{"user_id": "u", "item_id": item, "timestamp": time, "label": label} for item, time, label in shown]
    for order in ORDERS:
        folder = tmp_path / order
        folder.mkdir()
        store = prepare(config_of(folder, order, rows).data)
        assert histories(store) == [[], ["i9"], ["i9"], ["i9"], ["i9"]]


@pytest.mark.thorough(unless=lambda case: case["order"] in ("two files", "clicked first"))
@pytest.mark.parametrize("order", ORDERS)
def test_random_clicks_cannot_be_foretold(tmp_path: Path, order: str) -> None:
    """The clicked item of a page is at random: whoever ranks it better than chance has seen the click."""
    rows = pages(num_users=300)
    config = config_of(
        tmp_path, order, rows, epochs=3, learning_rate=0.01, optimizer="lazy_adam", validation_from=1007, test_from=1008
    )
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    job.trainer.train()
    found = {"model": job.trainer.test(), **job.evaluator.floors("test")}
    assert found["model"]["num_examples"] == 300 * 4 * ITEMS_PER_PAGE
    for name, metrics in found.items():
        assert abs(metrics["gauc"] - 0.5) < 0.04, (name, metrics["gauc"])


@pytest.mark.parametrize("order", ORDERS)
def test_training_and_scoring_by_time_are_one(tmp_path: Path, order: str) -> None:
    """`predict --before_column` gives each event the history that training, evaluation and the floors give it."""
    config = config_of(tmp_path, order, pages(num_users=30), max_history_length=PAGES_PER_USER)
    store = prepare(config.data)
    job = assembly.Assembly(config, Runtime(), store)
    by_time = UserHistories(store, config.data.max_history_length)
    for split in SPLITS:
        examples = job.splits[split]
        events, users = examples.events(), examples.user_of_example()
        own_users = pa.array(store.own_ids(event_store.USERS, users + 1))
        items, lengths = by_time.of(Ids(own_users), store.timestamps[events])
        assert lengths.max() > 5
        batch = Batch(
            candidate_item_ids=store.item_ids[events],
            history_item_ids=dense(store, items.part(0, int(lengths.sum())).numpy()),
            history_lengths=lengths.astype(np.int32),
        )
        logits = job.model(batch, training=False).numpy()
        np.testing.assert_allclose(job.evaluator.scores(split, job.model), logits, atol=1e-6)


def dense(store: EventStore, own_ids: np.ndarray) -> np.ndarray:
    number_of = {item.encode(): place for place, item in enumerate(store.vocabulary(event_store.ITEMS).to_pylist(), 1)}
    return np.array([number_of[item] for item in own_ids], np.int32)


def as_an_earlier_version_left_it(store: EventStore) -> None:
    """Cut by the order of the events, and without a word of it."""
    assert store.labels is not None
    fields = store.facts.to_json() | {"fingerprint": "of an earlier version"}
    del fields["history_rule"]
    (store.folder / schema.FACTS_FILE).write_text(json.dumps(fields))
    in_order = np.concatenate([[0], np.cumsum(store.labels, dtype=np.int64)[:-1]])
    np.save(store.folder / event_store.PACKED_DIR / "history_ends.npy", in_order)


@pytest.mark.parametrize("source", ["there", "gone"])
def test_data_that_an_earlier_version_prepared(tmp_path: Path, source: str) -> None:
    config = config_of(tmp_path, "two files", pages(num_users=5))
    expected = prepare(config.data)
    ends = np.array(expected.history_ends)  # a copy: the file is about to be written over
    as_an_earlier_version_left_it(expected)
    if source == "gone":
        (tmp_path / "log").rename(tmp_path / "elsewhere")
    for opened in (open_prepared(config.data), open_prepared(config.data)):
        np.testing.assert_array_equal(opened.history_ends, ends)
        assert opened.facts.history_rule is schema.HistoryRule.BEFORE_TIME
        assert opened.facts.fingerprint != "of an earlier version"
        assert dataclasses.replace(opened.facts, fingerprint="") == dataclasses.replace(expected.facts, fingerprint="")
    assert not list(opened.folder.glob("packed.*"))


def test_a_checkpoint_of_the_old_rule_is_not_gone_on_from(tmp_path: Path) -> None:
    config = config_of(tmp_path, "two files", pages(num_users=5))
    as_an_earlier_version_left_it(prepare(config.data))
    model = assembly.Assembly(config, Runtime(), prepare(config.data)).model
    variables = {weight.path: weight.value for weight in model.weights}
    CheckpointStore(config, "of an earlier version", Runtime()).save(variables, TrainingState(step=3))
    now = CheckpointStore(config, open_prepared(config.data).facts.fingerprint, Runtime())
    with pytest.raises(InputError, match="data that was prepared anew, from a changed source or by another version"):
        now.restore(variables)


def test_without_labels_nothing_is_other_than_it_was(tmp_path: Path) -> None:
    """The next item of a basket: events of one time count in the order of the file. Facts that say nothing are good."""
    rows = [{name: value for name, value in row.items() if name != "label"} for row in pages(num_users=5)]
    write(tmp_path / "plain.parquet", rows)
    config = small_config(tmp_path, data_path=str(tmp_path / "plain.parquet"))
    store = prepare(config.data)
    assert store.history_ends is None
    fields = store.facts.to_json()
    assert fields.pop("history_rule") == "before_event"
    (store.folder / schema.FACTS_FILE).write_text(json.dumps(fields))
    before = (store.folder / event_store.PACKED_DIR).stat().st_ino
    assert open_prepared(config.data).facts == store.facts
    assert (store.folder / event_store.PACKED_DIR).stat().st_ino == before
