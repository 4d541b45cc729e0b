"""Logs that are sorted by way of files, against those that are sorted in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from din_dist.config import DataConfig
from din_dist.data import blocks, spilled_log, spooled_log
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.errors import InputError
from din_dist.features.spec import FeatureConflict
from din_dist.tables import columns
from tests.benchmarks.beyond_memory import write_log
from tests.support.growing_log import FORMS, LABELS, VISITS, config_of, rows_of
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT


@pytest.fixture(autouse=True)
def _few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small logs are read, drained, sorted and written in many parts."""
    monkeypatch.setattr(blocks, "EVENTS_PER_BLOCK", 40)
    monkeypatch.setattr(columns, "ROWS_TO_DRAIN", 16)
    monkeypatch.setattr(spooled_log, "FEWEST_AT_ONCE", 7)
    yield


def write_files(folder: Path, rows: list[dict[str, Any]], num_files: int) -> Path:
    """Writes rows to Parquet files of about the same size, in their order, in groups of 13 rows."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = pa.Table.from_pylist(rows_of(0, "x", 60, (0, 9), 9)).schema
    size = -(-len(rows) // num_files)
    for number in range(num_files):
        table = pa.Table.from_pylist(rows[number * size : (number + 1) * size], kind)
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=13)
    return folder


def prepared(folder: Path, log: Path, memory_limit: str, **given: Any) -> tuple[EventStore, list[str]]:
    """The data of a log, and the lines that were told."""
    lines: list[str] = []
    folder.mkdir(exist_ok=True)
    config = config_of(folder, log, memory_limit=memory_limit, **given)
    return prepare(config, tell=lines.append), lines


def assert_same_files(left: Path, right: Path) -> None:
    """All that is prepared is the same to the byte."""
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (left, right)]
    assert files[0] == files[1]
    for name in sorted(files[0]):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


@pytest.mark.parametrize("limit", ["1", "4KB", "16KB"])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_what_memory_gives(tmp_path: Path, form: str, limit: str) -> None:
    rows = rows_of(1, "o", 300, (0, 25), 20) + rows_of(2, "n", 120, (20, 32), 30)
    log = write_files(tmp_path / "log", rows, 3)
    in_memory, _ = prepared(tmp_path / "memory", log, "1GiB", **FORMS[form])
    by_files, lines = prepared(tmp_path / "files", log, limit, **FORMS[form])
    assert "by way of files" in lines[0]
    assert_same_files(by_files.folder, in_memory.folder)
    assert [path.name for path in by_files.folder.parent.iterdir()] == [by_files.folder.name]


@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(30, 250),
    num_files=st.integers(1, 5),
    most=st.integers(2, 40),
    limit=st.integers(1, 3_000),
    form=st.sampled_from(sorted(FORMS)),
)
@settings(max_examples=6, deadline=None)
def test_any_log(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    num_rows: int,
    num_files: int,
    most: int,
    limit: int,
    form: str,
) -> None:
    folder = tmp_path_factory.mktemp("log")
    rows = rows_of(seed, "a", num_rows, (0, 32), most)
    rows += rows_of(seed, "z", 30, (0, 32), 41)  # so that nobody touched all items, and each split has events
    log = write_files(folder / "log", rows, num_files)
    given = FORMS[form]
    in_memory, _ = prepared(folder / "memory", log, "1GiB", declared=False, **given)
    by_files, lines = prepared(folder / "files", log, str(limit), declared=False, **given)
    assert "by way of files" in lines[0]
    assert_same_files(by_files.folder, in_memory.folder)


def test_ids_of_folders_and_text_are_read_alike(tmp_path: Path) -> None:
    """Integers that are written as text become integers, and "007" keeps all ids text."""
    for number, items in enumerate(("1,2,2,3,4", "5,6,7,1,007")):
        folder = tmp_path / "log" / f"category_id={number}{'x' * number}"
        folder.mkdir(parents=True)
        lines = [
            f"{user},{item},{time}" for time, (user, item) in enumerate(zip("12112", items.split(","), strict=True))
        ]
        (folder / "part.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    given = {"declared": False, "item_feature_conflict": FeatureConflict.LAST}
    in_memory, _ = prepared(tmp_path / "memory", tmp_path / "log", "1GiB", **given)
    by_files, lines = prepared(tmp_path / "files", tmp_path / "log", "1", **given)
    assert "by way of files" in lines[0]
    assert_same_files(by_files.folder, in_memory.folder)


def broken(row: int, **values: Any) -> list[dict[str, Any]]:
    """Rows of which one has other values."""
    rows = rows_of(3, "o", 120, (0, 25), 9)
    rows[row] |= values
    return rows


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of time."""
    return sorted(rows, key=lambda row: row["timestamp"])


