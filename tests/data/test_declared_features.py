"""Declared features from a user's files to `EventStore.features`: values by hand, in every format."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from din_dist.config import DataConfig, Split
from din_dist.data import encoding
from din_dist.data.builders import complete_journey
from din_dist.data.event_store import EventStore
from din_dist.data.hashing import hashed_rows
from din_dist.data.prepared import open_prepared, prepare, prepared_folder
from din_dist.data.statistics import describe, measure
from din_dist.features.encoding import StoredFeature
from din_dist.features.times import TimestampUnit
from tests.support.declared_features import Row, config_for, write_table

FORMATS = [".parquet", ".csv", ".jsonl"]
# By user and time: a has x y x z at 1 2 3 4, b has y z at 1 2. The last event of each user tests.
ROWS: list[Row] = [
    {"user_id": "b", "item_id": "z", "timestamp": 2, "label": 1},
    {"user_id": "a", "item_id": "z", "timestamp": 4, "label": 0},
    {"user_id": "a", "item_id": "y", "timestamp": 2, "label": 1},
    {"user_id": "b", "item_id": "y", "timestamp": 1, "label": 0},
    {"user_id": "a", "item_id": "x", "timestamp": 1, "label": 1},
    {"user_id": "a", "item_id": "x", "timestamp": 3, "label": 1},
]
# Users are numbered by first appearance: b, a; items: z, y, x. So the events are stored as
STORED = ["by", "bz", "ax", "ay", "ax", "az"]
TRAINED = [0, 2, 3, 4]


def with_column(name: str, by: str, values: dict[str, Any]) -> list[Row]:
    """The rows with one column more.

    Args:
        name: of the column.
        by: `user`, `item`, or `event` for user, item and time.
        values: what the column holds; None where nothing stands.
    """

    def key(row: Row) -> str:
        return {
            "user": row["user_id"],
            "item": row["item_id"],
            "event": f"{row['user_id']}{row['item_id']}{row['timestamp']}",
        }[by]

    return [{**row, name: values.get(key(row))} for row in ROWS]


def opened(folder: Path, rows: list[Row], declarations: str, suffix: str = ".parquet", **settings: Any) -> EventStore:
    return prepare(config_for(write_table(folder / f"log{suffix}", rows), declarations, item_features=(), **settings))


def ids(store: EventStore, name: str) -> list[Any]:
    """The own id of each row; None for row 0."""
    vocabulary = [None, *store.feature_vocabulary(name).to_pylist()]
    return [vocabulary[row] for row in store.features[name].values]


def lists(feature: StoredFeature) -> list[list[int]]:
    assert feature.offsets is not None
    return [part.tolist() for part in np.split(feature.values, feature.offsets[1:-1])]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("one", "two"), [("red", "blue"), (10, 9)])
def test_category_of_items(tmp_path: Path, suffix: str, one: Any, two: Any) -> None:
    """Rows follow the order of the values: blue before red, 9 before 10. Item z is in the test alone."""
    rows = with_column("colour", "item", {"x": one, "y": two, "z": one})
    store = opened(tmp_path, rows, '[colour]\nof = "item"\nkind = "category"', suffix)
    feature = store.features["colour"]
    assert feature.values.dtype == np.int32
    assert feature.values.tolist() == [0, 2, 1, 2]
    assert store.feature_vocabulary("colour").to_pylist() == [two, one]
    assert feature.encoding.num_rows == 3
    assert feature.encoding.integers is isinstance(one, int)
    assert dataclasses.astuple(feature.encoding.counts) == (2, 0, 0, 0.0, 0)


@pytest.mark.parametrize("suffix", FORMATS)
def test_values_of_the_test_alone_are_unknown(tmp_path: Path, suffix: str) -> None:
    rows = with_column("device", "event", {"ax1": "ios", "ay2": "web", "ax3": "ios", "az4": "tv", "by1": None})
    store = opened(tmp_path, rows, '[device]\nof = "context"\nkind = "category"', suffix)
    assert store.features["device"].values.tolist() == [0, 0, 1, 2, 1, 0]
    counts = store.features["device"].encoding.counts
    assert (counts.distinct, counts.missing, counts.rare) == (3, 2, 1)


def test_min_count(tmp_path: Path) -> None:
    rows = with_column("device", "event", {"ax1": "ios", "ay2": "web", "ax3": "ios", "az4": "web", "by1": "tv"})
    declared = '[all]\nof = "context"\nkind = "category"\ncolumn = "device"\n[{0}]\nof = "context"\n'
    declared += 'kind = "category"\ncolumn = "device"\nmin_count = {1}'
    store = opened(tmp_path, rows, declared.format("one", 1))
    assert store.features["all"].values.tolist() == store.features["one"].values.tolist() == [2, 0, 1, 3, 1, 3]
    store = opened(tmp_path, rows, declared.format("two", 2))
    assert store.features["two"].values.tolist() == [0, 0, 1, 0, 1, 0]
    assert store.features["two"].encoding.counts.rare == 2


@pytest.mark.parametrize("suffix", FORMATS)
def test_numbers(tmp_path: Path, suffix: str) -> None:
    """The training events of a column: 2, 4, none and 6; so mean 4 and deviation sqrt(8/3)."""
    values = {"by1": 2.0, "ax1": 4.0, "ay2": None, "ax3": 6.0, "bz2": 100.0, "az4": None}
    store = opened(
        tmp_path, with_column("price", "event", values), '[price]\nof = "candidate"\nkind = "number"', suffix
    )
    feature = store.features["price"]
    assert feature.values.dtype == np.float32
    assert feature.encoding.mean == 4.0
    assert feature.encoding.deviation == pytest.approx((8 / 3) ** 0.5)
    expected = [-2, 96, 0, np.nan, 2, np.nan]
    np.testing.assert_allclose(feature.values, np.array(expected) / (8 / 3) ** 0.5, rtol=1e-6)
    assert feature.encoding.counts.missing == 2


def test_encodings_of_numbers(tmp_path: Path) -> None:
    """Of 1, 2, 2, 3, with the test's 9: nearest-rank bounds of 4 bins are 1, 2 and 2."""
    rows = with_column("x", "event", {"by1": 1, "ax1": 2, "ay2": 2, "ax3": 3, "bz2": 9, "az4": None})
    declared = "".join(
        f'[{name}]\nof = "context"\nkind = "number"\ncolumn = "x"\nencode = "{encode}"\n'
        for name, encode in {"q": "quantiles:4", "log": "log", "none": "none", "p": "periodic:2,0.5"}.items()
    )
    store = opened(tmp_path, rows, declared)
    found = {name: feature.values for name, feature in store.features.items()}
    assert store.features["q"].encoding.bounds == (1.0, 2.0)
    assert store.features["q"].encoding.num_rows == 4
    assert found["q"].tolist() == [2, 3, 3, 3, 3, 0]
    np.testing.assert_array_equal(found["none"], np.array([1, 9, 2, 2, 3, np.nan], np.float32))
    logs = np.log1p([1, 2, 2, 3])
    wanted = (np.log1p([1, 9, 2, 2, 3, np.nan]) - logs.mean()) / logs.std()
    np.testing.assert_allclose(found["log"], wanted, rtol=1e-6)
    np.testing.assert_allclose(found["p"][:1], [-1 / 0.5**0.5], rtol=1e-6)


