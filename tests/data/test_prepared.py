"""Preparing and opening: what stays, what is noticed, and that nothing is left half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_datasets.core.utils import gcs_utils

from din_dist import schema
from din_dist.config import DataConfig
from din_dist.data import blocks as blocks_module
from din_dist.data import event_store, prepared
from din_dist.data.builders import base
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import builder_for, data_dir, open_prepared, prepare, prepared_folder
from din_dist.errors import InputError
from tests.support.event_stores import check_against_plain_python
from tests.support.patience import PATIENCE

ROWS = [
    {"user_id": f"u{n % 17}", "item_id": f"i{n * n % 23}", "category_id": f"c{n * n % 23 % 4}", "timestamp": n % 29}
    for n in range(200)
]


def write_log(path: Path, rows: list[dict]) -> None:
    path.write_text(",".join(rows[0]) + "\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    write_log(path, ROWS)
    return path


@pytest.fixture
def config(tmp_path: Path, log: Path) -> DataConfig:
    return DataConfig(dataset="event_log", data_path=str(log), data_dir=str(tmp_path / "prepared"))


def same_arrays(left: EventStore, right: EventStore) -> bool:
    names = {field.name for field in dataclasses.fields(EventStore)} - {"facts", "item_features", "files"}
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


def left_behind(config: DataConfig) -> list[str]:
    """All below the data folder but its locks and TFDS's cache of downloads."""
    root = Path(config.data_dir)
    found = [str(path.relative_to(root)) for path in root.rglob("*")]
    return [path for path in found if not path.startswith(("locks", "downloads"))]


