"""Named histories, and the long one of the candidate's category, against plain Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from din_dist.assembly import Assembly
from din_dist.config import Config, HistoryEnds, UnknownItem
from din_dist.data.event_store import EventStore
from din_dist.data.pipeline import BatchMaker
from din_dist.data.prepared import open_prepared, prepare
from din_dist.data.splits import split_examples
from din_dist.data.statistics import describe
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.layers.packed import split_histories
from tests.support.declared_features import Row, write_table
from tests.support.small_log import small_config
from tests.support.thorough import up_to

ACTIONS = ["view", "buy", None]


def config_of(folder: Path, rows: list[Row], **data: Any) -> Config:
    log = write_table(folder / "log.jsonl", rows)
    return small_config(folder, **{"data_path": str(log)} | data)


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Row], dict[str, Any]]:
    """Rows full of ties, with or without labels, and settings of their histories."""
    labelled = draw(st.booleans())
    rows = []
    for number in range(draw(st.integers(4, 30))):
        item = draw(st.integers(0, 7))
        row: Row = {
            "user_id": "abc"[number % 3],
            "item_id": f"i{item}",
            "timestamp": draw(st.integers(0, 8)),
            "category_id": [None, "x", "y"][item % 3],
            "action": draw(st.sampled_from(ACTIONS)),
        }
        rows.append(row | ({"label": draw(st.integers(0, 1))} if labelled else {}))
    rows += [row | {"user_id": "d", "item_id": "i9", "category_id": "z"} for row in rows[:2]]
    rows += [row | {"user_id": "d", "item_id": "i8", "category_id": "z"} for row in rows[:2]]
    rows[0]["action"], rows[1]["action"] = "view", "buy"
    names = ["view:2", "buy:3", "all:4", *(["skipped:2"] if labelled else [])]
    data = {"histories": tuple(draw(st.permutations(names))), "action_column": "action"}
    data["long_history"] = f"category_id:{draw(st.integers(1, 4))}"
    data["history_ends"] = draw(st.sampled_from([HistoryEnds.BEFORE_TIME, HistoryEnds.BEFORE_EVENT]))
    return rows, data


def plain(rows: list[Row], place: int, name: str, candidate: Row, before_event: bool) -> list[str]:
    """The items of a named history of the event at a place, for a candidate; `rows` are in the store's order."""
    user = [(number, row) for number, row in enumerate(rows) if row["user_id"] == rows[place]["user_id"]]
    now = rows[place]["timestamp"]
    earlier = [row for number, row in user if (number < place if before_event else row["timestamp"] < now)]
    clicked = [row for row in earlier if row.get("label", 1)]
    match name:
        case "all":
            found = clicked
        case "skipped":
            found = [row for row in earlier if not row["label"]]
        case "long":
            category = candidate["category_id"]
            found = [row for row in clicked if category is not None and row["category_id"] == category]
        case _:
            found = [row for row in clicked if row["action"] == name]
    return [row["item_id"] for row in found]