def late_by(rows: list[dict[str, Any]], row: int) -> list[dict[str, Any]]:
    """The rows in the order of time, of which one comes late: its user has later events before it."""
    rows = in_order(rows)
    return [*rows[:row], *rows[row + 1 :], rows[row]]


@pytest.mark.parametrize(
    ("rows", "settings_given", "words"),
    [
        (broken(77, click=2), LABELS, "1.parquet, row 38: a label must be 0 or 1. Received: click=2."),
        (broken(100, age="of another"), {}, "a feature of users has one value for each, here age"),
        (broken(101, tags=[5, 5, 5]), {}, "a feature of items has one value for each, here tags"),
        (broken(60, click=1, acted_at=-9), LABELS, "every positive needs its acted_at"),
        (late_by(broken(0), 5), {"presorted": True}, "with --presorted each user's events must be in time order"),
        (broken(9, item_id=None), {}, "0.parquet, row 10: every event needs its item_id"),
    ],
    ids=["label", "user", "item", "early", "unsorted", "missing"],
)
def test_errors_are_the_same(
    tmp_path: Path, rows: list[dict[str, Any]], settings_given: dict[str, Any], words: str
) -> None:
    log = write_files(tmp_path / "log", rows, 3)
    messages = []
    for folder, limit in ((tmp_path / "memory", "1GiB"), (tmp_path / "files", "1")):
        with pytest.raises(InputError) as caught:
            prepared(folder, log, limit, **settings_given)
        messages.append(str(caught.value))
        assert not list(folder.rglob("*.sorting"))
    assert messages[0] == messages[1]
    assert words in messages[0]


KILLED = """
import os, signal, sys
from pathlib import Path
from din_dist.data import blocks, ordering, spilled_log, spooled_log
from din_dist.tables import columns
from din_dist.data.prepared import prepare
from tests.support.growing_log import FORMS, config_of

blocks.EVENTS_PER_BLOCK, columns.ROWS_TO_DRAIN, spooled_log.FEWEST_AT_ONCE = 40, 16, 7
folder, log, when = sys.argv[1:]
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if when == "within a region":
    append = ordering.RowWriter.append
    ordering.RowWriter.append = lambda self, part: (append(self, part), kill())
else:
    import contextlib
    from din_dist.files import published_folder

    @contextlib.contextmanager
    def published(path):
        with published_folder(path) as aside:
            yield aside
        if path.name == when:
            kill()

    ordering.published_folder = spilled_log.published_folder = published
prepare(config_of(Path(folder), Path(log), memory_limit="1", **FORMS["labels and visits"]))
"""


@pytest.mark.parametrize(
    ("when", "kept"), [("read", "read"), ("parted", "parted"), ("within a region", "parted"), ("sorted", "sorted")]
)
def test_killed_it_goes_on(tmp_path: Path, when: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write_files(tmp_path / "log", rows_of(5, "o", 200, (0, 32), 20), 2)
    in_memory, _ = prepared(tmp_path / "memory", log, "1GiB", **LABELS, **VISITS)
    (tmp_path / "files").mkdir()
    process = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "files", log, when],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=PATIENCE,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    (room,) = (tmp_path / "files").rglob("*.sorting")
    assert (room / kept).is_dir()

    def read_again(self: object, folder: Path) -> None:
        raise AssertionError("the log was read again")

    monkeypatch.setattr(spilled_log.SpilledLogReader, "spool", read_again)
    by_files, _ = prepared(tmp_path / "files", log, "1", **LABELS, **VISITS)
    assert_same_files(by_files.folder, in_memory.folder)
    assert not room.exists()