def test_records_come_back_in_order_over_many_shards(
    tmp_path: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "EVENTS_PER_BLOCK", 3)
    monkeypatch.setattr(base, "BLOCKS_PER_SHARD", 1)
    rows = [{**row, "label": n % 3 // 2} for n, row in enumerate(ROWS)]
    write_log(Path(config.data_path), rows)
    check_against_plain_python(prepare(config), rows)
    assert builder_for(config).info.splits[schema.EVENTS_SPLIT].num_shards == 17


def test_prepared_once(config: DataConfig) -> None:
    first = prepare(config)
    with mock.patch.object(prepared, "build") as build:
        second = prepare(config)
        third = open_prepared(config)
    assert not build.called
    assert same_arrays(first, second) and same_arrays(first, third)


def test_new_data_is_checked_with_the_chosen_features_alone(tmp_path: Path) -> None:
    """As a job will see it: numbers of widths, say, go by them."""
    seen = []
    config = DataConfig(dataset="synthetic", synthetic_num_users=20, data_dir=str(tmp_path), item_features=())
    prepare(config, check=lambda facts: seen.append(facts.item_features))
    assert seen == [{}]


def test_the_default_data_dir_is_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data_dir(DataConfig()) == Path("/cache/din_dist")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert data_dir(DataConfig()) == Path("/home/me/.cache/din_dist")
    assert data_dir(DataConfig(data_dir="~/data")) == Path("/home/me/data")


def test_logs_and_columns_have_folders_of_their_own(tmp_path: Path, config: DataConfig) -> None:
    variants = [
        {},
        {"data_path": str(tmp_path / "other.csv")},
        {"timestamp_column": "when"},
        {"presorted": True},
        {"item_features": ()},
        {"label_column_required": True},
    ]
    folders = {str(builder_for(dataclasses.replace(config, **variant)).data_path) for variant in variants}
    assert len(folders) == len(variants)


def test_a_relative_path_is_the_same_log(config: DataConfig, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(log.parent)
    relative = dataclasses.replace(config, data_path=log.name)
    assert builder_for(relative).data_path == builder_for(config).data_path


def test_fingerprints_follow_the_content(tmp_path: Path, config: DataConfig) -> None:
    def fingerprint(**changes: object) -> str:
        return prepare(dataclasses.replace(config, **changes)).facts.fingerprint  # type: ignore[arg-type]

    first = fingerprint()
    shutil.copy(config.data_path, tmp_path / "copy.csv")
    assert fingerprint(data_path=str(tmp_path / "copy.csv")) == first
    assert fingerprint(item_features=()) != first
    write_log(tmp_path / "copy.csv", ROWS[1:])
    assert fingerprint(data_path=str(tmp_path / "copy.csv"), data_dir=str(tmp_path / "elsewhere")) != first


def test_opening_what_was_not_prepared(config: DataConfig) -> None:
    expected = (
        rf"event_log/.*/1\.0\.0: the data must be prepared before\. Received: nothing there\. Run: python -m "
        rf"din_dist\.cli\.prepare_data --dataset=event_log --data_path={config.data_path} --data_dir={config.data_dir}$"
    )
    with pytest.raises(InputError, match=expected):
        open_prepared(config)
    other = dataclasses.replace(
        config, user_column="who is it", item_features=("category_id",), item_features_required=True, presorted=True
    )
    more = " --user_column='who is it' --item_features=category_id --presorted=True"
    with pytest.raises(InputError, match=re.escape(more.split(" --item")[0])) as error:
        open_prepared(other)
    for words in more.split(" --")[1:]:
        assert f" --{words}" in str(error.value)
    assert not Path(config.data_dir).exists()


@pytest.mark.parametrize("action", [prepare, open_prepared])
def test_a_changed_source(config: DataConfig, action: object) -> None:
    prepare(config)
    os.utime(config.data_path, (1, 1))
    open_prepared(config)  # a touch is no change
    write_log(Path(config.data_path), ROWS[:-1])
    expected = rf"{config.data_path}: this file has changed since .* --overwrite_prepared once, or give another"
    with pytest.raises(InputError, match=expected):
        action(config)  # type: ignore[operator]
    assert prepare(config, overwrite=True).facts.num_events == len(ROWS) - 1
    assert open_prepared(config).facts.num_events == len(ROWS) - 1


def test_a_file_added_to_the_folder(tmp_path: Path, config: DataConfig) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    write_log(folder / "a.csv", ROWS[:100])
    config = dataclasses.replace(config, data_path=str(folder))
    prepare(config)
    write_log(folder / "b.csv", ROWS[100:])
    with pytest.raises(InputError, match=r"b\.csv: this file was added"):
        open_prepared(config)


def test_a_source_that_is_gone_has_not_changed(config: DataConfig) -> None:
    prepare(config)
    Path(config.data_path).unlink()
    assert open_prepared(config).facts.num_events == len(ROWS)


def test_a_source_that_changes_while_it_is_read(config: DataConfig) -> None:
    from din_dist.data.builders import event_log

    def read_and_meddle(*args: object, **named: object) -> object:
        log = real(*args, **named)  # type: ignore[arg-type]
        write_log(Path(config.data_path), ROWS[:-1])
        return log

    real = event_log.read_log
    with (
        mock.patch.object(event_log, "read_log", read_and_meddle),
        pytest.raises(InputError, match="this file has changed since"),
    ):
        prepare(config)
    assert left_behind(config) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"user_column": "who"}, "column 'who' is missing"),
        ({"item_features": ("brand",), "item_features_required": True}, "column 'brand' is missing"),
        ({"data_path": "/no/such/log.csv"}, "/no/such/log.csv: no such file"),
    ],
)
def test_nothing_is_left_after_an_error(config: DataConfig, changes: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        prepare(dataclasses.replace(config, **changes))
    assert left_behind(config) == []


def full_disk() -> AbstractContextManager:
    return mock.patch.object(base, "write_beside", side_effect=OSError(28, "No space left on device"))


def test_nothing_is_left_after_an_error_while_writing(config: DataConfig) -> None:
    with full_disk(), pytest.raises(InputError, match=r"cannot be written \(.*No space left on device\)"):
        prepare(config)
    assert left_behind(config) == []


def test_tensorflow_reports_a_full_disk_in_its_own_way(config: DataConfig) -> None:
    full = tf.errors.ResourceExhaustedError(None, None, "x.tfrecord; No space left on device")
    expected = r"cannot be written \(.*No space left on device\)"
    with (
        mock.patch.object(base.EventTally, "add", side_effect=full),
        pytest.raises(InputError, match=expected),
    ):
        prepare(config)
    assert left_behind(config) == []


def test_an_error_while_overwriting_leaves_what_was_there(config: DataConfig) -> None:
    before = prepare(config)
    with full_disk(), pytest.raises(InputError, match="cannot be written"):
        prepare(config, overwrite=True)
    assert same_arrays(before, open_prepared(config))
    assert not list(Path(config.data_dir).rglob("*.replaced")) + list(Path(config.data_dir).rglob("incomplete*"))


def test_leftovers_of_killed_processes_are_removed(config: DataConfig) -> None:
    folder = Path(builder_for(config).data_path)
    leftover = folder.with_name(f"{folder.name}.incomplete")
    (leftover / "deep").mkdir(parents=True)
    prepare(config)
    assert not leftover.exists()


def test_a_process_that_was_killed_while_it_replaced_data(config: DataConfig) -> None:
    """On a file system that cannot exchange two names."""
    folder = prepare(config).folder
    folder.rename(folder.with_name(f".{folder.name}.replaced"))
    with mock.patch.object(prepared, "build") as build:
        check_against_plain_python(prepare(config), ROWS)
    assert not build.called
    assert list(folder.parent.iterdir()) == [folder]


def test_a_lost_or_truncated_cache(config: DataConfig) -> None:
    store = prepare(config)
    packed = store.folder / event_store.PACKED_DIR
    path = packed / "item_ids.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        InputError, match=rf"{path}: .*Delete {packed}, or give launch/train.sh or prepare_data --overwrite_prepared"
    ):
        open_prepared(config)
    shutil.rmtree(packed)
    again = open_prepared(config)
    check_against_plain_python(again, ROWS)


