"""Features of behaviours at each position of a history, against plain Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from din_dist.config import HistoryEnds
from din_dist.data.checksums import write_checksums
from din_dist.data.event_store import EventStore
from din_dist.data.history_rows import rows_in_memory
from din_dist.data.pipeline import BatchMaker
from din_dist.data.prepared import open_prepared, prepare
from din_dist.data.splits import split_examples
from din_dist.errors import InputError
from din_dist.features.declarations import parse_declarations
from din_dist.features.sides import age_rows
from din_dist.features.spec import to_text
from tests.support.declared_features import OF_BEHAVIOURS, Row, write_table
from tests.support.small_log import small_config
from tests.support.thorough import up_to


def config_of(folder: Path, rows: list[Row], **data: Any) -> Any:
    log = write_table(folder / "log.jsonl", rows)
    if behaviours := data.pop("behaviours", None):
        data["behaviours_path"] = str(write_table(folder / "behaviours.jsonl", behaviours))
    specs = parse_declarations(OF_BEHAVIOURS, folder / "features.toml")
    return small_config(folder, **{"data_path": str(log), "feature_declarations": to_text(specs)} | data)


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Row], dict[str, Any]]:
    """Rows full of ties, and settings of their histories: labels, times of labels, actions, or a log of behaviours."""
    labelled, acted = draw(st.booleans()), draw(st.booleans())
    late = labelled and draw(st.booleans())
    number = st.integers(0, 3)

    def row(at: int) -> Row:
        item, time = draw(st.integers(0, 7)), draw(st.integers(0, 40))
        kind = [None, "tap", "swipe"][draw(st.integers(0, 2))]
        found: Row = {"user_id": "abc"[at % 3], "item_id": f"i{item}", "timestamp": time, "category_id": f"c{item % 3}"}
        found |= {"kind": kind, "quantity": [None, 1.0, 2.0, 7.0][draw(number)]}
        found |= {"action": ["view", "buy"][at % 2]}
        if labelled:
            found["label"] = draw(st.integers(0, 1))
        if late:
            found["clicked"] = time + draw(st.integers(0, 5))
        return found

    rows = [row(at) for at in range(draw(st.integers(12, 30)))]
    others = [{"user_id": "d", "item_id": f"i{item}", "category_id": f"c{item % 3}"} for item in (8, 9, 10)]
    rows += [row | other for row in rows[:2] for other in others]
    rows[0]["kind"], rows[0]["quantity"] = "tap", 1.0
    data: dict[str, Any] = {"label_time_column": "clicked"} if late else {}
    if acted:
        histories = ["view:3", "buy:2", "all:4", *(["skipped:2"] if labelled else [])]
        data |= {"action_column": "action", "histories": tuple(histories), "long_history": "category_id:3"}
    if not labelled and draw(st.booleans()):
        data["history_ends"] = HistoryEnds.BEFORE_TIME
    if draw(st.booleans()):
        data |= {"behaviours": [row(at) for at in range(draw(st.integers(6, 20)))], "history_ends": HistoryEnds.AUTO}
        data.pop("label_time_column", None)
        for done in (*data["behaviours"], *rows):
            done.pop("clicked", None)
        data["behaviours"][0] |= {"kind": "tap", "quantity": 1.0, "action": "view", "user_id": "a"}
        data["behaviours"][1] |= {"action": "buy", "user_id": "a"}
    return rows, data


@settings(
    phases=[Phase.generate],
    max_examples=up_to(20),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(logs())
def test_positions_have_the_values_of_plain_python(tmp_path_factory: Any, log: Any) -> None:
    rows, data = log
    config = config_of(tmp_path_factory.mktemp("log"), rows, **data)
    try:
        store = prepare(config.data)
    except InputError as error:
        assert "there must be events to train on" in str(error)
        return
    check(store, rows, data, config)
    check(open_prepared(config.data), rows, data, config)


def check(store: EventStore, rows: list[Row], data: dict[str, Any], config: Any) -> None:
    events = ordered(store, rows)
    behaviours = ordered(store, data["behaviours"]) if "behaviours" in data else None
    names = [history.name for history in config.data.named_histories] or ["all"]
    longest = {history.name: history.longest for history in config.data.named_histories} or {"all": 8}
    for examples in split_examples(store, config.data).values():
        if not examples.num_examples:
            continue
        maker = BatchMaker(store, examples, 8, seed=0, stream=1)
        batch = maker.batch(tf.range(examples.num_examples, dtype=tf.int64), tf.constant(0, tf.int64))
        _, own_events = examples.users_and_events(batch.example_ids.numpy())
        candidates = store.own_ids("items", batch.candidate_item_ids.numpy())
        wanted = []
        for name in names:
            for event, candidate in zip(own_events, candidates, strict=True):
                found = plain(events, behaviours, event, name, candidate, data)[-longest[name] :]
                wanted += [values_of(store, events[event], row, known) for row, known in found]
        values = {name: tf.gather(ids, batch.side_index).numpy().tolist() for name, ids in batch.sides.items()}
        assert [*zip(values["how"], values["pieces"], values["age"], strict=True)] == wanted


def plain(
    events: list[Row], behaviours: list[Row] | None, event: int, name: str, candidate: str, data: dict[str, Any]
) -> list[tuple[Row, bool]]:
    """The behaviours of a named history of an event, and whether their features are known."""
    shown = events[event]
    labelled = "label" in shown
    if behaviours is not None and name != "skipped":
        found = [row for row in behaviours if row["user_id"] == shown["user_id"]]
        found = [row for row in found if row["timestamp"] < shown["timestamp"]]
    else:
        chosen = 0 if name == "skipped" else 1
        at = [(place, row) for place, row in enumerate(events) if row["user_id"] == shown["user_id"]]
        at = [(place, row) for place, row in at if row.get("label", 1) == chosen]
        if labelled or behaviours is not None or data.get("history_ends") is HistoryEnds.BEFORE_TIME:
            found = sorted((row for _, row in at), key=time_of)
            found = [row for row in found if time_of(row) < shown["timestamp"]]
        else:
            found = [row for place, row in at if place < event]
    if name in ("view", "buy"):
        found = [row for row in found if row["action"] == name]
    if name == "long":
        found = [row for row in found if row["category_id"] == f"c{int(candidate[1:]) % 3}"]
    return [(row, behaviours is None or name != "skipped") for row in found]


def time_of(row: Row) -> int:
    return row["clicked"] if "clicked" in row and row.get("label") else row["timestamp"]


def values_of(store: EventStore, shown: Row, row: Row, known: bool) -> tuple[int, int, int]:
    age = 1 + max(shown["timestamp"] - time_of(row), 0).bit_length()
    return (row_of(store, row["kind"]), bin_of(store, row["quantity"]), age) if known else (0, 0, age)


def ordered(store: EventStore, rows: list[Row]) -> list[Row]:
    """The rows of the store's users, in its order."""
    users = store.vocabulary("users").to_pylist()
    known = [row for row in rows if row["user_id"] in users]
    return sorted(known, key=lambda row: (users.index(row["user_id"]), row["timestamp"]))


