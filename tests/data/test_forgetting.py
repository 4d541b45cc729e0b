"""Prepared data that forget rare and old items and users, against a log that never had their events."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.config import DataConfig
from din_dist.data import blocks
from din_dist.data.event_store import PACKED_DIR, EventStore
from din_dist.data.extension import digest_of
from din_dist.data.forgetting import shown_forgotten
from din_dist.data.prepared import open_prepared, prepare
from din_dist.data.raw_columns import RawColumn
from din_dist.data.raw_features import raw_ids
from din_dist.data.row_ids import NEW, RowIds, rows_before
from din_dist.data.statistics import describe
from din_dist.errors import InputError
from tests.support.growing_log import FORMS, assert_same_files, config_of, rows_of, write

DAY = 86_400
Rows = list[dict[str, Any]]


def in_days(rows: Rows) -> Rows:
    """The same rows, whose times are days."""
    for row in rows:
        row |= {name: row[name] * DAY for name in ("timestamp", "acted_at")}
    return rows


def log_of(seed: int = 1, num_rows: int = 300) -> Rows:
    """Rows of which some items are rare, and some users and items gone since long."""
    rows = rows_of(seed, "o", num_rows, (0, 32), 20)
    for row in rows:
        user, old = int(row["user_id"][1:]), row["timestamp"] < 10
        if user < 5 and not old:
            row |= {"timestamp": row["timestamp"] % 10}
            row |= {"acted_at": row["timestamp"]}
        if row["item_id"] >= 15 and (row["timestamp"] >= 10 or user % 3):
            row |= {"item_id": row["item_id"] - 15}
            row |= dict.fromkeys(("category_id", "price", "tags", "picture"))
    for place in range(0, 30, 10):
        missing = dict.fromkeys(("category_id", "price", "tags", "picture"))
        rows[place] |= {"item_id": 100 + place, "timestamp": 8 + place, "acted_at": 8 + place, **missing}
    for place, row in enumerate(rows):  # a request keeps its first time, even if that event is left out
        row |= {"page": f"p{place}"}
    return in_days(rows)


def what_stays(rows: Rows, min_item_events: int = 0, forget_after: int = 0) -> Rows:
    """The rule, in plain Python."""
    begin = max(row["timestamp"] for row in rows) - forget_after * DAY if forget_after else -1
    counts = Counter(row["item_id"] for row in rows)

    def times(name: str, own: object) -> list[int]:
        return [row["timestamp"] for row in rows if row[name] == own]

    items = set()
    for item, count in counts.items():
        found = times("item_id", item)
        rare = count < min_item_events and (not forget_after or min(found) < begin)
        if max(found) >= begin and not rare:
            items.add(item)
    users = {user for user in {row["user_id"] for row in rows} if max(times("user_id", user)) >= begin}
    return [row for row in rows if row["item_id"] in items and row["user_id"] in users]


def in_an_order_that_stays(rows: Rows, left: Rows) -> Rows:
    """The rows in an order in which users and items that stay appear first by rows that stay, as dense ids do."""
    names = ("user_id", "item_id")
    stay = {(name, row[name]) for row in left for name in names}
    seen: set[tuple[str, object]] = set()
    found, waiting = [], []
    for row in rows:
        if row in left:
            found.append(row)
            seen |= {(name, row[name]) for name in names}
        else:
            waiting.append(row)
        ready = [
            row for row in waiting if all((name, row[name]) in seen | ({(name, row[name])} - stay) for name in names)
        ]
        found += ready
        waiting = [row for row in waiting if row not in ready]
    assert not waiting
    return found


RULES: dict[str, dict[str, int]] = {
    "rare": {"min_item_events": 5},
    "old": {"forget_after": 20},
    "both": {"min_item_events": 5, "forget_after": 12},
}


@pytest.mark.parametrize(
    ("form", "rule"), [*((form, "both") for form in FORMS), ("plain", "rare"), ("labels and visits", "old")]
)
def test_it_is_a_log_without_what_is_forgotten(
    tmp_path: Path, form: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "EVENTS_PER_BLOCK", 40)
    given = dict(FORMS[form])
    if "validation_from" in given:
        given |= {"validation_from": 24 * DAY, "test_from": 28 * DAY}
    rows = log_of()
    left = what_stays(rows, **RULES[rule])
    assert 0 < len(left) < len(rows)
    rows = in_an_order_that_stays(rows, left)
    left = what_stays(rows, **RULES[rule])
    store = prepare(config_of(tmp_path, write(tmp_path / "all", "a", rows), **given, **RULES[rule]))
    same = prepare(config_of(tmp_path, write(tmp_path / "left", "a", left), **given))
    for name in ("users", "items"):
        assert store.vocabulary(name).to_pylist() == same.vocabulary(name).to_pylist()
    assert_same_arrays(store, same)
    assert_same_features(store, same)


def assert_same_arrays(left: EventStore, right: EventStore) -> None:
    """The packed arrays are the same to the byte."""
    folders = [store.folder / PACKED_DIR for store in (left, right)]
    names = {path.name for path in folders[1].glob("*.npy")}
    assert names == {path.name for path in folders[0].glob("*.npy")}
    for name in names - {"actions.npy"}:  # whose codes are in the order of the log
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    if "actions.npy" in names:
        codes = [
            np.array(["", *store.facts.actions])[np.load(store.folder / PACKED_DIR / "actions.npy")]
            for store in (left, right)
        ]
        assert np.array_equal(*codes)


def assert_same_features(left: EventStore, right: EventStore) -> None:
    """Features have the same values by their own ids, whose order may be another, and no id that no row has."""
    assert left.facts.item_features == right.facts.item_features
    for name in left.item_features:
        assert left.own_ids(name, left.item_features[name]) == right.own_ids(name, right.item_features[name])
    keys = json.loads((right.folder / "raw_features" / "columns.json").read_text())["columns"]
    assert keys
    for key in keys:
        folders = [store.folder / "raw_features" for store in (left, right)]
        vocabularies = [folder / f"{key}.parquet" for folder in folders]
        assert vocabularies[0].exists() == vocabularies[1].exists()
        for path in folders[1].glob(f"{key}-*.npy"):
            arrays = [np.load(folder / path.name) for folder in folders]
            if path.name == f"{key}-codes.npy":
                ids = [np.array([None, *pq.read_table(file)["id"].to_pylist()]) for file in vocabularies]
                assert sorted(map(str, ids[0])) == sorted(map(str, ids[1]))
                arrays = [own[codes] for own, codes in zip(ids, arrays, strict=True)]
            np.testing.assert_array_equal(*arrays, err_msg=path.name)  # NaN equals NaN


def test_a_session_begins_at_its_first_event_that_stays(tmp_path: Path) -> None:
    row = rows_of(1, "o", 1, (0, 9), 1)[0] | {"user_id": "u", "category_id": None}
    visits = [("a", 9), ("b", 1), ("a", 1), ("b", 2), ("a", 2)]  # item 9 is rare
    rows = [row | {"visit": visit, "item_id": item, "timestamp": time} for time, (visit, item) in enumerate(visits)]
    config = config_of(
        tmp_path, write(tmp_path / "log", "a", rows), declared=False, session_column="visit", min_item_events=2
    )
    assert prepare(config).session_places.tolist() == [0, 1, 0, 1]


def test_facts_tell_what_was_forgotten(tmp_path: Path) -> None:
    rows = log_of()
    left = what_stays(rows, **RULES["both"])
    config = config_of(tmp_path, write(tmp_path / "log", "a", rows), declared=False, **RULES["both"])
    store = prepare(config)
    told = json.loads((store.folder / "facts.json").read_text())["forgotten"]
    gone = {
        name: list(dict.fromkeys(row[name] for row in rows if row[name] not in {other[name] for other in left}))
        for name in ("user_id", "item_id")
    }
    assert told == {
        "min_item_events": 5,
        "forget_after": 12,
        "events": len(rows) - len(left),
        "users": {"ids": len(gone["user_id"]), "digest": digest_of(pa.array(gone["user_id"]))},
        "items": {"ids": len(gone["item_id"]), "digest": digest_of(pa.array(gone["item_id"]))},
    }
    line = shown_forgotten(told)
    assert line in describe(store, 10)
    assert re.fullmatch(
        r"forgotten \(--min_item_events=5 --forget_after=12\): \d+ items, \d+ users, with \d+ events", line
    )
    plain = prepare(config_of(tmp_path, tmp_path / "log", declared=False))
    assert plain.facts.forgotten is None
    assert plain.facts.fingerprint != store.facts.fingerprint
    again = prepare(config, overwrite=True)
    assert again.facts == store.facts
    assert open_prepared(config).facts == store.facts


@pytest.mark.parametrize("form", ["plain", "labels and visits"])
def test_an_extension_forgets_and_ids_come_back_as_new_ones(tmp_path: Path, form: str) -> None:
    """The same as with all files together; old ids are no prefix then, and rows are found by the ids."""
    given = dict(FORMS[form])
    if "validation_from" in given:
        given |= {"validation_from": 24 * DAY, "test_from": 28 * DAY}
    rule = RULES["both"]
    old, new = log_of(), in_days(rows_of(2, "n", 120, (33, 40), 12))
    parts = [write(tmp_path / "old", "a", old), write(tmp_path / "new", "b", new)]
    write(tmp_path / "both", "a", old)
    write(tmp_path / "both", "b", new)
    before = prepare(config_of(tmp_path, parts[0], **given))
    extended = prepare(config_of(tmp_path, parts[1], extend=str(before.folder), **given, **rule))
    assert_same_files(extended.folder, prepare(config_of(tmp_path, tmp_path / "both", **given, **rule)).folder)
    assert extended.facts.forgotten["newer_events"] == len(new) - sum(extended.timestamps > before.timestamps.max())
    ids = [store.vocabulary("items").combine_chunks() for store in (before, extended)]
    assert ids[1][: len(ids[0])].to_pylist() != ids[0].to_pylist()
    tables = [RowIds("item", ("item",), len(own) + 1, own) for own in ids]
    rows = rows_before(*tables)
    for row, own in enumerate(ids[1].to_pylist(), 1):
        assert rows[row] == (ids[0].to_pylist().index(own) + 1 if own in ids[0].to_pylist() else NEW)
    gone = next(own for own in ids[0].to_pylist() if own not in ids[1].to_pylist())
    back = [row | {"item_id": gone, "timestamp": 41 * DAY, "acted_at": 41 * DAY} for row in new[:3]]
    back = [row | dict.fromkeys(("category_id", "price", "tags", "picture")) for row in back]
    third = prepare(
        config_of(tmp_path, write(tmp_path / "back", "c", back), extend=str(extended.folder), **given, **rule)
    )
    now = third.vocabulary("items").combine_chunks()
    row = 1 + now.to_pylist().index(gone)
    assert rows_before(tables[1], RowIds("item", ("item",), len(now) + 1, now))[row] == NEW


def test_vocabularies_lose_what_no_row_has(tmp_path: Path) -> None:
    config = config_of(tmp_path, write(tmp_path / "log", "a", log_of()), **RULES["old"])
    store = prepare(config)
    for feature in store.features.values():
        column = feature.encoding.spec
        if column.name in ("device", "tags", "age"):
            raw = RawColumn.of(column)
            codes = np.load(store.folder / "raw_features" / f"{raw.key}-codes.npy")
            assert {*codes} - {0} == {*range(1, len(raw_ids(store.folder, raw)) + 1)}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "extend": (
        {"min_item_events": 5, "extend": "old"},
        "--min_item_events: with --extend needs --forget_after, because new items of a day would have too few events. "
        "Received: 5. Say in --forget_after within how many days an item must have so many.",
    ),
    "one": (
        {"min_item_events": 1},
        "--min_item_events: forgets nothing below 2. Received: 1. Give 2 or more, or drop it.",
    ),
    "negative": ({"forget_after": -1}, "--forget_after: must be at least 0. Received: -1. For example 0."),
    "behaviours": (
        {"forget_after": 5, "behaviours_path": "b.csv"},
        "--forget_after: cannot be used with --behaviours_path yet. Received: 5. Drop one of the two.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(InputError, match=re.escape(message)):
        DataConfig(dataset="event_log", data_path="a.csv", **given)


def test_other_data_sets_are_refused() -> None:
    rule = "--forget_after: belongs to --dataset=event_log. Received: 5. Drop it."
    with pytest.raises(InputError, match=re.escape(rule)):
        DataConfig(forget_after=5)


def test_something_must_stay(tmp_path: Path) -> None:
    data = write(tmp_path / "log", "a", rows_of(1, "o", 30, (0, 9), 9))
    rule = r"--min_item_events: must leave events. Received: 99, and no item has more than \d+ events. Give a smaller"
    with pytest.raises(InputError, match=rule):
        prepare(config_of(tmp_path, data, declared=False, min_item_events=99))