def test_a_constant_number_has_deviation_1(tmp_path: Path) -> None:
    rows = with_column("x", "user", {"a": 0.1, "b": 0.1})
    store = opened(tmp_path, rows, '[x]\nof = "user"\nkind = "number"')
    assert store.features["x"].values.tolist() == [0, 0]
    assert store.features["x"].encoding.deviation == 1


def test_numbers_of_items_count_once_a_training_event(tmp_path: Path) -> None:
    """Item x has 2 training events and y has 2; z has none, so its 100 counts nothing."""
    rows = with_column("x", "item", {"x": 1, "y": 3, "z": 100})
    store = opened(tmp_path, rows, '[x]\nof = "item"\nkind = "number"')
    assert store.features["x"].encoding.mean == 2
    np.testing.assert_array_equal(store.features["x"].values, np.array([np.nan, 98, 1, -1], np.float32))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", [int, str])
def test_lists(tmp_path: Path, suffix: str, kind: type) -> None:
    """Tag 9 is rare: it stays in the list, as row 0."""
    tags = {"x": [2, 1, 2], "y": [2], "z": [9, 1]}
    rows = with_column("tags", "item", {item: [kind(tag) for tag in found] for item, found in tags.items()})
    store = opened(tmp_path, rows, '[tags]\nof = "item"\nkind = "categories"', suffix)
    feature = store.features["tags"]
    assert (feature.values.dtype, feature.weights) == (np.int32, None)
    assert lists(feature) == [[], [0, 1], [2], [2, 1, 2]]
    assert store.feature_vocabulary("tags").to_pylist() == [kind(1), kind(2)]
    assert dataclasses.astuple(feature.encoding.counts) == (3, 0, 1, 0.0, 0)