def row_of(store: EventStore, value: str | None) -> int:
    vocabulary = store.feature_vocabulary("how").to_pylist()
    return 1 + vocabulary.index(value) if value in vocabulary else 0


def bin_of(store: EventStore, value: float | None) -> int:
    bounds = store.features["pieces"].encoding.bounds
    return 0 if value is None else 1 + sum(value >= bound for bound in bounds)


@pytest.mark.parametrize(("age", "row"), [(-5, 1), (0, 1), (1, 2), (2, 3), (3, 3), (4, 4), (7, 4), (8, 5), (2**62, 64)])
def test_rows_of_ages_by_hand(age: int, row: int) -> None:
    assert age_rows(tf.constant([age], tf.int64)).numpy().tolist() == [row]


LOG: list[Row] = [
    {"user_id": user, "item_id": f"i{item}", "category_id": f"c{item % 3}", "timestamp": time, "label": time % 2}
    | {"kind": "tap" if item % 2 else "swipe", "quantity": float(item)}
    for user, shift in (("a", 0), ("b", 3))
    for time in range(1, 9)
    for item in [(time + shift) % 7]
]


def sides_of(store: EventStore, config: Any) -> list[tuple[str, list[int]]]:
    maker = BatchMaker(store, split_examples(store, config.data)["train"], 8, seed=0, stream=1)
    batch = maker.batch(tf.range(6, dtype=tf.int64), tf.constant(0, tf.int64))
    return [(name, tf.gather(ids, batch.side_index).numpy().tolist()) for name, ids in batch.sides.items()]


def test_where_nothing_can_be_written_rows_are_found_in_memory(tmp_path: Path) -> None:
    config = config_of(tmp_path, LOG)
    store = prepare(config.data)
    wanted = sides_of(store, config)
    without = dataclasses.replace(store, history_rows=None)
    assert sides_of(without, config) != wanted
    assert sides_of(rows_in_memory(without), config) == wanted
    assert any(any(values) for _, values in wanted)


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, LOG)
    store = prepare(config.data)
    (file,) = (store.folder / "packed").glob("rows-*/all.npy")
    np.save(file, np.zeros(3, np.int64))
    write_checksums(file.parent)
    with pytest.raises(InputError, match=r"must hold the rows of 8 behaviours\. Received: 3 of int64\. Delete this"):
        open_prepared(config.data)


def test_a_log_without_the_column_is_refused(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "kind"} for row in LOG]
    with pytest.raises(InputError, match="log.jsonl: column 'kind' is missing"):
        prepare(config_of(tmp_path, rows).data)
    with pytest.raises(InputError, match="behaviours.jsonl: column 'kind' is missing"):
        prepare(config_of(tmp_path, LOG, behaviours=rows).data)


def test_a_log_of_behaviours_alone_has_the_columns(tmp_path: Path) -> None:
    """The log of events may lack them then."""
    rows = [{name: value for name, value in row.items() if name not in ("kind", "quantity")} for row in LOG]
    store = prepare(config_of(tmp_path, rows, behaviours=LOG).data)
    assert store.feature_vocabulary("how").to_pylist() == ["swipe", "tap"]
    assert len(store.features["how"].values) == len(LOG)