def test_files_of_another_log_are_not_used(tmp_path: Path) -> None:
    """A log that changed after a run was killed is read anew."""
    log = write_files(tmp_path / "log", rows_of(5, "o", 200, (0, 32), 20), 2)
    (tmp_path / "files").mkdir()
    subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "files", log, "sorted"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=PATIENCE,
    )
    assert list((tmp_path / "files").rglob("*.sorting"))
    write_files(tmp_path / "log", rows_of(6, "o", 200, (0, 32), 20), 2)
    by_files, _ = prepared(tmp_path / "files", log, "1", **LABELS, **VISITS)
    in_memory, _ = prepared(tmp_path / "memory", log, "1GiB", **LABELS, **VISITS)
    assert_same_files(by_files.folder, in_memory.folder)


GROWTH = """
import sys
from pathlib import Path
from din_dist.data.log_reader import Columns, read_log
from din_dist.data.spilled_log import Room, SpilledLogReader
from din_dist.data.raw_columns import RawColumns

files, columns = sorted(Path(sys.argv[1]).iterdir()), Columns(item_features=())
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
if sys.argv[2] == "files":
    room = Room(Path(sys.argv[3]), 8 << 20)
    room.begin("key")
    log = SpilledLogReader(files, columns, RawColumns(), room).read()
else:
    log = read_log(files, columns)
assert sum(len(block.item_ids) for block in log.blocks) == 4_000_000
print((peak() - before) / 1024)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """By way of files four million events take less than half of what they take in memory."""
    write_log(tmp_path / "log", 4_000_000)
    growth = {}
    for way in ("memory", "files"):
        done = subprocess.run(
            [sys.executable, "-c", GROWTH, tmp_path / "log", way, tmp_path / "room"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=PATIENCE,
        )
        growth[way] = float(done.stdout) if done.returncode == 0 else done.stderr.decode()[-2000:]
    assert growth["files"] < growth["memory"] / 2, growth


def test_what_cannot_go_by_way_of_files_goes_in_memory(tmp_path: Path) -> None:
    log = write_files(tmp_path / "log", rows_of(5, "o", 100, (0, 25), 20), 1)
    both = {"declared": False, "behaviours_path": str(log)}
    in_memory, told = prepared(tmp_path / "memory", log, "1GiB", **both)
    all_the_same, lines = prepared(tmp_path / "files", log, "1", **both)
    assert not told
    assert "It is prepared in memory all the same, because --behaviours_path cannot go by way of files yet." in lines[0]
    assert_same_files(all_the_same.folder, in_memory.folder)


def test_ids_of_folders_and_of_files_go_in_memory(tmp_path: Path) -> None:
    for folder, header, end in (("category_id=7", "", ""), ("more", ",category_id", ",8")):
        (tmp_path / "log" / folder).mkdir(parents=True)
        rows = [f"{user},{item},{item}{end}" for user in range(3) for item in range(user, 4)]
        (tmp_path / "log" / folder / "a.csv").write_text("\n".join([f"user_id,item_id,timestamp{header}", *rows]))
    with pytest.raises(InputError, match="category_id"):
        prepared(tmp_path / "strict", tmp_path / "log", "1", declared=False)
    given = {"declared": False, "item_feature_conflict": FeatureConflict.LAST}
    _, lines = prepared(tmp_path / "files", tmp_path / "log", "1", **given)
    assert "because category_id cannot go" in lines[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory_limit": "much"}, "--memory_limit: must be an amount of memory above 0, with KiB, MiB, GiB or TiB"),
        ({"memory_limit": "0GiB"}, "--memory_limit: must be an amount of memory above 0"),
        ({"memory_limit": "1GiB"}, "--memory_limit: belongs to --dataset=event_log. Received: '1GiB'. Drop it."),
    ],
)
def test_a_wrong_limit_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataConfig(**given)