@pytest.mark.parametrize("suffix", FORMATS)
def test_lists_in_text(tmp_path: Path, suffix: str) -> None:
    """Empty text is an empty list, and empty values are left out. Integers become integers."""
    rows = with_column("tags", "event", {"ax1": "b;a", "ay2": "", "ax3": "b;;b", "az4": "c", "by1": None, "bz2": "a"})
    declared = '[tags]\nof = "context"\nkind = "categories"\nseparator = ";"'
    store = opened(tmp_path, rows, declared, suffix)
    assert lists(store.features["tags"]) == [[], [1], [2, 1], [], [2, 2], [0]]
    assert store.features["tags"].encoding.counts.missing == 2
    rows = with_column("tags", "event", {"ax1": "7|30", "ax3": "30"})
    store = opened(tmp_path, rows, declared.replace(";", "|"), suffix)
    assert store.feature_vocabulary("tags").to_pylist() == [7, 30]


@pytest.mark.parametrize("suffix", FORMATS)
def test_weighted_lists(tmp_path: Path, suffix: str) -> None:
    rows = with_column("tags", "item", {"x": ["p", None, "q"], "y": ["p"], "z": None})
    weights = {"x": [0.5, 9, 2], "y": [-1], "z": None}
    rows = [{**row, "weight": weights[row["item_id"]]} for row in rows]
    declared = '[tags]\nof = "item"\nkind = "categories"\npool = "weighted"\nweights = "weight"'
    feature = opened(tmp_path, rows, declared, suffix).features["tags"]
    assert lists(feature) == [[], [], [1], [1, 2]]
    assert feature.weights is not None
    assert (feature.weights.dtype, feature.weights.tolist()) == (np.float32, [-1, 0.5, 2])


@pytest.mark.parametrize("suffix", FORMATS)
def test_vectors(tmp_path: Path, suffix: str) -> None:
    rows = with_column("v", "item", {"x": [1, 2.5], "y": None, "z": [-3, 0]})
    declared = '[v]\nof = "item"\nkind = "vector"\n[t]\nof = "item"\nkind = "vector"\ncolumn = "v"\ntrained = true'
    store = opened(tmp_path, rows, declared, suffix)
    frozen, trained = store.features["v"], store.features["t"]
    expected = np.array([[np.nan] * 2, [-3, 0], [np.nan] * 2, [1, 2.5]], np.float16)
    assert (frozen.values.dtype, frozen.encoding.dimension) == (np.float16, 2)
    np.testing.assert_array_equal(frozen.values, expected)
    assert trained.values.tolist() == [0, 1, 2, 3]
    assert trained.encoding.num_rows == 4
    np.testing.assert_array_equal(trained.start, expected)
    assert store.feature_vocabulary("t").to_pylist() == ["z", "y", "x"]
    assert store.feature_vocabulary("v").to_pylist() == []


def test_vectors_of_users_are_rows_from_1(tmp_path: Path) -> None:
    rows = with_column("v", "user", {"a": "1 2", "b": "3 4"})
    declared = '[v]\nof = "user"\nkind = "vector"\nseparator = " "\ntrained = true'
    store = opened(tmp_path, rows, declared)
    assert store.features["v"].values.tolist() == [1, 2]
    np.testing.assert_array_equal(store.features["v"].start, np.array([[np.nan] * 2, [3, 4], [1, 2]], np.float16))
    assert store.feature_vocabulary("v").to_pylist() == ["b", "a"]


