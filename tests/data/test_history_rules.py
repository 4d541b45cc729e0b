"""Where a history ends: requests, times of labels, delays, and both rules, against plain Python."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from din_dist import assembly
from din_dist.config import Config, HistoryEnds, Split
from din_dist.data import event_store, history_folders
from din_dist.data.event_store import EventStore
from din_dist.data.log_reader import first_times
from din_dist.data.prepared import open_prepared, prepare
from din_dist.data.splits import SPLITS
from din_dist.data.statistics import describe
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.schema import Batch, HistoryRule
from din_dist.serving.batch.histories import UserHistories
from din_dist.tables.ids import Ids
from tests.support.page_log import pages
from tests.support.small_log import small_config
from tests.support.thorough import up_to

BEFORE_TIME, BEFORE_EVENT = HistoryEnds.BEFORE_TIME, HistoryEnds.BEFORE_EVENT


def config_of(folder: Path, rows: list[dict], **data: Any) -> Config:
    table = pa.Table.from_pylist(rows)
    path = folder / f"{'labelled' if 'label' in table.column_names else 'plain'}.parquet"
    if not path.exists():
        pq.write_table(table, path)
    return small_config(folder, **{"data_path": str(path), "item_features": (), "embedding_dim": (6,), **data})


def events(*shown: tuple[Any, ...], names: tuple[str, ...]) -> list[dict]:
    """Events of one user, by the values of some columns."""
    return [{"user_id": "u", **dict(zip(names, values, strict=True))} for values in shown]


def histories(store: EventStore) -> list[list[str]]:
    """Each event's history, in the ids of the log."""
    users = np.repeat(np.arange(store.facts.num_users), np.diff(store.user_offsets))
    ends = np.arange(store.facts.num_events) if store.history_ends is None else store.history_ends
    windows = zip(store.history_offsets[users], ends, strict=True)
    return [store.own_ids(event_store.ITEMS, store.history_item_ids[start:end]) for start, end in windows]


