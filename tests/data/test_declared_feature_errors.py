"""What a declared feature cannot be: one line each, with the place, what came and what to write instead."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from din_dist.config import DataConfig
from din_dist.data.log_reader import Columns, read_log
from din_dist.data.prepared import prepare
from din_dist.data.raw_columns import RawColumns
from din_dist.errors import InputError
from din_dist.features.declarations import parse_declarations
from tests.support.declared_features import Row, config_for, write_table
from tests.support.thorough import up_to

BASE = [{"user_id": "a", "item_id": f"i{n % 2}", "timestamp": n, "label": n % 2} for n in range(4)]
FORMATS = [".parquet", ".csv", ".jsonl"]


def declare(owner: str, kind: str, **keys: object) -> str:
    """A declaration of the feature f, whose column is also f."""
    lines = [f'of = "{owner}"', f'kind = "{kind}"', *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    return "\n".join(["[f]", *lines])


def with_values(*values: Any) -> list[Row]:
    return [{**row, "f": value} for row, value in zip(BASE, values, strict=True)]


def message(folder: Path, rows: list[Row], declared: str, suffix: str = ".parquet", **tables: Any) -> str:
    """The error of reading a log; its paths without their folder."""
    log = write_table(folder / f"log{suffix}", rows)
    paths = {f"{name}_path": str(write_table(folder / f"{name}{suffix}", found)) for name, found in tables.items()}
    features = RawColumns.of(parse_declarations(declared, folder / "features.toml"), **paths)
    with pytest.raises(InputError) as error:
        read_log([log], Columns(item_features=()), features=features)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("declared", "values", "suffix", "expected"),
    [
        (
            declare("context", "category"),
            (["a"], None, ["b"], None),
            ".parquet",
            'log.parquet, row 1: kind = "category" takes one id a row. Received: f=[\'a\']. Write kind = "categories".',
        ),
        (
            declare("context", "category"),
            (None, ["a"], ["b"], None),
            ".jsonl",
            'log.jsonl, row 2: kind = "category" takes one id a row. Received: f=[\'a\']. Write kind = "categories".',
        ),
        (
            declare("context", "category"),
            (1.5, 2.0, 3.0, 4.0),
            ".parquet",
            "log.parquet, row 1: ids must be strings or integers, not double. Received: f=1.5. Convert the column, or "
            'write kind = "number".',
        ),
        (
            declare("context", "category"),
            (None, True, True, False),
            ".jsonl",
            "log.jsonl, row 2: ids must be strings or integers, not bool. Received: f=True. Convert the column, or "
            'write kind = "number".',
        ),
        (
            declare("context", "number"),
            ([1.0], None, None, None),
            ".parquet",
            'log.parquet, row 1: kind = "number" takes one number a row. Received: f=[1.0]. Write kind = "vector", or '
            'kind = "categories" for ids.',
        ),
        (
            declare("context", "number"),
            ("1.5", "2", "many", "3"),
            ".csv",
            "log.csv, row 3: f must hold numbers. Received: f='many'. Correct the row, or write kind = \"category\".",
        ),
        (
            declare("context", "number"),
            (1.0, math.inf, 2.0, None),
            ".parquet",
            "log.parquet, row 2: numbers must be finite and fit float32. Received: f=inf. Correct the row, or leave "
            "the cell empty.",
        ),
        (
            declare("context", "number"),
            ("1", "-Infinity", "1e999", ""),
            ".csv",
            "log.csv, row 2: numbers must be finite and fit float32. Received: f='-Infinity'. Correct the row, or "
            "leave the cell empty.",
        ),
        (
            declare("context", "number"),
            (1.0, -1e39, 2.0, None),
            ".jsonl",
            "log.jsonl, row 2: numbers must be finite and fit float32. Received: f=-1e+39. Correct the row, or leave "
            "the cell empty.",
        ),
        (
            declare("context", "categories"),
            (1, 2, 3, 4),
            ".parquet",
            'log.parquet, row 1: f must hold lists, not int64. Received: f=1. Write kind = "category", or lists.',
        ),
        (
            declare("context", "categories"),
            ('["a"]', "b", "", "7"),
            ".csv",
            "log.csv, row 2: f must be a JSON array of strings or of integers. Received: f='b'. Correct the cell, give "
            'separator = ";" for a;b;c, or write kind = "category".',
        ),
        (
            declare("context", "categories"),
            ('["a"]', "[1]", "", ""),
            ".csv",
            "log.csv, row 1: the JSON arrays of f must all be of one type. Received: f='[\"a\"]'. Correct the cell, "
            'give separator = ";" for a;b;c, or write kind = "category".',
        ),
        (
            declare("context", "categories"),
            (["a"], [1], None, None),
            ".jsonl",
            "log.jsonl, row 2: all values of f must be lists of text, as the first one is. Received: f=[1]. Write them "
            "alike.",
        ),
        (
            declare("context", "categories"),
            (["a"], "b", None, None),
            ".jsonl",
            "log.jsonl, row 2: all values of f must be lists of text, as the first one is. Received: f='b'. Write them "
            "alike.",
        ),
        (
            declare("context", "vector"),
            ([1.0, 2.0], [1.0], None, None),
            ".parquet",
            "log.parquet, row 2: all vectors must have one length, 2 so far. Received: f with 1 numbers. Correct the "
            "row, or leave the cell empty.",
        ),
        (
            declare("context", "vector"),
            ([1.0, 2.0], None, [1.0, math.nan], None),
            ".parquet",
            "log.parquet, row 3: f must hold numbers up to 65504, none of them missing, NaN or infinite. Received: "
            "nan. Correct the row, or leave the whole cell empty.",
        ),
        (
            declare("context", "vector"),
            ([1.0, None], None, None, None),
            ".jsonl",
            "log.jsonl, row 1: f must hold numbers up to 65504, none of them missing, NaN or infinite. Received: "
            "None. Correct the row, or leave the whole cell empty.",
        ),
        (
            declare("context", "vector"),
            ([1.0], [70000.0], None, None),
            ".jsonl",
            "log.jsonl, row 2: f must hold numbers up to 65504, none of them missing, NaN or infinite. Received: "
            "70000.0. Correct the row, or leave the whole cell empty.",
        ),
        (
            declare("context", "vector"),
            (1.0, 2.0, 3.0, 4.0),
            ".parquet",
            'log.parquet, row 1: f must hold lists, not double. Received: f=1.0. Write kind = "number", or lists.',
        ),
        (
            declare("context", "vector", separator=" "),
            ("1 2", "3 x", "", ""),
            ".csv",
            "log.csv, row 2: f must hold numbers. Received: f='x'. Correct the row, or write kind = \"category\".",
        ),
        (
            declare("context", "vector"),
            ([], None, None, None),
            ".jsonl",
            "log.jsonl, row 1: all vectors must have one length, not 0. Received: f with 0 numbers. Correct the row, "
            "or leave the cell empty.",
        ),
        (
            declare("item", "category"),
            ("p", "q", "r", "q"),
            ".csv",
            "log.csv, row 3: a feature of items has one value for each, here f. Received: item 'i0' with 'p' (log.csv, "
            "row 1) and here with 'r'. Correct one of the two rows, or declare it with of = \"context\" in the "
            "file of --features. Or give --item_feature_conflict=first or last.",
        ),
        (
            declare("user", "number"),
            (None, 1.5, None, 2.5),
            ".parquet",
            "log.parquet, row 4: a feature of users has one value for each, here f. Received: user 'a' with 1.5 "
            '(log.parquet, row 2) and here with 2.5. Correct one of the two rows, or declare it with of = "context" '
            "in the file of --features. Or give --item_feature_conflict=first or last.",
        ),
        (
            declare("item", "categories"),
            (["a", "b"], [], ["a", "c"], []),
            ".parquet",
            "log.parquet, row 3: a feature of items has one value for each, here f. Received: item 'i0' with ['a', "
            "'b'] (log.parquet, row 1) and here with ['a', 'c']. Correct one of the two rows, or declare it with "
            'of = "context" in the file of --features. Or give --item_feature_conflict=first or last.',
        ),
        (
            declare("item", "vector"),
            ([1.0, 2.0], [5.0, 5.0], [1.0, 3.0], None),
            ".parquet",
            "log.parquet, row 3: a feature of items has one value for each, here f. Received: item 'i0' with [1.0, "
            "2.0] (log.parquet, row 1) and here with [1.0, 3.0]. Correct one of the two rows, or declare it with "
            'of = "context" in the file of --features. Or give --item_feature_conflict=first or last.',
        ),
    ],
)
def test_values(tmp_path: Path, declared: str, values: tuple, suffix: str, expected: str) -> None:
    assert message(tmp_path, with_values(*values), declared, suffix) == expected


@pytest.mark.parametrize("suffix", FORMATS)
def test_weights_of_another_length(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "w": [1.0]} for row in with_values(["a"], ["a", "b"], ["a"], ["a"])]
    declared = declare("context", "categories", pool="weighted", weights="w")
    assert message(tmp_path, rows, declared, suffix) == (
        f"log{suffix}, row 2: w must have one weight for each of f. Received: 1 weights and 2 values. Correct the row."
    )


def test_a_list_of_lists(tmp_path: Path) -> None:
    found = message(tmp_path, with_values([["a"]], None, None, None), declare("context", "categories"))
    assert found == (
        "log.parquet, row 1: ids must be strings or integers, not list<element: string>. Received: f=['a']. Convert "
        "the column."
    )


def test_text_in_a_list_that_is_not_utf8(tmp_path: Path) -> None:
    wrong = pa.array([[b"ok"], [b"ok", b"\xff"], [], None]).cast(pa.list_(pa.binary()))
    values = pa.Array.from_buffers(pa.string(), len(wrong.values), wrong.values.buffers())
    lists = pa.ListArray.from_arrays(wrong.offsets, values)
    table = pa.Table.from_pylist(BASE).append_column("f", lists)
    pq.write_table(table, tmp_path / "log.parquet")
    features = RawColumns.of(parse_declarations(declare("context", "categories"), tmp_path / "features.toml"))
    with pytest.raises(InputError, match=r"row 2: text must be UTF-8\. Received: f=b'\\xff'"):
        read_log([tmp_path / "log.parquet"], Columns(item_features=()), features=features)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_without_the_column(tmp_path: Path, suffix: str) -> None:
    """Of three files; and the error says which, and where it is named."""
    for name, rows in (("1", with_values("p", "p", "p", "p")), ("2", BASE), ("3", with_values("p", "p", "p", "p"))):
        write_table(tmp_path / f"{name}{suffix}", rows)
    config = config_for(tmp_path / "1.parquet", declare("context", "category"), item_features=())
    config = dataclasses.replace(config, data_path=str(tmp_path / f"*{suffix}"))
    with pytest.raises(InputError) as error:
        prepare(config)
    assert str(error.value) == (
        f"{tmp_path}/2{suffix}: column 'f' is missing. Received: columns user_id, item_id, timestamp, label. Correct "
        "the file, or the column in the file of --features."
    )
    assert not list(tmp_path.rglob("facts.json"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_tables(tmp_path: Path, suffix: str) -> None:
    declared = declare("item", "number")
    twice = [{"item_id": "i0", "f": 1}, {"item_id": "i1", "f": 2}, {"item_id": "i0", "f": 1}]
    assert message(tmp_path, BASE, declared, suffix, items=twice) == (
        f"items{suffix}, row 3: each item has one row of its table. Received: item_id='i0' here and in items{suffix}, "
        "row 1. Remove one of the two rows."
    )
    nothing = [{"item_id": "other", "f": 1}]
    assert message(tmp_path, BASE, declared, suffix, items=nothing) == (
        f"items{suffix}: its ids must be those of the log. Received: none that the log has, for example 'other'. "
        "Correct --items_path, or the column item_id."
    )
    assert message(tmp_path, BASE, declared, suffix, items=[{"id": "i0", "f": 1}]) == (
        f"items{suffix}: column 'item_id' is missing. Received: columns id, f. Correct the file, or the column in the "
        "file of --features, or --item_column."
    )
    assert message(tmp_path, BASE, declared, suffix, items=[{"item_id": "i0", "f": 1}, {"item_id": None, "f": 1}]) == (
        f"items{suffix}, row 2: every row of a table of items needs its item_id. Received: no item_id. Fill it in, or "
        "drop the row."
    )
    assert message(tmp_path, BASE, declared, suffix, items=[{"item_id": "i0", "g": 1}]) == (
        f"log{suffix}: column 'f' is missing. Received: columns user_id, item_id, timestamp, label. Correct the file, "
        "or the column in the file of --features."
    )


def test_candidates_need_labels(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "label"} for row in with_values(1, 2, 3, 4)]
    assert message(tmp_path, rows, declare("candidate", "number")) == (
        "--features: features of candidates (f) take a log with labels, because a drawn negative has none. Received: a "
        "log without the label column. Give --label_column, look them up in a table of offers (by = [...]), or write "
        'of = "item" or of = "context".'
    )


@pytest.mark.parametrize(
    ("dataset", "declared", "expected"),
    [
        ("complete_journey", declare("candidate", "number"), "--features: features of candidates take a log with "),
        ("synthetic", declare("item", "number"), "--features: synthetic has no columns besides those of "),
        ("amazon_reviews/Beauty", declare("item", "number"), "--features: amazon_reviews has no columns besides "),
    ],
)
def test_data_sets_without_such_columns(tmp_path: Path, dataset: str, declared: str, expected: str) -> None:
    text = config_for(tmp_path / "log.csv", declared).feature_declarations
    with pytest.raises(InputError) as error:
        prepare(DataConfig(dataset=dataset, data_dir=str(tmp_path), feature_declarations=text))
    assert str(error.value).startswith(expected)


def test_a_data_set_of_ours_has_features_of_the_time(tmp_path: Path) -> None:
    declared = '[h]\nof = "context"\nkind = "hour_of_day"\nfrom = "timestamp"'
    text = config_for(tmp_path / "log.csv", declared).feature_declarations
    config = DataConfig(dataset="synthetic", synthetic_num_users=20, data_dir=str(tmp_path), feature_declarations=text)
    assert set(np.unique(prepare(config).features["h"].values)) == set(range(1, 25))


@pytest.mark.parametrize(
    ("vectors", "ids", "expected"),
    [
        (np.zeros((2, 2)), "i0\n", "v.txt: must have one id for each row of v.npy. Received: 1 lines and 2 rows. "),
        (np.zeros((2, 2)), "i0\ni0\n", "v.txt, line 2: each id stands once. Received: 'i0', as in line 1. Remove "),
        (
            np.zeros(2),
            "i0\ni1\n",
            "v.npy: must be an .npy file of numbers with one vector a row. Received: float64 of ",
        ),
        (np.array([["a"]]), "i0\n", "v.npy: must be an .npy file of numbers with one vector a row. Received: <U1 of "),
        (np.array([[1, 2], [1, np.nan]]), "i0\ni1\n", "v.npy, row 2: must hold numbers up to 65504, none of them NaN "),
        (np.array([[1, np.inf], [1, 2]]), "i0\ni1\n", "v.npy, row 1: must hold numbers up to 65504, none of them NaN "),
    ],
)
def test_files_of_vectors(tmp_path: Path, vectors: np.ndarray, ids: str, expected: str) -> None:
    np.save(tmp_path / "v.npy", vectors)
    (tmp_path / "v.txt").write_text(ids)
    found = message(tmp_path, BASE, declare("item", "vector", path="v.npy", ids="v.txt"))
    assert found.startswith(expected)


def test_files_of_vectors_that_are_missing(tmp_path: Path) -> None:
    declared = declare("item", "vector", path="v.npy", ids="v.txt")
    write_table(tmp_path / "log.parquet", BASE)
    with pytest.raises(InputError, match=r"v\.npy: no such file\. Correct path and ids in the file of --features\."):
        prepare(config_for(tmp_path / "log.parquet", declared, item_features=()))


def test_a_vector_without_any_value(tmp_path: Path) -> None:
    write_table(tmp_path / "log.csv", with_values("", "", "", ""))
    with pytest.raises(InputError, match=r"--features: a vector needs a value in some row\. Received: none of f\."):
        prepare(config_for(tmp_path / "log.csv", declare("item", "vector"), item_features=()))


# --- Anything: prepared, or one line. ---

SCALARS = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 3),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    st.sampled_from(["", "1", "1.5", "nan", "inf", "[1]", '["a"]', "a;b", "1;2"]),
    st.booleans(),
)
# A column is mostly of one type, as in files.
COLUMNS = st.one_of(
    *(
        st.lists(st.one_of(st.none(), kind), min_size=4, max_size=4)
        for kind in (
            st.integers(0, 3),
            st.floats(),
            st.floats(-5, 5),
            st.text("ab;1[]", max_size=4),
            st.booleans(),
            st.lists(st.integers(0, 3), max_size=3),
            st.lists(st.floats(-5, 5), min_size=2, max_size=2),
            st.lists(st.one_of(st.none(), st.text("ab", max_size=2)), max_size=3),
            SCALARS,
        )
    )
)
DECLARATIONS = st.fixed_dictionaries(
    {
        "of": st.sampled_from(["user", "context", "candidate", "item"]),
        "kind": st.sampled_from(["category", "number", "categories", "vector", "hour_of_day", "day_of_week"]),
    },
    optional={
        "column": st.sampled_from(["f", "g", "user_id", "timestamp", "none"]),
        "encode": st.sampled_from(["standard", "log", "none", "quantiles:3", "periodic:2,0.5"]),
        "min_count": st.integers(1, 3),
        "rows": st.sampled_from([1, 5, 2**31 - 2]),
        "separator": st.just(";"),
        "weights": st.sampled_from(["f", "g"]),
        "pool": st.sampled_from(["mean", "sum", "weighted"]),
        "trained": st.booleans(),
        "from": st.just("timestamp"),
        "by": st.sampled_from([["g"], ["f", "g"], ["user_id"], ["none"]]),
    },
)


@settings(max_examples=up_to(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    declared=st.dictionaries(st.sampled_from(["f", "g", "h"]), DECLARATIONS, min_size=1),
    first=COLUMNS,
    second=COLUMNS,
    suffix=st.sampled_from(FORMATS),
    labels=st.booleans(),
    table=st.booleans(),
)
def test_prepared_or_refused(
    declared: dict[str, dict], first: list, second: list, suffix: str, labels: bool, table: bool
) -> None:
    """Keys that do not fit their kind are dropped, so that most examples come to the data."""
    rows = [{**row, "f": f, "g": g} for row, f, g in zip(BASE, first, second, strict=True)]
    rows = [{**row, "user_id": "b"} for row in rows] + [dict(row, timestamp=9) for row in rows]
    if not labels:
        rows = [{key: value for key, value in row.items() if key != "label"} for row in rows]
        rows.append({**rows[0], "item_id": "i9", "user_id": "c"})
        rows.append({**rows[0], "item_id": "i8", "user_id": "c"})
    text = ""
    for name, keys in declared.items():
        if keys["kind"] in ("hour_of_day", "day_of_week"):
            keys = {"of": "context", "kind": keys["kind"], "from": "timestamp"}
        elif keys["kind"] in ("category", "number", "vector"):
            keys = {key: value for key, value in keys.items() if key not in ("weights", "pool", "from")}
        if keys["of"] != "candidate":
            keys = {key: value for key, value in keys.items() if key != "by"}
        text += f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    with tempfile.TemporaryDirectory() as folder:
        try:
            log = write_table(Path(folder, f"log{suffix}"), rows)
        except (pa.ArrowException, OverflowError):
            return  # Parquet has no such column
        paths = {}
        if table:
            items = [{"item_id": f"i{n}", "g": value} for n, value in enumerate(second)]
            paths = {"items_path": str(write_table(Path(folder, f"items{suffix}"), items))}
        if "\nby = " in text:
            offers = [{"item_id": f"i{n}", "user_id": "b", "f": first[n], "g": second[n]} for n in range(4)]
            paths["offers_path"] = str(write_table(Path(folder, f"offers{suffix}"), offers))
        try:
            config = config_for(log, text, item_features=(), **paths)
            store = prepare(config)
        except InputError as error:
            event("refused")
            assert "\n" not in str(error)
            return
        event("prepared")
        for feature in store.features.values():
            n = {"user": store.facts.num_users, "item": store.facts.num_items + 1}
            rows_of_feature = n.get(feature.encoding.spec.owner, store.facts.num_events)
            if feature.offers is not None:
                rows_of_feature = feature.offers.num_rows
            found = feature.values if feature.offsets is None else feature.offsets[:-1]
            assert len(found) == rows_of_feature
            if feature.values.dtype == np.int32 and len(feature.values):
                assert feature.values.min() >= 0
                assert feature.values.max() < feature.encoding.num_rows
            assert not np.isinf(feature.values).any()