def test_vectors_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([[1, 2], [3, 4], [5, 6]]))
    (tmp_path / "v.txt").write_text("x\nnowhere\nz\n")
    declared = '[v]\nof = "item"\nkind = "vector"\npath = "v.npy"\nids = "v.txt"'
    store = opened(tmp_path, ROWS, declared)
    expected = np.array([[np.nan] * 2, [5, 6], [np.nan] * 2, [1, 2]], np.float16)
    np.testing.assert_array_equal(store.features["v"].values, expected)
    counts = store.features["v"].encoding.counts
    assert (counts.distinct, counts.missing, counts.extra) == (2, 1, 1)
    np.save(tmp_path / "v.npy", np.array([[1, 2], [3, 4], [5, 7]]))
    with pytest.raises(Exception, match=r"v\.npy: this file has changed since the data was prepared\."):
        open_prepared(config_for(tmp_path / "log.parquet", declared, item_features=()))


def test_hashed(tmp_path: Path) -> None:
    """An integer is hashed as its decimal text, and an export can do the same in TensorFlow."""
    declared = (
        '[u]\nof = "user"\nkind = "category"\ncolumn = "user_id"\nrows = 5\n[i]\nof = "item"\nkind = "category"\n'
    )
    declared += 'column = "item_id"\nrows = 1'
    store = opened(tmp_path, ROWS, declared)
    expected = 1 + tf.strings.to_hash_bucket_fast(["b", "a"], 5).numpy()
    assert store.features["u"].values.tolist() == expected.tolist()
    assert store.features["u"].encoding.num_rows == 6
    assert store.features["i"].values.tolist() == [0, 1, 1, 1]
    assert store.features["i"].encoding.counts.colliding == 1.0  # x and y; z has no training event
    assert store.feature_vocabulary("i").to_pylist() == []
    rows = [{**row, "user_id": {"a": 7, "b": 30}[row["user_id"]]} for row in ROWS]
    numbers = opened(tmp_path, rows, declared, ".csv")
    assert numbers.features["u"].values.tolist() == hashed_rows(tf.constant(["30", "7"]), 5).numpy().tolist()


def test_hashes_never_change() -> None:
    """Tables are trained by them."""
    assert hashed_rows(tf.constant(["", "a", "7", "ä"]), 1000).numpy().tolist() == [264, 940, 89, 176]


@pytest.mark.parametrize(("unit", "factor"), [("auto", 10**6), ("seconds", 1), ("milliseconds", 10**3), ("auto", 1)])
def test_times(tmp_path: Path, unit: str, factor: int) -> None:
    """1970-01-01 was a Thursday; 1514764800 is Monday, 2018-01-01, in UTC and an hour later in Vienna."""
    rows = [{**row, "timestamp": (1_514_764_800 + 3600 * row["timestamp"]) * factor} for row in ROWS]
    declared = '[h]\nof = "context"\nkind = "hour_of_day"\nfrom = "timestamp"\n'
    declared += '[d]\nof = "context"\nkind = "day_of_week"\nfrom = "timestamp"'
    store = opened(tmp_path, rows, declared, timestamp_unit=TimestampUnit(unit), timezone="Europe/Vienna")
    assert store.features["h"].values.tolist() == [3, 4, 3, 4, 5, 6]
    assert store.features["d"].values.tolist() == [1] * 6
    assert store.features["h"].encoding.num_rows == 25
    assert store.features["h"].encoding.timezone == "Europe/Vienna"
    assert store.features["h"].encoding.unit == ("microseconds" if factor > 1000 else unit.replace("auto", "seconds"))


def test_a_feature_may_be_the_log_s_own_column(tmp_path: Path) -> None:
    declared = '[u]\nof = "user"\nkind = "category"\ncolumn = "user_id"\n[t]\nof = "context"\nkind = "number"\n'
    declared += 'column = "timestamp"\nencode = "none"\n[i]\nof = "context"\nkind = "category"\ncolumn = "item_id"'
    store = opened(tmp_path, ROWS, declared)
    assert ids(store, "u") == ["b", "a"]
    assert store.features["t"].values.tolist() == [1, 2, 1, 2, 3, 4]
    assert ids(store, "i") == ["y", None, "x", "y", "x", None]