@pytest.fixture(scope="module")
def of_five_shards(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Prepared, with the cache lost: the records are to be read again."""
    folder = tmp_path_factory.mktemp("five_shards")
    write_log(folder / "log.csv", ROWS)
    config = DataConfig(dataset="event_log", data_path=str(folder / "log.csv"), data_dir=str(folder / "prepared"))
    with mock.patch.object(blocks_module, "EVENTS_PER_BLOCK", 20), mock.patch.object(base, "BLOCKS_PER_SHARD", 2):
        prepared_at = prepare(config).folder
    shutil.rmtree(prepared_at / event_store.PACKED_DIR)
    return config


@pytest.fixture
def damaged(of_five_shards: DataConfig, tmp_path: Path) -> DataConfig:
    """The config of a copy of `of_five_shards`, to be damaged."""
    shutil.copytree(of_five_shards.data_dir, tmp_path / "copy")
    return dataclasses.replace(of_five_shards, data_dir=str(tmp_path / "copy"))


def first_record(content: bytes) -> int:
    """Where the first of a shard's two records ends: length, its checksum, content, its checksum."""
    return 8 + 4 + int.from_bytes(content[:8], "little") + 4


@pytest.mark.parametrize("shard", [0, 2, 4], ids=["first", "middle", "last"])
@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda content: None, r"event_log-events\.tfrecord-0000\d-of-00005; No such file or directory"),
        (lambda content: b"", "order|expected to contain 10 elements but contained only 8"),
        (
            lambda content: content[: first_record(content)],
            "order|expected to contain 10 elements but contained only 9",
        ),
        (lambda content: content[: len(content) // 2], "order|truncated record at"),
        (lambda content: content[:-1], "truncated record at"),
        (lambda content: content[:40] + bytes(20) + content[60:], "corrupted record at"),
        (lambda content: content[first_record(content) :] + content[: first_record(content)], "order"),
    ],
    ids=["missing", "empty", "one_record", "half", "all_but_a_byte", "zeros", "turned_around"],
)
def test_damaged_records(damaged: DataConfig, shard: int, damage: Callable[[bytes], bytes | None], found: str) -> None:
    folder = prepared_folder(damaged)
    path = sorted(folder.glob("*.tfrecord*"))[shard]
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_prepared(damaged)
    text = str(caught.value)
    assert text.startswith(
        (f"{folder}: the records cannot be read (", f"{folder}: records must hold all users in order.")
    )
    assert text.endswith(". Give launch/train.sh or prepare_data --overwrite_prepared.")
    assert re.search(found, text) and "node" not in text
    assert not list(folder.glob("packed*"))


@pytest.mark.parametrize("content", [None, b"", b'{"splits": ['], ids=["missing", "empty", "cut"])
def test_what_tfds_notes_beside_the_records(damaged: DataConfig, content: bytes | None) -> None:
    """Only who reads the records needs it, and nothing that is to be overwritten stands in the way."""
    folder = prepared_folder(damaged)
    before = open_prepared(damaged)
    path = folder / "dataset_info.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert same_arrays(open_prepared(damaged), before)
    shutil.rmtree(folder / event_store.PACKED_DIR)
    with pytest.raises(InputError, match=rf"{folder}: the records cannot be read .* --overwrite_prepared\.$"):
        open_prepared(damaged)
    assert not list(folder.glob("packed*"))
    assert same_arrays(prepare(damaged, overwrite=True), before)