def test_events_of_a_request_do_not_see_each_other(tmp_path: Path) -> None:
    """Request p lasts from 20 to 23, and the click at 21 on the page next to it is known to neither event of p."""
    names = ("item_id", "timestamp", "label", "page")
    rows = events(
        ("a", 10, 1, "o"), ("b", 20, 1, "p"), ("c", 21, 1, "q"), ("d", 23, 0, "p"), ("e", 24, 0, "r"), names=names
    )
    store = prepare(config_of(tmp_path, rows, request_column="page").data)
    assert histories(store) == [[], ["a"], ["a", "b"], ["a"], ["a", "b", "c"]]
    assert store.request_times is not None and store.request_times.tolist() == [10, 20, 21, 20, 24]
    plain = prepare(config_of(tmp_path, rows).data)
    assert histories(plain) == [[], ["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]
    assert plain.facts.fingerprint != store.facts.fingerprint


def test_a_positive_is_known_from_its_own_time_on(tmp_path: Path) -> None:
    """The click on a comes last, so it is the newest of the history."""
    names = ("item_id", "timestamp", "label", "clicked_at")
    rows = events(("a", 10, 1, 35), ("b", 20, 1, 20), ("c", 30, 0, None), ("d", 36, 0, None), names=names)
    store = prepare(config_of(tmp_path, rows, label_time_column="clicked_at").data)
    assert histories(store) == [[], [], ["b"], ["b", "a"]]


def test_a_behaviour_is_known_after_a_delay(tmp_path: Path) -> None:
    rows = events(("a", 10, 1), ("b", 20, 1), ("c", 25, 0), ("d", 26, 0), names=("item_id", "timestamp", "label"))
    now, later = (prepare(config_of(tmp_path, rows, history_delay=delay).data) for delay in ("0", "5"))
    assert histories(now) == [[], ["a"], ["a", "b"], ["a", "b"]]
    assert histories(later) == [[], ["a"], ["a"], ["a", "b"]]
    assert now.folder == later.folder
    assert now.facts.fingerprint != later.facts.fingerprint
    assert later.facts.fingerprint != prepare(config_of(tmp_path, rows, history_delay="6").data).facts.fingerprint


@pytest.mark.parametrize(("delay", "seconds"), [("90s", 90), ("15m", 900), ("6h", 21_600), ("1d", 86_400)])
def test_a_delay_has_a_unit(tmp_path: Path, delay: str, seconds: int) -> None:
    rows = events(*(("a", 1_700_000_000_000 + n, 1) for n in range(2)), names=("item_id", "timestamp", "label"))
    store = prepare(config_of(tmp_path, rows, history_delay=delay).data)
    assert store.facts.history_delay == 1000 * seconds  # the timestamps are milliseconds
    given_unit = config_of(tmp_path, rows, history_delay=delay, timestamp_unit="seconds")
    assert prepare(given_unit.data).facts.history_delay == seconds


def test_both_rules_of_both_kinds_of_logs(tmp_path: Path) -> None:
    names = ("item_id", "timestamp", "label")
    rows = events(("a", 10, 1), ("b", 20, 1), ("c", 20, 1), ("d", 20, 0), names=names)
    in_order, by_time = [[], ["a"], ["a", "b"], ["a", "b", "c"]], [[], ["a"], ["a"], ["a"]]
    without_labels = [{name: row[name] for name in row if name != "label"} for row in rows]
    for log, default in ((rows, by_time), (without_labels, in_order)):
        for rule, expected in (("auto", default), (BEFORE_TIME, by_time), (BEFORE_EVENT, in_order)):
            assert histories(prepare(config_of(tmp_path, log, history_ends=HistoryEnds(rule)).data)) == expected


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[dict], dict[str, Any]]:
    """Rows full of ties, and settings that fit them."""
    labelled = draw(st.booleans())
    rule = draw(st.sampled_from(HistoryEnds))
    free = rule is BEFORE_TIME or (labelled and rule is HistoryEnds.AUTO)
    data: dict[str, Any] = {"history_ends": rule}
    if free:
        data["history_delay"] = str(draw(st.integers(0, 4)))
        data |= {"request_column": "page"} if draw(st.booleans()) else {}
        data |= {"label_time_column": "came"} if labelled and draw(st.booleans()) else {}
    rows = []
    for _ in range(draw(st.integers(2, 30))):
        row: dict[str, Any] = {"user_id": draw(st.integers(0, 2)), "item_id": draw(st.integers(0, 5))}
        row |= {"timestamp": draw(st.integers(-3, 6)), "page": draw(st.integers(0, 4))}
        if labelled:
            row["label"] = draw(st.integers(0, 1))
            row["came"] = row["timestamp"] + draw(st.integers(0, 5)) if row["label"] else None
        rows.append(row)
    return rows, data


def slow_histories(rows: list[dict], data: dict[str, Any], labelled: bool) -> list[list[int]]:
    """The histories of all events, user after user, by one look at every pair of events."""
    by_event = data["history_ends"] is BEFORE_EVENT or (not labelled and data["history_ends"] is HistoryEnds.AUTO)
    delay = int(data.get("history_delay", 0))
    found = []
    for user in dict.fromkeys(row["user_id"] for row in rows):
        own = sorted((row for row in rows if row["user_id"] == user), key=lambda row: row["timestamp"])
        for place, row in enumerate(own):
            known = [other for other in (own[:place] if by_event else own) if other.get("label", 1)]
            if not by_event:
                request = [row]
                if "request_column" in data:
                    request = [other for other in own if other["page"] == row["page"]]
                now = min(other["timestamp"] for other in request)
                when = "came" if "label_time_column" in data else "timestamp"
                known = sorted((other for other in known if other[when] + delay < now), key=lambda other: other[when])
            found.append([other["item_id"] for other in known])
    return found


@settings(max_examples=up_to(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs())
@example(
    log=(
        [{"user_id": 0, "item_id": n, "timestamp": -(2**63) + n, "page": 0, "label": 1} for n in range(3)],
        {"history_ends": BEFORE_TIME, "history_delay": "2"},
    )
)
def test_histories_against_plain_python(log: tuple[list[dict], dict], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also opened again, cut in memory, and asked for by time."""
    rows, data = log
    folder = tmp_path_factory.mktemp("log")
    config = config_of(folder, rows, **data).data
    stores = [prepare(config), open_prepared(config)]
    by_default = event_store.open_store(stores[0].folder, [])
    facts = history_folders.chosen_facts(by_default.facts, config)
    if facts is not by_default.facts:
        stores.append(history_folders.histories_in_memory(by_default, facts))
    expected = slow_histories(rows, data, "label" in rows[0])
    for store in stores:
        assert [list(map(int, history)) for history in histories(store)] == expected
        if store.facts.history_rule is HistoryRule.BEFORE_TIME:
            moments = store.timestamps if store.request_times is None else store.request_times
            users = store.own_ids(event_store.USERS, users_of(store) + 1)
            column = Ids(pa.array(list(map(int, users))))
            found, lengths = UserHistories(store, 100).of(column, np.array(moments))
            assert lengths.tolist() == list(map(len, expected))
            assert found.part(0, int(lengths.sum())).numpy().tolist() == list(itertools.chain(*expected))
    shutil.rmtree(folder)


def users_of(store: EventStore) -> np.ndarray:
    return np.repeat(np.arange(store.facts.num_users), np.diff(store.user_offsets))


RULES: dict[str, dict[str, Any]] = {
    "requests": {"request_column": "page"},
    "label times": {"label_time_column": "came"},
    "delay": {"history_delay": "11"},
    "all": {"request_column": "page", "label_time_column": "came", "history_delay": "5"},
}


@pytest.mark.parametrize("rule", RULES)
def test_training_and_scoring_by_time_are_one(tmp_path: Path, rule: str) -> None:
    """`predict --before_column` with the request's time gives the history that training and evaluation give."""
    rows = pages(num_users=30)
    config = config_of(tmp_path, rows, split=Split.TEMPORAL, max_history_length=12, **RULES[rule])
    store = prepare(config.data)
    job = assembly.Assembly(config, Runtime(), store)
    by_time = UserHistories(store, config.data.max_history_length)
    number_of = {item.encode(): place for place, item in enumerate(store.vocabulary(event_store.ITEMS).to_pylist(), 1)}
    moments = store.timestamps if store.request_times is None else store.request_times
    for split in SPLITS:
        examples = job.splits[split]
        here, users = examples.events(), examples.user_of_example()
        own_users = pa.array(store.own_ids(event_store.USERS, users + 1))
        items, lengths = by_time.of(Ids(own_users), moments[here])
        assert lengths.max() > 5
        own = items.part(0, int(lengths.sum())).numpy()
        batch = Batch(
            candidate_item_ids=store.item_ids[here],
            history_item_ids=np.array([number_of[item] for item in own], np.int32),
            history_lengths=lengths.astype(np.int32),
        )
        logits = job.model(batch, training=False).numpy()
        np.testing.assert_allclose(job.evaluator.scores(split, job.model), logits, atol=1e-6)


@pytest.mark.thorough(unless=lambda case: case["data"])
@pytest.mark.parametrize(
    ("seconds", "data", "leaks"),
    [
        (3, {"request_column": "page"}, False),
        (3, {}, True),  # items are shown after the click on another one of their page
        (1, {}, False),
        (1, {"history_ends": BEFORE_EVENT}, True),
    ],
)
def test_clicks_of_a_page_leak_without_its_name(tmp_path: Path, seconds: int, data: dict, leaks: bool) -> None:
    """The clicked item of a page is at random. Who sees another click of the page knows that this one is none."""
    rows = sorted(pages(num_users=300, seconds=seconds), key=lambda row: -row["label"])
    if seconds > 1:
        rows = [row | {"timestamp": row["timestamp"] + 4 * (1 - row["label"])} for row in rows]
    config = config_of(
        tmp_path,
        rows,
        **data,
        item_features=("category_id",),
        embedding_dim=(6, 4),
        split=Split.TEMPORAL,
        validation_from=1070,
        test_from=1080,
        epochs=3,
        learning_rate=0.01,
        optimizer="lazy_adam",
    )
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    job.trainer.train()
    gauc = job.trainer.test()["gauc"]
    assert gauc > 0.6 if leaks else abs(gauc - 0.5) < 0.04


def test_requests_of_two_users_are_never_one() -> None:
    users, requests, times = np.array([0, 1, 0, 1]), np.array([5, 5, 5, 6]), np.array([9, 2, 7, 4])
    assert first_times(users, requests, times).tolist() == [7, 2, 7, 4]


def test_the_report_says_where_histories_end(tmp_path: Path) -> None:
    rows = pages(num_users=3)
    plain = pages(num_users=3, labelled=False)
    unit = "in the unit of the timestamps"
    for log, data, line in (
        (rows, {}, "histories end before the time of the event"),
        (rows, RULES["requests"], "histories end before the time of the request"),
        (
            rows,
            RULES["all"],
            "histories end before the time of the request; a positive is known from its own time on; a behaviour is "
            f"known 5 after its time, {unit}",
        ),
        (plain, {}, "histories end before the event, in the order of the log (--history_ends=before_event)"),
        (plain, {"history_ends": BEFORE_TIME}, "histories end before the time of the event"),
    ):
        assert line in describe(prepare(config_of(tmp_path, log, **data).data), 10)


def test_damaged_histories_are_found(tmp_path: Path) -> None:
    config = config_of(tmp_path, pages(num_users=3), history_delay="11").data
    store = prepare(config)
    folder = history_folders.histories_folder(store, store.facts)
    (folder / "history_ends.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"history_ends\.npy: .*cannot be read|does not have"):
        open_prepared(config)


@pytest.mark.parametrize(
    ("labelled", "data", "words"),
    [
        (True, {"history_delay": "soon"}, "--history_delay: must be a whole number, alone or with s, m, h or d"),
        (True, {"history_delay": "-1"}, "--history_delay: must be a whole number, alone or with s, m, h or d"),
        (True, {"history_delay": "9" * 18 + "d"}, "--history_delay: must be a whole number"),
        (
            True,
            {"history_delay": "5", "history_ends": BEFORE_EVENT},
            "--history_delay: belongs to histories that end before the time of a request. Received: '5'",
        ),
        (True, {"request_column": "page", "history_ends": BEFORE_EVENT}, "--request_column: belongs to histories"),
        (True, {"request_column": "pages"}, "pages"),
        (True, {"request_column": "item_id"}, "a column can have one role"),
        (
            False,
            {"history_delay": "5"},
            "--history_delay: belongs to histories that end before the time of a request. Received: '5', for a log "
            "without labels, whose histories end before the event. Add --history_ends=before_time, or drop it.",
        ),
        (False, {"request_column": "page"}, "Add --history_ends=before_time, or drop it."),
        (
            False,
            {"label_time_column": "timestamp2", "history_ends": BEFORE_TIME},
            "--label_time_column: tells when a positive came, which takes a log with labels. Received: 'timestamp2', "
            "and a log without the column 'label'. Give --label_column, or drop it.",
        ),
        (True, {"dataset": "synthetic", "data_path": "", "request_column": "page"}, "--dataset=synthetic has no such"),
    ],
)
def test_what_is_refused(tmp_path: Path, labelled: bool, data: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        prepare(config_of(tmp_path, pages(num_users=3, labelled=labelled), **data).data)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [("a", 10, 1, 9)],
            "row 1: every positive needs its clicked_at, which is not before its timestamp. Received: clicked_at=9 "
            "before 10, as read. Correct the row.",
        ),
        (
            [("a", 10, 0, None), ("b", 11, 1, None)],
            "row 2: every positive needs its clicked_at, which is not before its timestamp. Received: no clicked_at.",
        ),
        ([("a", 10, 1, "2024-01-01")], "row 1: all timestamps must be of one kind, integers so far"),
    ],
)
def test_wrong_times_of_labels(tmp_path: Path, rows: list[tuple], words: str) -> None:
    log = events(*rows, names=("item_id", "timestamp", "label", "clicked_at"))
    with pytest.raises(InputError) as caught:
        prepare(config_of(tmp_path, log, label_time_column="clicked_at").data)
    assert words in str(caught.value)