@pytest.mark.parametrize("suffix", FORMATS)
def test_tables(tmp_path: Path, suffix: str) -> None:
    """Item y has no row, and w no event. Users' text ids match, and the log's column comes where the table has none."""
    items = [{"item_id": "w", "price": 50}, {"item_id": "x", "price": 2}, {"item_id": "z", "price": 4}]
    users = [{"user_id": "a", "age": "old"}, {"user_id": "b", "age": None}]
    declared = '[price]\nof = "item"\nkind = "number"\nencode = "none"\n[age]\nof = "user"\nkind = "category"\n'
    declared += '[colour]\nof = "item"\nkind = "category"'
    store = opened(
        tmp_path,
        with_column("colour", "item", {"x": "red"}),
        declared,
        suffix,
        items_path=str(write_table(tmp_path / f"items{suffix}", items)),
        users_path=str(write_table(tmp_path / f"users{suffix}", users)),
    )
    np.testing.assert_array_equal(store.features["price"].values, np.array([np.nan, 4, np.nan, 2], np.float32))
    assert ids(store, "age") == [None, "old"]
    assert ids(store, "colour") == [None, None, None, "red"]
    assert store.features["price"].encoding.counts.extra == 1
    lines = describe(store, 10)
    assert "table of items: 3 rows, 1 without events; 1 items without a row" in lines
    assert "table of users: 2 rows, 0 without events; 0 users without a row" in lines
    assert measure(store, 10)["tables"]["items"] == {
        **{"rows": 3, "without_events": 1, "ids_without_a_row": 1, "repeated": 0}
    }


def test_integers_match_their_text_in_a_table(tmp_path: Path) -> None:
    rows = [{**row, "item_id": "xyz".index(row["item_id"])} for row in ROWS]
    write_table(tmp_path / "items.parquet", [{"item_id": str(n), "p": n} for n in range(3)])
    declared = '[p]\nof = "item"\nkind = "number"\nencode = "none"'
    store = opened(tmp_path, rows, declared, items_path=str(tmp_path / "items.parquet"))
    assert store.features["p"].values[1:].tolist() == [2, 1, 0]


def test_lines_of_the_report(tmp_path: Path) -> None:
    rows = with_column("x", "event", {"by1": 1, "ax1": 2, "ay2": 2, "ax3": 3, "bz2": 9, "az4": None})
    rows = [{**row, "v": [1, 2], "s": ["a"]} for row in rows]
    declared = '[x]\nof = "candidate"\nkind = "number"\n[q]\nof = "context"\nkind = "number"\ncolumn = "x"\n'
    declared += 'encode = "quantiles:4"\n[v]\nof = "item"\nkind = "vector"\n[s]\nof = "item"\nkind = "categories"\n'
    declared += 'min_count = 3\n[u]\nof = "user"\nkind = "category"\ncolumn = "user_id"\nrows = 1\n'
    declared += '[h]\nof = "context"\nkind = "hour_of_day"\nfrom = "timestamp"'
    store = opened(tmp_path, rows, declared)
    assert describe(store, 10)[-6:] == [
        "feature x: candidate number, 4 distinct, 1 missing, standard, mean 2, deviation 0.7071",
        "feature q: context number, 4 distinct, 1 missing, 3 bins, bounds 1 2",
        "feature v: item vector, 3 distinct, 0 missing, dimension 2",
        "feature s: item categories, 1 distinct, 0 missing, 0 rare (fewer than 3 training events)",
        "feature u: user category, 2 distinct, 0 missing, 1 rows, 100.0% of the training events collide",
        "feature h: context hour_of_day, 1 distinct, seconds, UTC",
    ]
    assert measure(store, 10)["features"]["q"]["bounds"] == [1, 2]


# --- What decides what. ---

ALL = """
[number]
of = "item"
kind = "number"
[context]
of = "context"
kind = "number"
encode = "quantiles:3"
[category]
of = "item"
kind = "category"
[tags]
of = "user"
kind = "categories"
"""


def rows_with_all(seed: int) -> list[Row]:
    random = np.random.default_rng(seed)
    return [
        {
            "user_id": n % 9,
            "item_id": n * n % 14,
            "timestamp": n,
            "label": n % 2,
            "number": n * n % 14 / 7 if n % 3 else None,
            "context": float(random.random()),
            "category": f"c{n * n % 14}" if n % 2 else None,
            "tags": [n % 9, n % 9 % 4],
        }
        for n in range(120)
    ]


