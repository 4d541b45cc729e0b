"""Tables in an object store: found and read as on a disk. Failures are one line, in bounded time."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.errors import InputError
from din_dist.files import source_path, split_remote
from din_dist.tables import storage
from din_dist.tables.formats import format_of
from din_dist.tables.record_batches import Layout, read_columns, read_rows
from din_dist.tables.sources import check_unchanged, find_files, fingerprint_files
from din_dist.tables.storage import RemoteFile
from din_dist.tables.survey import survey_table
from tests.support.faulty_store import Fault, Store, running_store
from tests.support.patience import PATIENCE

HOST = "endpoint_override=127.0.0.1:9000&scheme=http"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with running_store(monkeypatch) as store:
        yield store


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MOST_SECONDS", 2.0)


# --- URIs. ---


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://b/log/day=*/*.parquet", ("s3://b", "/log/day=*/*.parquet", "")),
        (f"s3://b/log?{HOST}", ("s3://b", "/log", HOST)),
        (f"s3://b/part-?.csv?{HOST}", ("s3://b", "/part-?.csv", HOST)),
        ("s3://b/time=12%3A00/a b.csv", ("s3://b", "/time=12%3A00/a b.csv", "")),
        ("hdfs://host:8020/log", ("hdfs://host:8020", "/log", "")),
        ("abfs://c@account.dfs.core.windows.net/x", ("abfs://c@account.dfs.core.windows.net", "/x", "")),
    ],
)
def test_the_parts_of_a_uri(uri: str, expected: tuple[str, str, str]) -> None:
    assert split_remote(uri) == expected
    assert source_path(uri, "data_path") == uri


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://key:hidden@b/x", "--data_path: must have no password"),
        ("s3://key@b/x", "--data_path: must have no password"),
        ("abfs://c@a.net/x?client_secret=hidden", "--data_path: must have no password"),
        ("s3:///x", "--data_path: must name a bucket"),
        ("https://user:hidden@b/x", "must be a path of this machine, or begin with s3, gs, abfs, abfss, hdfs and ://"),
        ("s3://b/a\nb", "--data_path: must be a URI of printable characters"),
    ],
)
def test_refused_uris(uri: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        source_path(uri, "data_path")
    assert expected in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_that_pyarrow_does_not_know() -> None:
    with pytest.raises(InputError, match=r"s3://b\?color=red: must be a URI that pyarrow opens\. .*'color'"):
        find_files("s3://b/x?color=red")


def test_files_have_the_order_of_paths() -> None:
    names = ["a/b.csv", "a-b.csv", "a/B/c.csv", "a.csv", "a"]
    assert [str(file) for file in sorted(RemoteFile.of(f"s3://x/{name}") for name in names)] == [
        f"s3://x/{path}" for path in sorted(map(Path, names))
    ]


# --- Finding. ---


NAMES = ["b.parquet", "day=2/a.parquet", "day=1/z.parquet", "_SUCCESS", "b.parquet.crc", ".hidden.parquet"]
NAMES += [
    "_temporary/x.parquet",
    ".git/y.parquet",
    "README.md",
    "day=1/deep/er/c.parquet",
    "a-b/c.parquet",
    "a b.parquet",
]


def test_the_same_files_as_on_a_disk(store: Store, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    store.put_folder("log", tmp_path)
    for pattern in (
        "",
        "/*",
        "/day=*",
        "/day=?/*.parquet",
        "/**/c.parquet",
        "/[ab]*",
        "/day=1/z.parquet",
        "/a b.parquet",
    ):
        local = find_files(f"{tmp_path}{pattern}")
        remote = find_files(store.uri(f"log{pattern}"))
        assert [str(file).removeprefix("s3://logs/log") for file in remote.files] == [
            str(file).removeprefix(str(tmp_path)) for file in local.files
        ], pattern
        assert remote.describe() == local.describe()


def test_a_large_folder_takes_few_requests(store: Store) -> None:
    for number in range(30):
        store.put(f"log/day={number}/a.csv", b"a\n1\n")
    store.proxy.requests.clear()
    assert len(find_files(store.uri("log/day=*/*.csv")).files) == 30
    assert len(store.proxy.requests) < 10


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (["a.csv"], "none.csv", "none.csv?endpoint_override={port}: no such file, folder, or match of a glob"),
        (["a.csv"], "x/*.csv", "no such file, folder, or match of a glob. Correct --data_path."),
        (["a.txt"], "", "no file of a supported type there"),
        (["a.txt"], "a.txt", "s3://logs/log/a.txt: each file of the log must be one of"),
        (["a.csv", "b.jsonl"], "", "all files of the log must have one format"),
        (["_delta_log/0.json", "a.parquet"], "", "Received: a Delta table"),
        ([".hoodie/x", "a.parquet"], "*.parquet", "Received: a Hudi table"),
        (["metadata/1.metadata.json", "data/a.parquet"], "data/*.parquet", "Received: an Iceberg table"),
    ],
)
def test_what_is_refused(store: Store, names: list[str], path: str, expected: str) -> None:
    for name in names:
        store.put(f"log/{name}", b"a\n1\n")
    with pytest.raises(InputError) as caught:
        find_files(store.uri(f"log/{path}"))
    assert expected.replace("{port}", f"127.0.0.1:{store.proxy.port}&scheme=http&region=us-east-1") in str(caught.value)


# --- Reading. ---

CSV = b"user_id,item_id\n" + b"".join(b"u%d,i%d\n" % (n, n * n % 97) for n in range(5000))
LINES = b"".join(json.dumps({"user_id": f"u{n}", "item_id": f"i{n * n % 97}"}).encode() + b"\n" for n in range(5000))


def _parquet() -> bytes:
    table = pa.table({"user_id": [f"u{n}" for n in range(5000)], "item_id": [f"i{n * n % 97}" for n in range(5000)]})
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=700)
    return stream.getvalue()


CONTENTS = {
    "a.csv": CSV,
    "a.csv.gz": gzip.compress(CSV),
    "a.csv.xz": lzma.compress(CSV),
    "a.jsonl": LINES,
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.zst": pa.compress(LINES, "zstd", asbytes=True),
    "a.parquet": _parquet(),
}


def _rows(file: storage.File) -> list[dict]:
    form = format_of(file)
    assert form is not None
    layout = Layout.of(file, form, ["user_id", "item_id"])
    assert layout is not None
    return [row for batch in read_columns(file, form, layout, ["user_id", "item_id"]) for row in batch.to_pylist()]


@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_reads_as_from_a_disk(store: Store, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name])
    store.put(f"log/{name}", CONTENTS[name])
    (remote,) = find_files(store.uri(f"log/{name}")).files
    assert _rows(remote) == [{"user_id": f"u{n}", "item_id": f"i{n * n % 97}"} for n in range(5000)]
    form = format_of(remote)
    assert form is not None
    later, local = (pa.Table.from_batches(read_rows(file, form, 4321)) for file in (remote, tmp_path / name))
    assert later.equals(local)
    assert survey_table(remote) == survey_table(tmp_path / name)


def test_a_damaged_file_is_named(store: Store) -> None:
    store.put("log/a.parquet", CONTENTS["a.parquet"][:-9])
    store.put("log/a.csv", b"user_id,item_id\nu1,i1\nu2,i2,x\n")
    with pytest.raises(InputError, match=r"^s3://logs/log/a\.parquet: must be Parquet from end to end"):
        _rows(RemoteFile.of(store.uri("log/a.parquet")))
    with pytest.raises(InputError, match=r"^s3://logs/log/a\.csv, row 2: must be CSV from end to end"):
        _rows(RemoteFile.of(store.uri("log/a.csv")))


# --- Fingerprints. ---


def test_a_fingerprint_is_one_request_and_reads_nothing(store: Store) -> None:
    store.put("log/label=1/a.csv", CSV)
    (file,) = find_files(store.uri("log")).files
    store.proxy.requests.clear()
    facts = fingerprint_files([file], ["label"])
    assert [line.split()[0] for line in store.proxy.requests] == ["HEAD"]
    assert facts["s3://logs/log/label=1/a.csv"]["size"] == len(CSV)
    assert facts["s3://logs/log/label=1/a.csv"]["partition"] == "label=1"


def test_changes_are_noticed_by_the_etag(store: Store) -> None:
    store.put("log/a.csv", b"a\n1\n")
    files = find_files(store.uri("log")).files
    recorded = fingerprint_files(files)
    store.put("log/a.csv", b"a\n1\n")  # the same content, written later
    check_unchanged(recorded, files)
    store.put("log/a.csv", b"a\n2\n")  # of the same size, and perhaps in the same second
    with pytest.raises(InputError, match=r"^s3://logs/log/a\.csv: this file has changed since the data was prepared"):
        check_unchanged(recorded, files)
    store.put("log/b.csv", b"a\n2\n")
    with pytest.raises(InputError, match=r"^s3://logs/log/b\.csv: this file was added"):
        check_unchanged(recorded | fingerprint_files(files), find_files(store.uri("log")).files)


def test_a_store_without_etags_is_watched_by_time() -> None:
    first, later = storage.State(5, 10, ""), storage.State(5, 11, "")
    assert first.facts()["digest"] != later.facts()["digest"]
    assert storage.State(5, 10, "x").facts()["digest"] == storage.State(5, 11, "x").facts()["digest"]


def test_a_file_that_changes_while_it_is_read(store: Store) -> None:
    store.put("log/a.csv", CSV)
    stream = storage.readable(RemoteFile.of(store.uri("log/a.csv")))
    assert stream.read(100) == CSV[:100]
    store.put("log/a.csv", CSV[:50])
    with pytest.raises(InputError, match=r"^s3://logs/log/a\.csv: must stay as it is while it is read\."):
        stream.read(100)


def test_a_file_of_another_content_is_not_taken_for_damaged(store: Store) -> None:
    store.put("log/a.parquet", CONTENTS["a.parquet"])
    file = RemoteFile.of(store.uri("log/a.parquet"))
    form = format_of(file)
    assert form is not None
    batches = read_rows(file, form, 0, 700)
    next(batches)
    store.put("log/a.parquet", b"\xff" * len(CONTENTS["a.parquet"]))
    with pytest.raises(InputError, match=r"^s3://logs/log/a\.parquet: must stay as it is while it is read\."):
        list(batches)


# --- Faults. ---


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.CUT, Fault.SILENT])
@pytest.mark.parametrize("name", ["a.csv.gz", "a.parquet", "a.jsonl"])
def test_a_fault_that_passes_changes_nothing(store: Store, fault: Fault, name: str) -> None:
    store.put(f"log/{name}", CONTENTS[name])
    (file,) = find_files(store.uri("log")).files
    store.proxy.fail(fault, times=1, only=f"GET /logs/log/{name}")
    assert _rows(file) == [{"user_id": f"u{n}", "item_id": f"i{n * n % 97}"} for n in range(5000)]
    assert store.proxy.times == 0


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault.BUSY, "SLOW_DOWN|SERVICE_UNAVAILABLE"),
        (Fault.CUT, "partial file"),
        (Fault.SILENT, "timed out|Timeout|too slow"),
    ],
)
@pytest.mark.parametrize("only", ["GET /logs/log/a.csv", "GET /logs.*list-type"])
@pytest.mark.usefixtures("impatient")
def test_a_fault_that_stays_is_one_line_in_bounded_time(store: Store, fault: Fault, expected: str, only: str) -> None:
    store.put("log/a.csv", CSV)
    store.proxy.fail(fault, only=only)
    began = time.monotonic()
    with pytest.raises(InputError, match=expected) as caught:
        _rows(find_files(store.uri("log")).files[0])
    assert "the store must answer. Received, and again for " in str(caught.value)
    assert "Check the network and the URI's endpoint" in str(caught.value)
    assert str(caught.value).startswith("s3://logs/log")
    assert "\n" not in str(caught.value)
    assert (
        time.monotonic() - began < PATIENCE
    )  # three attempts of S3's own at three seconds each, and the last one begun


@pytest.mark.usefixtures("impatient")
def test_nobody_listens(store: Store) -> None:
    store.proxy.close()
    with pytest.raises(InputError, match=r"^s3://logs/log: the store must answer\..*onnect"):
        find_files(store.uri("log"))


@pytest.mark.parametrize("only", ["HEAD /logs/log/a.csv", "GET /logs/log/a.csv", "GET /logs.*list-type"])
def test_wrong_credentials_are_told_at_once(store: Store, only: str) -> None:
    store.put("log/a.csv", CSV)
    store.proxy.fail(Fault.DENIED, only=only)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"must be readable\. .*ACCESS_DENIED.* Give credentials"):
        _rows(find_files(store.uri("log")).files[0])
    assert time.monotonic() - began < 10


def test_rights_may_begin_at_the_folder_of_the_log(store: Store) -> None:
    store.put("log/a.csv", CSV)
    store.proxy.fail(Fault.DENIED, only="(_delta_log|hoodie|metadata)")
    assert [str(file) for file in find_files(store.uri("log")).files] == ["s3://logs/log/a.csv"]
    assert store.proxy.times < -1  # they were asked for


def test_a_bucket_that_is_not_there(store: Store) -> None:
    uri = store.uri("log/*.csv").replace("s3://logs/", "s3://elsewhere/")
    with pytest.raises(InputError, match=r"^s3://elsewhere/log.*: no such file, folder, or match of a glob"):
        find_files(uri)


def test_hive_partitions_name_columns(store: Store) -> None:
    for day, label in (("2024-01-01", 0), ("2024-01-02", 1)):
        store.put(f"log/day={day}/label={label}/a.parquet", CONTENTS["a.parquet"])
    for file in find_files(store.uri("log/day=*")).files:
        layout = Layout.of(file, format_of(file), ["user_id", "day", "label"])  # type: ignore[arg-type]
        assert layout is not None
        assert layout.names == ("user_id", "item_id", "day", "label")
        batch = next(read_columns(file, format_of(file), layout, ["day", "label"]))  # type: ignore[arg-type]
        expected = np.unique([str(file).split("/")[4].removeprefix("day=")])
        assert np.array_equal(np.unique(batch.column("day").to_pylist()), expected)
