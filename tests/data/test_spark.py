"""Logs that are prepared on Spark, against the local way: the same bytes, and the same errors."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from din_dist.config import DataConfig
from din_dist.config.data import Engine
from din_dist.data.prepared import prepare
from din_dist.data.spark import session as sessions
from din_dist.errors import InputError
from din_dist.features.declarations import read_declarations
from din_dist.features.spec import FeatureConflict, to_text
from tests.support.spark_log import content, log, settings, write_files

DECLARATIONS = """
[age]
of = "user"
kind = "category"
[price]
of = "item"
kind = "number"
[device]
of = "context"
kind = "category"
[shown_price]
of = "candidate"
kind = "number"
[dwell]
of = "history"
kind = "number"
encode = "quantiles:4"
"""


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    """One session for all tests, because one takes seconds to start."""
    from pyspark.sql import SparkSession

    sessions.require_spark()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.master("local[2]").config("spark.driver.memory", "1g")
    for name, value in {**sessions.DEFAULTS, "spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "2"}.items():
        builder = builder.config(name, value)
    found = builder.getOrCreate()
    yield found
    found.stop()


def on_spark(config: DataConfig, folder: Path, master: str = "local[2]") -> DataConfig:
    return dataclasses.replace(config, data_dir=str(folder), engine=Engine.SPARK, spark_master=master)


def require_equal(config: DataConfig, folder: Path, master: str = "local[2]") -> None:
    ours = content(prepare(dataclasses.replace(config, data_dir=str(folder / "local"))).folder)
    theirs = content(prepare(on_spark(config, folder / "spark", master)).folder)
    assert theirs.keys() == ours.keys()
    assert [name for name in ours if theirs[name] != ours[name]] == []


def declared(folder: Path) -> str:
    path = folder / "features.toml"
    path.write_text(DECLARATIONS)
    return to_text(read_declarations(path))


CASES: dict[str, dict[str, Any]] = {
    "labels": {},
    "no labels, integers, CSV": {"drop": ["label"], "integers": True, "form": "csv"},
    "features, JSON lines": {"features": True, "form": "jsonl"},
    "several labels": {
        "label_columns": ("click", "buy"),
        "label_time_column": "clicked_at",
        "request_column": "page",
        "weight_column": "worth",
    },
    "features, sessions": {"features": True, "session_column": "visit", "item_features": ()},
    "actions": {"action_column": "action", "histories": ("view:5", "cart:3")},
}


@pytest.mark.parametrize("case", CASES)
def test_it_writes_the_bytes_of_the_local_way(case: str, session: Any, tmp_path: Path) -> None:
    values = dict(CASES[case])
    table = log(integers=values.pop("integers", False)).drop_columns(values.pop("drop", []))
    source = write_files(tmp_path / "log", table, values.pop("form", "parquet"))
    if values.pop("features", False):
        values["feature_declarations"] = declared(tmp_path)
    require_equal(settings(source, **values), tmp_path)


def broken(**columns: Any) -> pa.Table:
    """Ten events of one user in order of time, with other values in some columns."""
    table = {"user_id": ["u"] * 10, "item_id": ["i"] * 10, "timestamp": list(range(10)), "label": [0] * 10}
    return pa.table({**table, **columns})


MISTAKES: dict[str, tuple[pa.Table, dict[str, Any]]] = {
    "a label": (broken(label=[0] * 7 + [2, 0, 0]), {}),
    "no user": (broken(user_id=["u"] * 8 + [None, "u"]), {}),
    "not sorted": (broken(timestamp=[0, 1, 2, 3, 4, 5, 6, 9, 8, 9]), {"presorted": True}),
    "two values": (broken(category_id=["a", None] * 4 + ["b", "a"]), {}),
    "no column": (broken().drop_columns(["item_id"]), {}),
    "no rows": (broken().slice(0, 0), {}),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_it_refuses_what_the_local_way_refuses(case: str, session: Any, tmp_path: Path) -> None:
    table, values = MISTAKES[case]
    config = settings(write_files(tmp_path / "log", table), **values)
    with pytest.raises(InputError) as ours:
        prepare(dataclasses.replace(config, data_dir=str(tmp_path / "local")))
    with pytest.raises(InputError) as theirs:
        prepare(on_spark(config, tmp_path / "spark"))
    assert str(theirs.value) == str(ours.value)


def test_files_of_two_kinds_are_refused_at_the_second(session: Any, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "log", broken(), files=1)
    pq.write_table(broken(item_id=list(range(10))), folder / "1.parquet")
    with pytest.raises(InputError, match=r"1\.parquet, row 1: all ids of a column must be of one type, large_string"):
        prepare(on_spark(settings(folder), tmp_path / "spark"))


def test_the_last_value_may_count(session: Any, tmp_path: Path) -> None:
    source = write_files(tmp_path / "log", broken(category_id=["a", None] * 4 + ["b", "a"]))
    require_equal(settings(source, item_feature_conflict=FeatureConflict.LAST), tmp_path)


def test_what_it_does_not_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.toml"
    path.write_text('[tags]\nof = "item"\nkind = "categories"\n')
    source = write_files(tmp_path / "log", broken(tags=[["a"]] * 10))
    config = settings(source, feature_declarations=to_text(read_declarations(path)))
    with pytest.raises(InputError, match=r"--engine=spark: reads categories and numbers .* Received: categories tags"):
        prepare(on_spark(config, tmp_path))
    with pytest.raises(InputError, match=r"--extend: is not read by --engine=spark yet"):
        on_spark(settings(source, extend=str(tmp_path)), tmp_path)
    with pytest.raises(InputError, match=r"--spark_master: belongs to --engine=spark"):
        settings(source, spark_master="yarn")


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"needs Java 17\. Received: no .*/bin/java"):
        sessions.require_spark()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setattr(sessions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs pyspark.*pip install 'din_dist\[spark\]'"):
        sessions.require_spark()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