@pytest.mark.parametrize("split", ["leave_two_out", "temporal"])
def test_validation_and_test_decide_nothing(tmp_path: Path, split: str) -> None:
    """The last 27 rows are of validation or test, and tell other values; one tells the value of an item first."""
    before = rows_with_all(0)
    cuts = {"validation_from": 93, "test_from": 105} if split == "temporal" else {}
    first = 93 if split == "temporal" else 102
    changed = [
        {**row, "context": 1e9, "tags": None if row["timestamp"] >= first else row["tags"]}
        if row["timestamp"] >= first
        else row
        for row in before
    ]
    for row in changed[first:]:
        row["number"] = None if row["number"] is not None else row["item_id"] / 7
        row["category"] = None if row["category"] is not None else f"c{row['item_id']}"
    found = []
    for name, rows in (("one", before), ("two", changed)):
        (tmp_path / name).mkdir()
        store = opened(tmp_path / name, rows, ALL, split=Split(split), **cuts)
        fixed = {
            key: dataclasses.replace(feature.encoding, counts=None)  # type: ignore[arg-type]
            for key, feature in store.features.items()
        }
        found.append((fixed, {key: store.feature_vocabulary(key).to_pylist() for key in store.features}))
    assert found[0] == found[1]


def test_the_folder_follows_from_the_columns_alone(tmp_path: Path) -> None:
    log = write_table(tmp_path / "log.parquet", with_column("c", "event", {"ax1": "p"}))
    plain = DataConfig(dataset="event_log", data_path=str(log), data_dir=str(tmp_path / "prepared"))

    def folder(declared: str, **settings: Any) -> Path:
        return prepared_folder(config_for(log, declared, **settings))

    declared = '[c]\nof = "context"\nkind = "category"\n'
    first = folder(declared)
    assert first != prepared_folder(plain)
    assert folder(f"{declared}width = 8\nmin_count = 2") == first
    assert folder(declared.replace("[c]", '[d]\ncolumn = "c"')) == first
    assert folder(declared, split="leave_two_out") == first
    assert folder(declared.replace("context", "candidate")) == first
    assert folder(declared.replace("context", "user")) != first
    assert folder(declared.replace("category", "number")) != first
    time = '[h]\nof = "context"\nkind = "hour_of_day"\nfrom = "timestamp"'
    assert folder(time) == prepared_folder(plain)
    assert folder(declared + time) == first


def test_fingerprints(tmp_path: Path) -> None:
    """They follow from the columns and the content of all files, and not from where these lie."""
    rows, declared = with_column("c", "event", {"ax1": "p"}), '[c]\nof = "context"\nkind = "category"\n'
    plain = opened(tmp_path, rows, '[h]\nof = "context"\nkind = "hour_of_day"\nfrom = "timestamp"').facts.fingerprint
    first = opened(tmp_path, rows, declared).facts.fingerprint
    assert first != plain
    assert opened(tmp_path, rows, f"{declared}width = 8").facts.fingerprint == first
    seen = set()
    for place, price in (("one", 1), ("two", 1), ("three", 2)):
        (tmp_path / place).mkdir()
        items = write_table(tmp_path / place / "items.parquet", [{"item_id": "x", "price": price}])
        declared = '[price]\nof = "item"\nkind = "number"'
        seen.add(opened(tmp_path / place, ROWS, declared, items_path=str(items)).facts.fingerprint)
    assert len(seen) == 2


def test_a_changed_table_is_noticed(tmp_path: Path) -> None:
    items = write_table(tmp_path / "items.csv", [{"item_id": "x", "price": 1}])
    settings = {"item_features": (), "items_path": str(items)}
    declared = '[price]\nof = "item"\nkind = "number"'
    opened(tmp_path, ROWS, declared, items_path=str(items))
    config = config_for(tmp_path / "log.parquet", declared, **settings)
    open_prepared(config)
    write_table(items, [{"item_id": "x", "price": 22}])
    with pytest.raises(Exception, match=r"items\.csv: this file has changed since the data was prepared"):
        open_prepared(config)
    items.unlink()
    open_prepared(config)  # a table that is gone altogether does not matter
    (tmp_path / "log.parquet").unlink()
    open_prepared(config)


# --- The encoded folder. ---