@pytest.mark.parametrize("content", [None, b"", b'{"num_users": 17, "num_it'], ids=["missing", "empty", "cut"])
def test_lost_facts(damaged: DataConfig, content: bytes | None) -> None:
    folder = prepared_folder(damaged)
    (folder / schema.FACTS_FILE).unlink()
    if content is not None:
        (folder / schema.FACTS_FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"facts\.json: cannot be read \(.*\)\. Give .* --overwrite_prepared\.$"):
        open_prepared(damaged)
    assert not list(folder.glob("packed*"))
    check_against_plain_python(prepare(damaged, overwrite=True), ROWS)


def test_data_that_is_prepared_anew_under_a_job(config: DataConfig) -> None:
    store = prepare(config)
    before = {name: np.array(getattr(store, name)) for name in ("item_ids", "timestamps", "user_offsets")}
    expected = rf"^{store.folder}: prepared data must stay as it is .* Received: it was prepared anew under the running"
    write_log(Path(config.data_path), ROWS[:-1])
    prepare(config, overwrite=True)
    with pytest.raises(InputError, match=expected):
        store.check_unchanged()
    for name, array in before.items():  # a job that is asked to end has its own data until then
        np.testing.assert_array_equal(getattr(store, name), array)


def test_data_that_is_being_prepared_anew_under_a_job(config: DataConfig) -> None:
    store = prepare(config)

    def check(*args: object) -> None:
        store.check_unchanged()  # until the new data is complete
        open_prepared(config).check_unchanged()
        raise OSError(28, "No space left on device")

    with mock.patch.object(base, "write_beside", check), pytest.raises(InputError, match="cannot be written"):
        prepare(config, overwrite=True)
    store.check_unchanged()
    prepare(config, overwrite=True)
    with pytest.raises(InputError, match="it was prepared anew under the running job"):
        store.check_unchanged()


def test_data_that_is_prepared_anew_while_another_process_waits_to_pack(config: DataConfig) -> None:
    """The records of today are packed by the facts of today."""
    shutil.rmtree(prepare(config).folder / event_store.PACKED_DIR)
    real_writing = prepared.writing

    @contextlib.contextmanager
    def writing(config: DataConfig) -> Iterator[Path]:
        with real_writing(config) as folder:
            write_log(Path(config.data_path), ROWS[:-1])
            prepared.build(config, folder)  # as one does who had the lock before
            yield folder

    with mock.patch.object(prepared, "writing", writing):
        check_against_plain_python(open_prepared(config), ROWS[:-1])


OPEN_IN_A_PROCESS = """
import sys
import threading
from din_dist.config import DataConfig
from din_dist.data import event_store
from din_dist.data.prepared import open_prepared
pack, calls = event_store.pack, []
event_store.pack = lambda *args: (calls.append(1), pack(*args))
store = open_prepared(DataConfig(dataset="event_log", data_path=sys.argv[1], data_dir=sys.argv[2]))
print(len(calls), int(store.item_ids.sum()))
"""