@settings(max_examples=up_to(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(logs(), st.sampled_from([UnknownItem.UNTRAINED, UnknownItem.FEATURES]))
def test_batches_have_the_histories_of_plain_python(tmp_path_factory: Any, log: Any, unknown: UnknownItem) -> None:
    rows, data = log
    config = config_of(tmp_path_factory.mktemp("log"), rows, **data)
    store = prepare(config.data)
    users = store.vocabulary("users").to_pylist()
    rows = sorted(rows, key=lambda row: (users.index(row["user_id"]), row["timestamp"]))
    check(store, rows, config)


def check(store: EventStore, rows: list[Row], config: Config) -> None:
    by_item = {row["item_id"]: row for row in rows}
    longest = {history.name: history.longest for history in config.data.named_histories}
    assert [*longest][-1] == "long"
    for examples in split_examples(store, config.data).values():
        if not examples.num_examples:
            continue
        maker = BatchMaker(store, examples, 8, seed=0, stream=1)
        batch = maker.batch(tf.range(examples.num_examples, dtype=tf.int64), tf.constant(0, tf.int64))
        _, events = examples.users_and_events(batch.example_ids.numpy())
        candidates = store.own_ids("items", batch.candidate_item_ids.numpy())
        split = split_histories(len(longest), batch.history_lengths, batch.history_item_ids)
        for (name, most), (lengths, own) in zip(longest.items(), split, strict=True):
            ends = np.cumsum(lengths)
            items = store.own_ids("items", own.numpy())
            for place, event in enumerate(events):
                before_event = config.data.history_ends is HistoryEnds.BEFORE_EVENT
                wanted = plain(rows, event, name, by_item[candidates[place]], before_event)[-most:]
                assert items[ends[place] - lengths[place] : ends[place]] == wanted, (name, event)


def test_a_long_history_costs_what_it_reads(tmp_path: Path) -> None:
    """A user of 10,000 behaviours gives a batch of as many positions as one of 200, if the newest ones fit."""
    rows = []
    for user, number in (("short", 200), ("long", 10_000)):
        for time in range(number):
            item = time % 100
            rows.append({"user_id": user, "item_id": f"i{item}", "timestamp": time, "category_id": f"c{item % 4}"})
    rows += [{"user_id": "short", "item_id": "new", "timestamp": 10**6, "category_id": "c1"}]
    rows += [{"user_id": "long", "item_id": "new", "timestamp": 10**6, "category_id": "c1"}]
    rows += [{"user_id": "other", "item_id": f"j{n}", "timestamp": n, "category_id": "c9"} for n in range(3)]
    config = config_of(tmp_path, rows, long_history="category_id:30", max_history_length=10)
    store = prepare(config.data)
    examples = split_examples(store, config.data)["test"]
    maker = BatchMaker(store, examples, 10, seed=0, stream=1)
    batch = maker.batch(tf.range(4, dtype=tf.int64), tf.constant(0, tf.int64))
    (_, _), (lengths, own) = split_histories(2, batch.history_lengths, batch.history_item_ids)
    assert lengths.numpy()[[0, 2]].tolist() == [30, 30]
    items = store.own_ids("items", own.numpy()[:30])
    assert items == [f"i{time % 100}" for time in range(200) if time % 4 == 1][-30:]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"histories": ("buy:3",)}, "--histories: names what no column tells. Received: "),
        ({"histories": ("buy",)}, "--histories: must be NAME:LENGTH, "),
        ({"histories": ("all:0",)}, "--histories: must be NAME:LENGTH, "),
        ({"histories": ("all:2", "all:3")}, "--histories: each history may be named once. "),
        ({"histories": ("long:2",), "long_history": "category_id:3"}, "--histories: may not name long, which is "),
        ({"long_history": "category_id"}, "--long_history: must be FEATURE:LENGTH, "),
        ({"long_history": "brand:3"}, "--long_history: must be one of --item_features. "),
        ({"action_column": "action"}, "--action_column: is for --histories. "),
        ({"histories": ("skipped:3",)}, "--histories: skipped is what was shown with a label of 0. Received: a log "),
        (
            {"histories": ("sell:3",), "action_column": "action"},
            "--histories: must name actions of the log. Received: 'sell'. Choose among view, buy, all, skipped.",
        ),
        ({"histories": ("view:3",), "action_column": "what"}, "column 'what' is missing"),
    ],
)
def test_what_is_refused(tmp_path: Path, data: dict[str, Any], words: str) -> None:
    rows = [
        {"user_id": user, "item_id": f"i{n}", "timestamp": n, "category_id": "c", "action": ACTIONS[n % 2]}
        for user, n in [("a", 0), ("a", 1), ("a", 2), ("b", 3), ("b", 4)]
    ]
    with pytest.raises(InputError) as caught:
        prepare(config_of(tmp_path, rows, **data).data)
    assert words in str(caught.value)


def test_too_many_actions(tmp_path: Path) -> None:
    rows = [{"user_id": "a", "item_id": f"i{n}", "timestamp": n, "action": f"a{n}"} for n in range(256)]
    config = config_of(
        tmp_path, rows, histories=("a1:3",), action_column="action", item_features=(), embedding_dim=(6,)
    )
    with pytest.raises(InputError, match="--action_column: must have at most 255 different values. Received: 256"):
        prepare(config.data)


def test_lengths_may_change_without_another_cut(tmp_path: Path) -> None:
    rows = [
        {"user_id": user, "item_id": f"i{n % 4}", "timestamp": n, "category_id": "c", "action": ACTIONS[n % 2]}
        for user in "ab"
        for n in range(6)
    ]
    config = config_of(tmp_path, rows, histories=("view:3", "buy:2"), action_column="action")
    store = prepare(config.data)
    other = open_prepared(config.replace(histories=("view:5", "buy:1")).data)
    swapped = open_prepared(config.replace(histories=("buy:2", "view:3")).data)
    assert store.facts.fingerprint == other.facts.fingerprint != swapped.facts.fingerprint
    assert [history.longest for history in other.sets] == [5, 1]
    np.testing.assert_array_equal(other.sets[0].item_ids, store.sets[0].item_ids)
    assert {"history view: 6 behaviours", "history buy: 6 behaviours"} <= {*describe(store, 8)}
    assert len([*(store.folder / "packed").glob("sets-*")]) == 2


def test_a_job_learns_from_a_long_history(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [
        {"user_id": f"u{user}", "item_id": f"i{int(random.integers(30))}", "timestamp": time}
        for user in range(20)
        for time in range(30)
    ]
    rows = [row | {"category_id": f"c{int(row['item_id'][1:]) % 4}"} for row in rows]
    config = config_of(tmp_path, rows, long_history="category_id:5", max_steps=8)
    job = Assembly(config, Runtime(), prepare(config.data))
    job.trainer.train()
    assert 0 < job.trainer.test()["auc"] < 1
    job.telemetry.close()