DEVICE = '[device]\nof = "context"\nkind = "category"'
DEVICES = with_column("device", "event", {"ax1": "ios", "ay2": "web"})


def test_encoded_once(tmp_path: Path) -> None:
    first = opened(tmp_path, DEVICES, DEVICE)
    with mock.patch.object(encoding, "write_encoded") as write:
        second = open_prepared(config_for(tmp_path / "log.parquet", DEVICE, item_features=()))
    assert not write.called
    assert first.features["device"].values.tolist() == second.features["device"].values.tolist()
    assert any(path.name == "encodings.json" for path in tmp_path.rglob("features-leave_one_out-*/*"))


def _open(config: DataConfig) -> tuple[list[int], bool]:
    written = []
    write = encoding.write_encoded

    def noted(*arguments: Any) -> None:
        written.append(os.getpid())
        write(*arguments)

    with mock.patch.object(encoding, "write_encoded", noted):
        return open_prepared(config).features["device"].values.tolist(), bool(written)


def test_whichever_process_comes_first_encodes(tmp_path: Path) -> None:
    store = opened(tmp_path, DEVICES, DEVICE)
    for folder in store.folder.glob("packed/features-*"):
        shutil.rmtree(folder)
    config = config_for(tmp_path / "log.parquet", DEVICE, item_features=())
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(_open, [config] * 2, chunksize=1)
    assert [values for values, _ in found] == [store.features["device"].values.tolist()] * 2
    assert sum(written for _, written in found) == 1


def test_prepared_data_that_cannot_be_written(tmp_path: Path) -> None:
    """As on a read-only disk: each process then encodes for itself."""
    store = opened(tmp_path, DEVICES, DEVICE)
    for folder in store.folder.glob("packed/features-*"):
        shutil.rmtree(folder)
    config = config_for(tmp_path / "log.parquet", DEVICE, item_features=())
    with mock.patch.object(encoding, "published_folder", side_effect=PermissionError(13, "Permission denied")):
        found = open_prepared(config)
    assert found.features["device"].values.tolist() == store.features["device"].values.tolist()
    assert found.feature_vocabulary("device").to_pylist() == ["ios", "web"]
    assert not list(store.folder.glob("packed/features-*"))


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    store = opened(tmp_path, DEVICES, DEVICE)
    (path,) = store.folder.glob("packed/features-*/0-values.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match="0-values.npy: cannot be read .its content changed since it was prepared"):
        open_prepared(config_for(tmp_path / "log.parquet", DEVICE, item_features=()))


# --- The Complete Journey. ---


def test_complete_journey_has_columns_for_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    rows = [
        {
            "household_id": row["user_id"],
            "store_id": 300 + row["timestamp"],
            "product_id": row["item_id"],
            "transaction_timestamp": row["timestamp"],
        }
        for row in [*ROWS, {**ROWS[0], "user_id": "c", "item_id": "w"}, {**ROWS[0], "user_id": "d", "item_id": "w"}]
    ]
    write_table(package / "transactions.parquet", rows)
    names = ("product_category", "department", "manufacturer_id", "brand", "product_type", "package_size")
    products = [{"product_id": item, **dict.fromkeys(names, f"of {item}")} for item in "xy"]
    write_table(package / "products.parquet", products)
    write_table(package / "demographics.parquet", [{"household_id": "a", "age": "45-54"}])
    monkeypatch.setattr(complete_journey, "package_data", lambda: package)
    declared = (
        '[type]\nof = "item"\nkind = "category"\ncolumn = "product_type"\n[age]\nof = "user"\nkind = "category"\n'
    )
    declared += '[store]\nof = "context"\nkind = "category"\ncolumn = "store_id"'
    text = config_for(tmp_path / "no log", declared).feature_declarations
    plain = DataConfig(data_dir=str(tmp_path / "prepared"))
    config = dataclasses.replace(plain, feature_declarations=text)
    store = prepare(config)
    assert ids(store, "type") == [None, None, "of y", "of x", None]
    assert ids(store, "age") == [None, "45-54", None, None]
    assert ids(store, "store") == [301, 302, 301, 302, 303, None, 302, 302]
    assert prepared_folder(plain).parent.name == "complete_journey"
    assert store.facts.fingerprint != prepare(plain).facts.fingerprint
    assert prepare(plain).features == {}