def test_processes_that_open_at_once_pack_once(config: DataConfig) -> None:
    store = prepare(config)
    expected = int(store.item_ids.sum())
    shutil.rmtree(store.folder / event_store.PACKED_DIR)
    command = [sys.executable, "-c", OPEN_IN_A_PROCESS, config.data_path, config.data_dir]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [worker.communicate()[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sorted(int(calls) for calls, _ in outputs) == [0, 0, 1]
    assert {int(total) for _, total in outputs} == {expected}


def test_threads_that_prepare_at_once_build_once(config: DataConfig) -> None:
    all_found_nothing, thread = threading.Barrier(4), threading.local()
    real_writing = prepared.writing

    def writing(config: DataConfig) -> AbstractContextManager[Path]:
        if not hasattr(thread, "waited"):
            thread.waited = True
            all_found_nothing.wait(timeout=PATIENCE)
        return real_writing(config)

    with (
        mock.patch.object(prepared, "writing", writing),
        mock.patch.object(prepared, "build", side_effect=prepared.build) as build,
        ThreadPoolExecutor(4) as pool,
    ):
        stores = list(pool.map(lambda _: prepare(config), range(4)))
    assert build.call_count == 1
    assert all(same_arrays(stores[0], store) for store in stores)


def test_tfds_keeps_quiet(
    config: DataConfig, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    prepare(config)
    assert capfd.readouterr().out == ""
    assert [record.getMessage() for record in caplog.records if record.name == "absl"] == []


def test_tfds_looks_neither_in_the_network_nor_leaves_temporary_folders(config: DataConfig) -> None:
    with (
        mock.patch.object(gcs_utils, "gcs_dataset_info_files", side_effect=AssertionError) as look,
        mock.patch("tempfile.mkdtemp", side_effect=AssertionError),
    ):
        prepare(config)
    assert not look.called


@pytest.fixture(scope="module")
def synthetic_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = str(tmp_path_factory.mktemp("synthetic"))
    prepare(DataConfig(dataset="synthetic", synthetic_num_users=20, data_dir=folder))
    yield folder


def test_features_that_a_data_set_has_not(synthetic_dir: str) -> None:
    config = DataConfig(dataset="synthetic", synthetic_num_users=20, data_dir=synthetic_dir)
    assert dict(open_prepared(dataclasses.replace(config, item_features=())).facts.item_features) == {}
    expected = r"--item_features: must be features of synthetic. Received: 'brand'. Choose among category_id\."
    with pytest.raises(InputError, match=expected):
        open_prepared(dataclasses.replace(config, item_features=("category_id", "brand")))


def test_an_unknown_amazon_category(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"unknown category of amazon_reviews\. Received: 'Cars'\. Choose among Electro"
    ):
        builder_for(DataConfig(dataset="amazon_reviews/Cars", data_dir=str(tmp_path)))


def test_amazon_beauty(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "amazon_beauty.parquet"
    store = prepare(DataConfig(dataset="event_log", data_path=str(path), data_dir=str(tmp_path)))
    facts = store.facts
    assert (facts.num_users, facts.num_items, facts.num_events) == (22_363, 12_101, 198_502)
    assert facts.item_features == {"category_id": 195} and not facts.has_labels
    assert list(facts.sources) == [str(path)]


def as_read_by_an_earlier_version(store: EventStore, **changed: object) -> None:
    fields = store.facts.to_json() | changed
    del fields["reader"]
    (store.folder / schema.FACTS_FILE).write_text(json.dumps(fields))


@pytest.mark.parametrize("kind", ["JSON lines", "partition", "CSV"])
def test_what_an_earlier_version_may_have_read_wrongly(tmp_path: Path, config: DataConfig, kind: str) -> None:
    """It did not see columns that begin late in JSON lines, nor those that folders' names give."""
    log = tmp_path / "label=1" / "log.csv" if kind == "partition" else tmp_path / "log.csv"
    log.parent.mkdir(exist_ok=True)
    write_log(log, ROWS)
    if kind == "JSON lines":
        log = log.with_suffix(".jsonl")
        log.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = dataclasses.replace(config, data_path=str(log))
    expected = prepare(config).facts
    as_read_by_an_earlier_version(prepare(config), num_items=expected.num_items)
    if kind == "CSV":
        assert dataclasses.replace(open_prepared(config).facts, reader=schema.READER) == expected
        return
    with pytest.raises(
        InputError, match="reads columns that begin late, and those that folders' names give.* Prepare it"
    ):
        open_prepared(config)
    with mock.patch.object(prepared, "build", wraps=prepared.build) as build:
        assert prepare(config).facts == expected
        assert prepare(config).facts == expected
    assert build.call_count == 1
    as_read_by_an_earlier_version(prepare(config))
    log.unlink()  # there is nothing to read again
    open_prepared(config)


def test_labels_of_folders_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    """The same file, moved from the folder of clicks to that of impressions."""
    found = []
    for label in (0, 1):
        folder = tmp_path / str(label) / f"label={label}"
        folder.mkdir(parents=True)
        write_log(folder / "log.csv", ROWS)
        config = DataConfig(dataset="event_log", data_path=str(folder.parent), data_dir=str(tmp_path / "prepared"))
        store = prepare(config)
        assert store.labels is not None and set(store.labels.tolist()) == {label}
        found.append(store.facts.fingerprint)
    assert found[0] != found[1]


def test_what_is_told_of_the_files(tmp_path: Path, config: DataConfig) -> None:
    (tmp_path / "log").mkdir()
    for name in ("a.csv", "b.csv"):
        write_log(tmp_path / "log" / name, ROWS)
    (tmp_path / "log" / "README").touch()
    config = dataclasses.replace(config, data_path=str(tmp_path / "log"))
    store = prepare(config)
    assert prepared.describe_sources(config, store.facts) == ["files: 2 read, 1 passed over: README"]
    shutil.rmtree(tmp_path / "log")
    assert prepared.describe_sources(config, store.facts) == ["files: 2 read, which are gone now"]
    assert prepared.describe_sources(DataConfig(), store.facts) == []
