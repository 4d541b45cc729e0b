"""Prepared data that newer files extend, against preparing all files together."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from din_dist.config import DataConfig, Split
from din_dist.data import blocks
from din_dist.data.event_store import EventStore
from din_dist.data.extension import digest_of
from din_dist.data.prepared import open_prepared, prepare
from din_dist.data.splits import SPLITS, held_out, split_examples
from din_dist.errors import InputError
from din_dist.features.spec import FeatureConflict
from tests.support.growing_log import FORMS, LABELS, VISITS, assert_same_files, config_of, rows_of, write


def prepared(folder: Path, old: list[dict], new: list[dict], **given: Any) -> tuple[EventStore, EventStore, EventStore]:
    """The old rows, the old ones extended by the new, and both prepared together."""
    parts = [write(folder / "old", "a", old), write(folder / "new", "b", new)]
    write(folder / "both", "a", old)
    parts.append(write(folder / "both", "b", new))
    before = prepare(config_of(folder, parts[0], **given))
    extended = prepare(config_of(folder, parts[1], extend=str(before.folder), **given))
    return before, extended, prepare(config_of(folder, parts[2], **given))


@pytest.mark.parametrize("form", FORMS)
def test_it_is_what_all_files_together_give(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "EVENTS_PER_BLOCK", 40)
    old, new = rows_of(1, "o", 300, (0, 25), 20), rows_of(2, "n", 120, (20, 32), 30)
    _, extended, both = prepared(tmp_path, old, new, **FORMS[form])
    assert_same_files(extended.folder, both.folder)
    for config in (FORMS[form], FORMS[form] | {"train_from": 20}):
        splits = [
            split_examples(store, dataclasses.replace(config_of(tmp_path, tmp_path), **config))
            for store in (extended, both)
        ]
        for name in SPLITS:
            assert np.array_equal(splits[0][name].events(), splits[1][name].events())


@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 30)),
    times=st.tuples(st.integers(1, 12), st.integers(0, 12)),
    most=st.tuples(st.integers(2, 9), st.integers(2, 12)),
)
@settings(max_examples=25, deadline=None)
def test_any_two_logs(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    sizes: tuple[int, int],
    times: tuple[int, int],
    most: tuple[int, int],
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    old = rows_of(seed, "o", sizes[0], (0, times[0]), most[0])
    new = rows_of(seed + 1, "n", sizes[1], (times[1], times[1] + 4), most[1])
    given = LABELS | VISITS | {"validation_from": 0, "test_from": 0}
    for rows in (old, new):  # a positive each, and training events
        rows[0] |= {"click": 1, "acted_at": rows[0]["timestamp"]}
    _, extended, both = prepared(folder, old, new, declared=False, item_features=("category_id",), **given)
    assert_same_files(extended.folder, both.folder)


def test_old_ids_stay_whatever_the_order_of_the_new_files(tmp_path: Path) -> None:
    old, new = rows_of(3, "o", 200, (0, 25), 20), rows_of(4, "n", 100, (20, 32), 40)
    before, extended, _ = prepared(tmp_path, old, new)
    write(tmp_path / "permuted", "b", new[::-1])
    permuted = prepare(config_of(tmp_path, tmp_path / "permuted", extend=str(before.folder)))
    for name in ("users", "items", "category_id"):
        ids = before.vocabulary(name).to_pylist()
        for store in (extended, permuted):
            assert store.vocabulary(name).to_pylist()[: len(ids)] == ids
        assert set(permuted.vocabulary(name).to_pylist()) == set(extended.vocabulary(name).to_pylist())
    assert permuted.vocabulary("items").to_pylist() != extended.vocabulary("items").to_pylist()


def test_facts_tell_what_it_extends(tmp_path: Path) -> None:
    old, new = rows_of(3, "o", 50, (0, 25), 20), rows_of(4, "n", 30, (20, 32), 40)
    before, extended, _ = prepared(tmp_path, old, new)
    told = json.loads((extended.folder / "facts.json").read_text())["extends"]
    assert told["folder"] == str(before.folder)
    assert told["fingerprint"] == before.facts.fingerprint
    assert told["events"] == 50
    users = before.vocabulary("users")
    assert told["vocabularies"]["users"] == {"ids": len(users), "digest": digest_of(users)}
    assert {name.split("/")[0] for name in told["vocabularies"]} == {"users", "items", "category_id", "raw_features"}


def test_a_digest_is_of_the_ids_alone() -> None:
    texts = ["a", "", "bc"]
    digests = {
        digest_of(pa.array(texts)),
        digest_of(pa.array(["x", *texts], pa.large_string())[1:]),
        digest_of(pa.chunked_array([texts[:1], texts[1:]])),
    }
    assert len(digests) == 1
    others = [["a", "b", "c"], ["ab", "", "c"], ["", "a", "bc"], [1, 2], [2, 1]]
    assert len({digest_of(pa.array(ids)) for ids in others} | digests) == 6


def test_an_extension_can_be_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "EVENTS_PER_BLOCK", 40)
    parts = [rows_of(5 + n, f"d{n}", 80, (8 * n, 8 * n + 10), 15 + 5 * n) for n in range(4)]
    store, extend = None, ""
    for n, rows in enumerate(parts):
        write(tmp_path / "all", f"{n}", rows)
        store = prepare(config_of(tmp_path, write(tmp_path / f"{n}", "new", rows), extend=extend, **LABELS))
        extend = str(store.folder)
    assert store is not None
    assert_same_files(store.folder, prepare(config_of(tmp_path, tmp_path / "all", **LABELS)).folder)


def test_a_data_folder_with_one_data_set_will_do(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old", "a", rows_of(1, "o", 50, (0, 9), 9)), rows_of(2, "n", 30, (9, 12), 9)
    before = prepare(config_of(tmp_path, old))
    config = config_of(tmp_path, write(tmp_path / "new", "b", new), extend=str(tmp_path / "prepared"))
    config = dataclasses.replace(config, data_dir=str(tmp_path / "other"))
    assert prepare(config).facts.extends["folder"] == str(before.folder)
    prepare(config_of(tmp_path, tmp_path / "new"))
    with pytest.raises(InputError, match="must be the folder of one prepared data set. Received: .*, 2 of them below"):
        prepare(dataclasses.replace(config, data_dir=str(tmp_path / "third")))
    with pytest.raises(InputError, match=r"Received: .*nowhere, none. Give the folder that prepare_data printed"):
        prepare(dataclasses.replace(config, extend=str(tmp_path / "nowhere")))


def test_the_parent_may_go_but_not_change(tmp_path: Path) -> None:
    old, new = rows_of(1, "o", 50, (0, 9), 9), rows_of(2, "n", 30, (9, 12), 9)
    before, _, _ = prepared(tmp_path, old, new)
    config = config_of(tmp_path, tmp_path / "new", extend=str(before.folder))
    facts = before.folder / "facts.json"
    text = facts.read_text()
    facts.write_text(text.replace(before.facts.fingerprint, "0" * 32))
    with pytest.raises(InputError, match=r"must stay as it was when --extend read it. Received: other events, .*0000"):
        open_prepared(config)
    facts.write_text(text)
    before.folder.rename(tmp_path / "gone")
    assert open_prepared(config).facts.num_events == 80


@pytest.mark.parametrize("conflict", [FeatureConflict.FIRST, FeatureConflict.LAST])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_feature_that_changed(tmp_path: Path, conflict: FeatureConflict, at_once: bool) -> None:
    row = rows_of(1, "o", 1, (0, 9), 1)[0] | {"item_id": 1, "age": "20s"}
    values = [
        {"category_id": None, "price": 1.0, "tags": [1], "picture": [1.0, 2.0]},
        {"category_id": "a", "price": None, "tags": [1], "picture": [1.0, 2.0]},
        {"category_id": "b", "price": 2.0, "tags": [2, 1], "picture": [1.0, 3.0]},
    ]
    rows = [row | {"timestamp": time} | value for time, value in enumerate(values)]
    rows += [row | {"item_id": 2, "timestamp": time} for time in range(4, 9)]
    rows[3] |= {"item_id": 3, "user_id": "u9"}
    before, extended, both = prepared(
        tmp_path, rows[:2] + rows[3:6], rows[2:3] + rows[6:], item_feature_conflict=conflict
    )
    store = both if at_once else extended
    place = int(store.item_features["category_id"][1])
    assert store.vocabulary("category_id").to_pylist()[place - 1] == {"first": "a", "last": "b"}[conflict]
    found = store.features["picture"].values
    assert found[1].tolist() == {"first": [1.0, 2.0], "last": [1.0, 3.0]}[conflict]
    assert before.facts.fingerprint != extended.facts.fingerprint


def test_two_values_are_an_error(tmp_path: Path) -> None:
    row = rows_of(1, "o", 1, (0, 9), 1)[0] | {"item_id": 1, "category_id": "a", "age": "20s", "price": 1.0}
    old = [row | {"timestamp": time} for time in range(3)]
    old += [row | {"user_id": "u9", "item_id": item} for item in (2, 3)]
    rule = (
        r"--extend: a feature of {} has one value for each, here {}. Received: {} with {} in .*1.0.0, and with {} in "
    )
    for name, changed, words in (
        ("category_id", "b", ("items", "category_id", "item 1", "'a'", "'b'")),
        ("price", 2.0, ("items", "price", "item 1", "1", "2")),
        ("age", "30s", ("users", "age", "user 'u0'", "'20s'", "'30s'")),
    ):
        with pytest.raises(
            InputError, match=rule.format(*words) + "the newer files. Correct the files, or give --item_f"
        ):
            prepared(tmp_path / name, old, [old[2] | {"timestamp": 5, name: changed}])


NEEDS = "--extend: newer files must have what the prepared data has, here "
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "labels": ({"label_column": "click", "label_column_required": True}, {}, f"{NEEDS}labels. Received: some in "),
    "tasks": (LABELS, LABELS | {"label_columns": ("buy", "click")}, f"{NEEDS}labels to predict .--label_columns.. "),
    "requests": (LABELS, LABELS | {"request_column": ""}, f"{NEEDS}requests .--request_column.. Received: some in "),
    "weights": (LABELS, LABELS | {"weight_column": ""}, f"{NEEDS}weights .--weight_column.. Received: some in "),
    "sessions": (
        {},
        VISITS,
        f"{NEEDS}sessions .--session_column.. Received: none in .*, and some in the newer files. ",
    ),
    "item features": (
        {},
        {"item_features": ()},
        f"{NEEDS}features of items .--item_features.. Received: category_id in ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_columns_are_refused(tmp_path: Path, case: str) -> None:
    old_settings, new_settings, message = REFUSED[case]
    old = write(tmp_path / "old", "a", rows_of(1, "o", 50, (0, 30), 9))
    before = prepare(config_of(tmp_path, old, declared=False, **old_settings))
    new = write(tmp_path / "new", "b", rows_of(2, "n", 30, (9, 32), 9))
    with pytest.raises(InputError, match=message):
        prepare(config_of(tmp_path, new, declared=False, extend=str(before.folder), **new_settings))


def test_features_that_the_old_data_lacks_are_refused(tmp_path: Path) -> None:
    before = prepare(config_of(tmp_path, write(tmp_path / "old", "a", rows_of(1, "o", 50, (0, 30), 9)), declared=False))
    new = write(tmp_path / "new", "b", rows_of(2, "n", 30, (9, 32), 9))
    with pytest.raises(InputError, match=f"{NEEDS}the feature of .* .--features.. Received: none in "):
        prepare(config_of(tmp_path, new, extend=str(before.folder)))


def test_ids_and_times_of_another_kind_are_refused(tmp_path: Path) -> None:
    rows = rows_of(1, "o", 30, (0, 9), 9)
    before = prepare(config_of(tmp_path, write(tmp_path / "old", "a", rows), declared=False))
    new = tmp_path / "new.csv"
    new.write_text("user_id,item_id,timestamp,category_id\nu1,x1,9,c1\nu1,x2,11,c1\n")
    rule = "ids must be of the type that they have in the prepared data, here integers of items. Received: text such as"
    with pytest.raises(InputError, match=f"--extend: {rule} 'x1'. Correct the newer files, or prepare all"):
        prepare(config_of(tmp_path, new, declared=False, extend=str(before.folder)))
    new.write_text("user_id,item_id,timestamp,category_id\nu1,1,1700000000000,c1\nu1,2,1700000000001,c2\n")
    rule = "here times of one unit. Received: seconds in .*, by their size, and milliseconds. Convert"
    with pytest.raises(InputError, match=rule):
        prepare(config_of(tmp_path, new, declared=False, extend=str(before.folder)))


def test_integers_join_texts(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    texts = ["user_id,item_id,timestamp\nu1,x1,1\nu1,7,2\n", "user_id,item_id,timestamp\nu1,7,3\nu2,8,4\nu2,7,5\n"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.csv").write_text(text)
        (folder / f"{number}.csv").write_text(text)
    before = prepare(config_of(tmp_path, tmp_path / "0.csv", declared=False))
    extended = prepare(config_of(tmp_path, tmp_path / "1.csv", declared=False, extend=str(before.folder)))
    assert_same_files(extended.folder, prepare(config_of(tmp_path, folder, declared=False)).folder)


def test_what_cannot_be_extended_is_refused_at_once(tmp_path: Path) -> None:
    words = "cannot be extended, because behaviours of users without events were left out when it was prepared"
    with pytest.raises(InputError, match=re.escape(f"--behaviours_path: {words}. Received: 'b.csv'. Drop --extend")):
        config_of(tmp_path, tmp_path, declared=False, extend="old", behaviours_path="b.csv")
    with pytest.raises(InputError, match="--extend: belongs to --dataset=event_log. Received: 'old'. Drop it."):
        DataConfig(extend="old")
    with pytest.raises(InputError, match="--item_feature_conflict: belongs to --dataset=event_log. Received: 'last'"):
        DataConfig(item_feature_conflict=FeatureConflict.LAST)


def test_training_begins_at_a_time(tmp_path: Path) -> None:
    rows = rows_of(1, "o", 400, (0, 40), 12)
    data = write(tmp_path / "log", "a", rows)
    given = LABELS | {"validation_from": 30, "test_from": 35}
    config = config_of(tmp_path, data, declared=False, **given)
    store = prepare(config)
    all_of_it = split_examples(store, config)
    late = split_examples(store, dataclasses.replace(config, train_from=20))
    again = split_examples(store, dataclasses.replace(config, train_from=20))  # as it was kept
    times = store.timestamps
    assert np.array_equal(late["train"].events(), np.flatnonzero((times >= 20) & (times < 30)))
    assert np.array_equal(late["train"].events(), again["train"].events())
    assert np.array_equal(all_of_it["train"].events(), np.flatnonzero(times < 30))
    for name in ("validation", "test"):
        assert np.array_equal(late[name].events(), all_of_it[name].events())
    held = [np.concatenate(list(held_out(splits))) for splits in (late, all_of_it)]
    assert np.array_equal(*held)  # what statistics leave out
    with pytest.raises(
        InputError, match="--train_from: must be earlier than --validation_from and --test_from. Received"
    ):
        dataclasses.replace(config, train_from=30)
    alone = dataclasses.replace(config, train_from=50, split=Split.LEAVE_ONE_OUT, validation_from=0, test_from=0)
    with pytest.raises(InputError, match="Use users with more events, an earlier --train_from, or another split"):
        split_examples(store, alone)


@pytest.mark.parametrize("split", [Split.LEAVE_ONE_OUT, Split.LEAVE_TWO_OUT, Split.USERS])
@pytest.mark.parametrize("form", ["plain", "visits"])
def test_training_begins_at_a_time_in_every_split(tmp_path: Path, split: Split, form: str) -> None:
    data = write(tmp_path / "log", "a", rows_of(1, "o", 400, (0, 40), 50))
    config = config_of(tmp_path, data, declared=False, split=split, **FORMS[form])
    store = prepare(config)
    whole = split_examples(store, config)
    late = split_examples(store, dataclasses.replace(config, train_from=25))
    events = whole["train"].events()
    assert np.array_equal(late["train"].events(), events[store.timestamps[events] >= 25])
    assert 0 < late["train"].num_rows < whole["train"].num_rows
    assert np.array_equal(late["test"].events(), whole["test"].events())
