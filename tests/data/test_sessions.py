"""Histories that are those of a session alone, against a slow reading of the rules."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from din_dist.config import DataConfig, HistoryEnds, Split, UnknownItem
from din_dist.data import history_folders
from din_dist.data.event_store import EventStore
from din_dist.data.pipeline import BatchMaker
from din_dist.data.prepared import open_prepared, prepare
from din_dist.data.splits import split_examples
from din_dist.data.statistics import describe, measure
from din_dist.data.thinning import thin_out
from din_dist.data.trained_items import trained_items
from din_dist.errors import InputError
from din_dist.evaluation.request import USERS
from din_dist.evaluation.retrieval import queries_of
from din_dist.features.spec import FeatureSpec, Kind, Owner, to_text
from din_dist.serving.batch.histories import UserHistories
from din_dist.tables.ids import Ids
from tests.support.small_log import small_config
from tests.support.visit_log import write_visits

LONGEST = 3
COLUMN, GAP = {"session_column": "visit"}, {"session_gap": "4"}


def config_of(folder: Path, *, labels: bool = False, **settings: Any) -> DataConfig:
    if not (folder / "log.parquet").exists():
        write_visits(folder / "log.parquet", labels=labels)
    return small_config(folder, max_history_length=LONGEST, **settings).data


def sessions_of(store: EventStore, config: DataConfig) -> list[tuple]:
    """The session of each event by the columns of the log itself, read row by row."""
    users = store.vocabulary("users").to_pylist()
    rows = pq.read_table(config.data_path).to_pylist()
    found: list[tuple] = []
    for user in users:
        own = sorted((row for row in rows if row["user_id"] == user), key=lambda row: row["timestamp"])
        number = 0
        for place, row in enumerate(own):
            if config.session_gap and place and row["timestamp"] - own[place - 1]["timestamp"] > 4:
                number += 1
            found.append((user, row["visit"] if config.session_column else number))
    return found


def history(store: EventStore, sessions: list[tuple], event: int, *, before_time: bool, delay: int = 0) -> list[int]:
    """The items of the history of one event, however long."""
    found = []
    for other, session in enumerate(sessions):
        if session != sessions[event] or (store.labels is not None and not store.labels[other]):
            continue
        earlier = store.timestamps[other] < store.timestamps[event] - delay if before_time else other < event
        if earlier:
            found.append(int(store.item_ids[other]))
    return found


CASES = [
    pytest.param(labels, settings, id=f"{'labels' if labels else 'events'}-{'-'.join(settings)}")
    for labels in (False, True)
    for settings in (
        COLUMN,
        GAP,
        {**COLUMN, "history_ends": HistoryEnds.BEFORE_TIME, "history_delay": "3"},
        {**GAP, "history_ends": HistoryEnds.BEFORE_EVENT},
    )
]


@pytest.mark.parametrize(("labels", "settings"), CASES)
def test_a_history_is_that_of_the_session(tmp_path: Path, labels: bool, settings: dict) -> None:
    """In batches of training and in queries, however the rule says where it ends."""
    config = config_of(tmp_path, labels=labels, split=Split.LEAVE_TWO_OUT, **settings)
    store = prepare(config)
    sessions = sessions_of(store, config)
    assert len({*sessions}) > 2 * store.facts.num_users
    ends = config.history_ends
    before_time = labels if ends is HistoryEnds.AUTO else ends is HistoryEnds.BEFORE_TIME
    rule = {"before_time": before_time, "delay": int(config.history_delay)}
    splits = split_examples(store, config)
    lengths = []
    for name in ("train", "test"):
        examples = splits[name]
        maker = BatchMaker(store, examples, LONGEST, seed=0, stream=1)
        batch = maker.batch(tf.range(examples.num_examples, dtype=tf.int64), tf.constant(0, tf.int64))
        histories = np.split(batch.history_item_ids.numpy(), np.cumsum(batch.history_lengths)[:-1])
        events = np.repeat(examples.events(), examples.draws_per_row)
        for event, found in zip(events, histories, strict=True):
            assert found.tolist() == history(store, sessions, event, **rule)[-LONGEST:]
            lengths.append(len(found))
    assert max(lengths) == LONGEST
    assert labels or before_time or min(lengths) == 1
    queries = queries_of(store, splits["test"], LONGEST, 10**9)
    for event, seen, start, end in zip(
        queries.events, queries.seen_starts, queries.history_starts, queries.history_ends, strict=True
    ):
        whole = history(store, sessions, event, **rule)
        assert store.history_item_ids[seen:end].tolist() == whole
        assert store.history_item_ids[start:end].tolist() == whole[-LONGEST:]


@pytest.mark.parametrize("settings", [COLUMN, GAP])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("split", Split)
def test_splits_leave_out_what_has_no_history(tmp_path: Path, split: Split, labels: bool, settings: dict) -> None:
    """The rules of "Sessions" in din_dist/data/README.md, one event at a time."""
    cuts = {"validation_from": 60, "test_from": 90} if split is Split.TEMPORAL else {}
    config = config_of(tmp_path, labels=labels, split=split, **settings, **cuts)
    store = prepare(config)
    sessions = sessions_of(store, config)
    expected: dict[str, list[int]] = {"train": [], "validation": [], "test": [], "history": []}
    for user in range(store.facts.num_users):
        begin, end = store.user_offsets[user : user + 2]
        own = range(begin, end)
        can_be = [event for event in own if labels or sessions[event] in sessions[begin:event]]
        side = side_of(store.vocabulary("users")[user].as_py())
        held = {}
        if split is Split.TEMPORAL:
            held = {event: "test" if store.timestamps[event] >= 90 else "validation" for event in own}
            held = {event: name for event, name in held.items() if store.timestamps[event] >= 60}
        elif split is Split.USERS:
            held = {event: side for event in own if side != "train"}
        else:
            last = [*reversed(can_be)][: 1 if split is Split.LEAVE_ONE_OUT else 2]
            names = dict(zip(last, ("test", "validation"), strict=False))
            held = {event: names.get(event, "") for event in own if last and event >= min(last)}
        for event in own:
            late = event - begin >= int(0.8 * (end - begin)) or split is not Split.USERS
            if event not in held:
                expected["train"] += [event] if event in can_be else []
            else:
                expected[held[event] if event in can_be and late else "history"].append(event)
    if labels and split is not Split.USERS:
        assert not expected.pop("history")
    for _ in range(2):  # made, then read from the cache
        found = split_examples(store, config)
        assert {name: examples.events().tolist() for name, examples in found.items()} == expected
        for name, examples in found.items():
            users = np.searchsorted(store.user_offsets, expected[name], side="right") - 1
            draws = examples.draws_per_row
            assert examples.user_of_example().tolist() == np.repeat(users, draws).tolist()
    if not labels:
        assert len(found["train"].users) > len(set(found["train"].users.tolist()))  # runs, and not users


def side_of(user: str) -> str:
    return [*["train"] * 8, "validation", "test"][int(tf.strings.to_hash_bucket_fast(f"split:{user}", 10))]


@pytest.mark.parametrize("labels", [False, True])
def test_trained_items_are_in_an_example_or_its_history(tmp_path: Path, labels: bool) -> None:
    """A session of one event teaches nothing, and neither does one that begins later."""
    write_visits(tmp_path / "log.parquet", labels=labels, num_items=400)
    config = config_of(tmp_path, split=Split.LEAVE_TWO_OUT, unknown_item=UnknownItem.FEATURES, **GAP)
    store = prepare(config)
    sessions, splits = sessions_of(store, config), split_examples(store, config)
    expected: set[int] = set()
    for event in splits["train"].events():
        expected |= {int(store.item_ids[event]), *history(store, sessions, event, before_time=labels)}
    trained = trained_items(store, config, splits)
    assert trained is not None
    assert set(np.flatnonzero(trained.occur).tolist()) == expected
    assert 0 < len(expected) < store.facts.num_items


def test_named_histories_are_those_of_the_session(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, split=Split.LEAVE_TWO_OUT, action_column="action", histories=("buy:2", "all:3"), **COLUMN
    )
    store = prepare(config)
    sessions, actions = sessions_of(store, config), store.actions
    assert actions is not None
    code = store.facts.actions.index("buy") + 1
    examples = split_examples(store, config)["train"]
    maker = BatchMaker(store, examples, LONGEST, seed=0, stream=1)
    for example, event in enumerate(examples.events()):
        ids = tf.constant([example * examples.draws_per_row], tf.int64)
        batch = maker.batch(ids, tf.constant(0, tf.int64))
        before = [other for other in range(event) if sessions[other] == sessions[event]]
        bought = [int(store.item_ids[other]) for other in before if actions[other] == code]
        every = [int(store.item_ids[other]) for other in before]
        assert batch.history_item_ids.numpy().tolist() == [*bought[-2:], *every[-3:]]


def test_features_of_behaviours_are_theirs(tmp_path: Path) -> None:
    """Behaviours stand in another order than events where sessions overlap."""
    declared = to_text(
        (
            FeatureSpec("age", Owner.HISTORY, Kind.TIME_SINCE),
            FeatureSpec("kind", Owner.HISTORY, Kind.CATEGORY, "action"),
        )
    )
    config = config_of(tmp_path, split=Split.LEAVE_TWO_OUT, feature_declarations=declared, **COLUMN)
    store = prepare(config)
    sessions, examples = sessions_of(store, config), split_examples(store, config)["train"]
    kinds = store.features["kind"].values  # a row for each event
    maker = BatchMaker(store, examples, LONGEST, seed=0, stream=1)
    batch = maker.batch(tf.range(examples.num_examples, dtype=tf.int64), tf.constant(0, tf.int64))
    found_kinds = tf.gather(batch.sides["kind"], batch.side_index).numpy().tolist()
    found_ages = tf.gather(batch.sides["age"], batch.side_index).numpy().tolist()
    expected_kinds, ages = [], []
    for event in np.repeat(examples.events(), examples.draws_per_row):
        before = [other for other in range(event) if sessions[other] == sessions[event]][-LONGEST:]
        expected_kinds += [int(kinds[other]) for other in before]
        ages += [int(store.timestamps[event] - store.timestamps[other]) for other in before]
    assert found_kinds == expected_kinds
    assert len(set(found_kinds)) == 2
    # A row for each doubling: the order of rows is that of ages.
    assert np.all(np.diff(np.array(found_ages)[np.argsort(ages, kind="stable")]) >= 0)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("settings", [COLUMN, GAP])
def test_predictions_have_the_history_of_the_session(tmp_path: Path, settings: dict, labels: bool) -> None:
    """At the time of an event they have what training has, but for events of the same time, which no time can order."""
    config = config_of(tmp_path, labels=labels, **settings)
    store = prepare(config)
    sessions, users = sessions_of(store, config), store.vocabulary("users")
    histories = UserHistories(store, LONGEST)
    user_of = np.repeat(np.arange(store.facts.num_users), np.diff(store.user_offsets))
    given = Ids(users.take(pa.array(user_of)).combine_chunks())
    encoded, lengths = histories.of(given, before=store.timestamps)
    found = np.split(encoded.codes + 1, np.cumsum(lengths)[:-1])
    num_compared = 0
    for event, items in enumerate(found):
        same_user = user_of == user_of[event]
        newest = [other for other in np.flatnonzero(same_user) if store.timestamps[other] < store.timestamps[event]]
        if not newest:
            assert not len(items)
            continue
        if settings is GAP or sessions[newest[-1]] == sessions[event]:
            assert items.tolist() == history(store, sessions, event, before_time=True)[-LONGEST:]
            num_compared += 1
    assert num_compared > 100
    encoded, lengths = histories.of(Ids(pa.array([*users.to_pylist()[:3], "nobody"])))
    found = np.split(encoded.codes + 1, np.cumsum(lengths)[:-1])
    for user, items in enumerate(found[:3]):
        last = int(store.user_offsets[user + 1]) - 1
        own = [other for other, session in enumerate(sessions) if session == sessions[last]]
        own = [other for other in own if store.labels is None or store.labels[other]]
        assert items.tolist() == [int(store.item_ids[other]) for other in own][-LONGEST:]
    assert not len(found[3])


def test_a_session_ends_after_a_longer_gap(tmp_path: Path) -> None:
    """A gap of 30 minutes is one session still; one second more, and another begins."""
    table = {"user_id": ["u"] * 4 + ["v"] * 2, "item_id": ["a", "b", "c", "d", "a", "b"]}
    table |= {"timestamp": [0, 1800, 3601, 3700, 3701, 3702]}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    config = small_config(tmp_path, session_gap="30m", timestamp_unit="seconds").data
    store = prepare(config)
    assert store.facts.sessions == "1800"
    assert store.sessions is not None
    assert store.sessions.tolist() == [0, 0, 1, 1, 2, 2]
    in_seconds = prepare(small_config(tmp_path, session_gap="1800").data)
    assert in_seconds.facts.fingerprint == store.facts.fingerprint
    others = [prepare(small_config(tmp_path, **more).data) for more in ({}, {"session_gap": "99"})]
    assert len({store.facts.fingerprint, *(other.facts.fingerprint for other in others)}) == 3
    assert (tmp_path / "log.parquet").exists()
    folders = sorted(path.name for path in (store.folder / "packed").iterdir() if path.is_dir())
    assert folders == ["histories-before_event-0-1800", "histories-before_event-0-99"]
    assert "sessions" not in (store.folder / "facts.json").read_text()


def test_a_disk_that_cannot_be_written_makes_the_same(tmp_path: Path) -> None:
    config = config_of(tmp_path, **COLUMN)
    kept = prepare(config)
    shutil.rmtree(kept.folder / "packed" / "histories-before_event-0-by_column")
    with mock.patch.object(history_folders, "publish_arrays", side_effect=OSError(30, "Read-only file system")):
        store = open_prepared(config)
    assert store.sessions is not None
    for name in ("sessions", "history_ends", "history_offsets", "history_item_ids", "history_times"):
        np.testing.assert_array_equal(getattr(store, name), getattr(kept, name))
    assert not isinstance(store.sessions, np.memmap)


@pytest.mark.parametrize("name", ["sessions", "history_offsets", "history_item_ids"])
def test_damaged_sessions_are_one_clear_line(tmp_path: Path, name: str) -> None:
    from din_dist.data.checksums import write_checksums

    config = config_of(tmp_path, **COLUMN)
    folder = prepare(config).folder / "packed" / "histories-before_event-0-by_column"
    np.save(folder / f"{name}.npy", np.load(folder / f"{name}.npy")[:-1])
    write_checksums(folder)
    with pytest.raises(InputError, match=r"must hold the histories of \d+ events. Received: \w+ of another length"):
        open_prepared(config)


def test_statistics_tell_of_sessions(tmp_path: Path) -> None:
    config = config_of(tmp_path, **COLUMN)
    store = prepare(config)
    sessions = sessions_of(store, config)
    sizes = np.unique([hash(session) for session in sessions], return_counts=True)[1]
    found = measure(store, LONGEST)
    assert found["sessions"]["sessions"] == len(sizes)
    assert found["sessions"]["single"] == np.count_nonzero(sizes == 1)
    assert found["sessions"]["events_per_session"]["mean"] == pytest.approx(sizes.mean())
    assert found["history_length"]["max"] == sizes.max() - 1
    lengths = [len(history(store, sessions, event, before_time=False)) for event in range(len(sessions))]
    assert found["history_length"]["mean"] == pytest.approx(np.mean([length for length in lengths if length]))
    lines = describe(store, LONGEST)
    assert f"sessions: {len(sizes):,} named by the log; {np.count_nonzero(sizes == 1):,} have one event;" in "\n".join(
        lines
    )
    assert any(
        "before the event, in the order of the log" in line and "begin with its session" in line for line in lines
    )
    gaps = describe(prepare(config_of(tmp_path, **GAP)), LONGEST)
    assert any("with gaps of at most 4, in the unit of the timestamps" in line for line in gaps)


@pytest.mark.parametrize("labels", [False, True])
def test_fewer_examples_are_those_of_whole_users(tmp_path: Path, labels: bool) -> None:
    """Of all runs of a user, or of none."""
    config = config_of(tmp_path, labels=labels, split=Split.TEMPORAL, validation_from=50, test_from=60, **COLUMN)
    store = prepare(config)
    every = split_examples(store, config)["test"]
    few = thin_out(every, every.num_examples // 3)
    kept = np.isin(every.user_of_example(), few.users)
    assert 0 < few.num_examples == kept.sum() <= every.num_examples // 3
    for by in ("events", USERS):
        queries = queries_of(store, every, LONGEST, 12, by=by)
        whole = queries_of(store, every, LONGEST, 10**9, by=by)
        assert 0 < len(queries) <= 12
        assert queries.events.tolist() == whole.events[np.isin(whole.users, queries.users)].tolist()
        assert whole.num_in_split == queries.num_in_split == len(whole)
    assert len(np.unique(whole.users)) == len(whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"session_gap": "soon"},
            "--session_gap: must be a whole number above 0, alone or with s, m, h or d. Received:",
        ),
        ({"session_gap": "0m"}, "--session_gap: must be a whole number above 0, alone or with s, m, h or d. Received:"),
        ({**COLUMN, **GAP}, "--session_gap: says what a session is, and so does --session_column. Received: '4'."),
        (
            {**GAP, "behaviours_path": "views.parquet"},
            "--behaviours_path: has no sessions. Received: '",
        ),
        (
            {**GAP, "long_history": "category_id:9"},
            "--long_history: goes beyond the session. Received: 'category_id:9'. Drop it, or --session_gap.",
        ),
        (
            {**COLUMN, "model": "comirec_sa", "history_cut": "fixed"},
            "--history_cut: cuts all events of a user, and not a session. Received: 'fixed'. Drop it, or",
        ),
        ({"session_column": "timestamp"}, "--item_features: a column can have one role. Received: 'timestamp'."),
        (
            {"dataset": "synthetic", "data_path": "", "session_column": "visit"},
            "--session_column: --dataset=synthetic has no such column. Received: 'visit'.",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        small_config(tmp_path, **settings)


def test_a_column_that_is_not_there_or_has_gaps(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'shop'.*--session_column"):
        prepare(config_of(tmp_path, session_column="shop"))
    table = pq.read_table(tmp_path / "log.parquet")
    visits = table["visit"].to_pylist()
    visits[7] = None
    place = table.schema.get_field_index("visit")
    pq.write_table(table.set_column(place, "visit", pa.array(visits)), tmp_path / "log.parquet")
    with pytest.raises(InputError, match=r"row 8.*visit"):
        prepare(config_of(tmp_path, **COLUMN))


def test_sessions_of_text_are_those_of_integers(tmp_path: Path) -> None:
    store = prepare(config_of(tmp_path, **COLUMN))
    (tmp_path / "texts").mkdir()
    table = pq.read_table(tmp_path / "log.parquet")
    place = table.schema.get_field_index("visit")
    as_text = table.set_column(place, "visit", table["visit"].cast(pa.string()))
    pq.write_table(as_text, tmp_path / "texts" / "log.parquet")
    other = prepare(config_of(tmp_path / "texts", **COLUMN))
    np.testing.assert_array_equal(other.sessions, store.sessions)


def test_baskets_of_purchases_are_sessions() -> None:
    """The default data set has `basket_id`."""
    from din_dist.data.builders.complete_journey import CompleteJourneyConfig
    from din_dist.data.raw_columns import RawColumns

    found = CompleteJourneyConfig.of(RawColumns(), session="basket_id")
    assert found is not None
    assert found.columns.session == "basket_id"
    assert found.name != CompleteJourneyConfig.of(RawColumns(), request="basket_id").name
