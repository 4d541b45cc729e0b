"""Logs that are sorted by way of files, against those that are sorted in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.data import blocks, spooled_log
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.tables import columns
from tests.data.test_extension import FORMS, config_of, rows_of


@pytest.fixture(autouse=True)
def _few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small logs are read, drained, sorted and written in many parts."""
    monkeypatch.setattr(blocks, "EVENTS_PER_BLOCK", 40)
    monkeypatch.setattr(columns, "ROWS_TO_DRAIN", 16)
    monkeypatch.setattr(spooled_log, "_FEWEST_AT_ONCE", 7)
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
