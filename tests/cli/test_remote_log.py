"""A job whose log lies in an object store: it trains as on local files, and a store that fails ends it in one line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from din_dist.config import DataConfig
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import open_prepared, prepare
from din_dist.errors import InputError
from tests.support.commands import assert_one_line, command, run
from tests.support.faulty_store import Fault, Store, running_store
from tests.support.patience import PATIENCE
from tests.support.small_log import write_log


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with running_store(monkeypatch) as store:
        yield store


@pytest.fixture
def log(tmp_path: Path, store: Store) -> Path:
    """A log in two files of a folder, which is both on the disk and in the store."""
    whole, folder = tmp_path / "whole.parquet", tmp_path / "log"
    write_log(whole, num_users=200, labels=True)
    table = pq.read_table(whole)
    for day, part in (("1", table.slice(0, 900)), ("2", table.slice(900))):
        (folder / f"day={day}").mkdir(parents=True)
        pq.write_table(part, folder / f"day={day}" / "part.parquet")
    store.put_folder("log", folder)
    return folder


def settings(path: str, folder: Path, **more: object) -> DataConfig:
    return DataConfig(dataset="event_log", data_path=path, data_dir=str(folder), **more)  # type: ignore[arg-type]


def assert_same_events(left: EventStore, right: EventStore) -> None:
    for field in dataclasses.fields(EventStore):
        if field.name not in ("facts", "item_features", "files", "folder", "features"):
            np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name), field.name)
    assert left.item_features.keys() == right.item_features.keys()
    for name, values in left.item_features.items():
        np.testing.assert_array_equal(values, right.item_features[name])
    one, other = (dataclasses.replace(store.facts, sources={}, fingerprint="") for store in (left, right))
    assert one == other


def losses(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def test_a_job_equals_that_on_local_files(store: Store, log: Path, tmp_path: Path) -> None:
    found = {}
    for name, path in (("local", str(log / "day=*")), ("remote", store.uri("log/day=*"))):
        folder = tmp_path / name
        folder.mkdir()
        prepared = run("prepare_data", folder, f"--data_path={path}")
        assert prepared.returncode == 0, prepared.stderr
        assert "files: 2 read" in prepared.stdout
        done = run("train", folder, f"--data_path={path}", "--max_steps=6", "--seed=3")
        assert done.returncode == 0, done.stderr
        found[name] = losses(folder)
    assert len(found["local"]) == 6
    assert found["remote"] == found["local"]


def test_the_prepared_events_are_the_same(store: Store, log: Path, tmp_path: Path) -> None:
    local = prepare(settings(str(log), tmp_path / "a"))
    remote = prepare(settings(store.uri("log"), tmp_path / "b"))
    assert_same_events(remote, local)
    assert list(remote.facts.sources) == [f"s3://logs/log/day={day}/part.parquet" for day in "12"]


@pytest.mark.parametrize(
    "columns", [{"label_column": "day"}, {"item_features": ("day",)}, {"timestamp_column": "day"}], ids=str
)
def test_partitions_are_labels_features_and_times(
    store: Store, log: Path, tmp_path: Path, columns: dict[str, object]
) -> None:
    """The folders hold days 0 and 1 here, which are labels as well as times."""
    for old, new in (("1", "0"), ("2", "1")):
        (log / f"day={old}").rename(log / f"day={new}")
    table = pq.read_table(log / "day=0" / "part.parquet", partitioning=None)
    for day in ("0", "1"):  # each item on one day, so that the day can be its feature
        part = table.set_column(1, "item_id", [[f"{name}-{day}" for name in table["item_id"].to_pylist()]])
        pq.write_table(part, log / f"day={day}" / "part.parquet")
    store.put_folder("days", log)
    more = {"item_features_required": True} if "item_features" in columns else {}
    more |= {"label_column_required": True} if "label_column" in columns else {}
    local = prepare(settings(str(log), tmp_path / "a", **columns | more))
    remote = prepare(settings(store.uri("days"), tmp_path / "b", **columns | more))
    assert_same_events(remote, local)
    if "label_column" in columns:
        assert remote.labels is not None
        assert 0 < remote.labels.mean() < 1
    if "item_features" in columns:
        assert remote.facts.item_features == {"day": 2}
    if "timestamp_column" in columns:
        assert (remote.facts.first_timestamp, remote.facts.last_timestamp) == (0, 1)


def test_a_log_that_changed_since_it_was_prepared(store: Store, log: Path, tmp_path: Path) -> None:
    config = settings(store.uri("log"), tmp_path / "prepared")
    prepare(config)
    store.put("log/day=1/part.parquet", log / "day=2" / "part.parquet")
    with pytest.raises(InputError, match=r"^s3://logs/log/day=1/part\.parquet: this file has changed since the data"):
        open_prepared(config)
    store.put("log/day=1/part.parquet", log / "day=1" / "part.parquet")
    open_prepared(config)
    store.put("log/day=3/part.parquet", log / "day=1" / "part.parquet")
    with pytest.raises(InputError, match=r"^s3://logs/log/day=3/part\.parquet: this file was added"):
        open_prepared(config)
    for day in "123":
        store.delete(f"log/day={day}/part.parquet")
    assert open_prepared(config).facts.num_users == 200  # a log that is gone has not changed


def test_one_process_prepares_and_the_others_wait(store: Store, log: Path, tmp_path: Path) -> None:
    store.proxy.requests.clear()
    words = command("prepare_data", tmp_path, f"--data_path={store.uri('log')}")
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: subprocess.run(words, capture_output=True, text=True, check=False), range(2)))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    alone = sum(line.startswith("GET /logs/log/day=1/") for line in store.proxy.requests)
    prepare(settings(store.uri("log"), tmp_path / "again"))
    both = sum(line.startswith("GET /logs/log/day=1/") for line in store.proxy.requests)
    assert both == 2 * alone  # two processes read as much as one


@pytest.mark.thorough(unless=lambda case: case["fault"] is Fault.DENIED)  # tests/tables/test_storage.py waits less
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault.DENIED, "s3://logs/log: must be readable. Received: "),
        (Fault.SILENT, "s3://logs/log: the store must answer. Received, and again for "),
    ],
)
def test_a_store_that_fails_ends_the_command_with_one_line(
    store: Store, log: Path, tmp_path: Path, fault: Fault, expected: str
) -> None:
    store.proxy.fail(fault, only="^GET")
    began = time.monotonic()
    assert_one_line(run("prepare_data", tmp_path, f"--data_path={store.uri('log')}"), expected)
    assert time.monotonic() - began < PATIENCE  # it waits for a minute, and starts anew within it


def test_credentials_that_are_missing(store: Store, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store.proxy.fail(Fault.DENIED)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    done = run("prepare_data", tmp_path, f"--data_path={store.uri('log')}")
    assert_one_line(done, "Give credentials that may list and read it, in the environment or a profile")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--data_path=s3://key:hidden@b/x",), "--data_path: must have no password"),
        (("--data_path=https://b/x",), "--data_path: must be a path of this machine, or begin with s3, gs"),
        (("--data_dir=s3://b/x",), "--data_dir: must be a path of this machine"),
        (("--dataset=amazon_reviews", "--data_path=s3://b/x"), "--data_path: --dataset=amazon_reviews reads a local"),
    ],
)
def test_what_cannot_be_remote(tmp_path: Path, flags: tuple[str, ...], expected: str) -> None:
    done = run("prepare_data", tmp_path, *flags)
    assert_one_line(done, expected)
    assert "hidden" not in done.stderr


def test_vectors_lie_on_this_machine(tmp_path: Path) -> None:
    features = tmp_path / "features.toml"
    features.write_text('[image]\nof = "item"\nkind = "vector"\npath = "s3://b/x.npy"\nids = "ids.txt"\n')
    done = run("prepare_data", tmp_path, f"--features={features}")
    assert_one_line(done, "path must be a file of this machine, because vectors are mapped into memory")


def test_tables_beside_the_log_may_be_remote(store: Store, log: Path, tmp_path: Path) -> None:
    items = "item_id,price\n" + "".join(f"i{n},{n}.5\n" for n in range(30))
    (tmp_path / "items.csv").write_text(items)
    store.put("tables/items.csv", items.encode())
    declared = '[price]\nof = "item"\nkind = "number"\n'
    found = []
    for name, path in (("a", str(tmp_path / "items.csv")), ("b", store.uri("tables/items.csv"))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "features.toml").write_text(declared)
        flags = [f"--features={folder / 'features.toml'}", f"--items_path={path}", f"--data_path={log}"]
        done = run("prepare_data", folder, *flags)
        assert done.returncode == 0, done.stderr
        found.append([line for line in done.stdout.splitlines() if "price" in line or "items" in line])
    assert found[0] == found[1]
