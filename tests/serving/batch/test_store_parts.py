"""Parts in an object store: the plan and the parts as in a folder, and the summary last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from din_dist.errors import InputError
from din_dist.serving.batch import store_parts
from din_dist.serving.batch.parts import PLAN, STOPPING, SUMMARY, PartsFolder
from din_dist.serving.batch.store_parts import StoreParts
from din_dist.tables import storage
from din_dist.tables.storage import RemoteFile
from tests.support.faulty_store import Fault, Store, running_store

SETTINGS = {"--export_dir": "digest", "--top_k": 0}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with running_store(monkeypatch) as store:
        yield store


@pytest.fixture
def rows(tmp_path: Path) -> list[Path]:
    (tmp_path / "rows.csv").write_text("i\n1\n2\n3\n4\n5\n")
    return [tmp_path / "rows.csv"]


def parts_in(store: Store) -> StoreParts:
    return StoreParts(RemoteFile.of(store.uri("out")))


def write_missing(parts: PartsFolder, rows: list[Path], most: int = 9, **changes: object) -> None:
    """Does what a command does: begins or goes on, writes at most so many parts, and finishes if none is missing."""
    plan = parts.begin(rows, 2, SETTINGS | changes, overwrite=False)
    for part in parts.share(plan, 0, 1)[:most]:
        with parts.claimed(part) as mine:
            assert mine
            with parts.published(part) as stream:
                stream.write(part.name.encode())
    if not parts.missing(plan):
        parts.finish(plan)


def test_a_store_has_what_a_folder_has(store: Store, rows: list[Path], tmp_path: Path) -> None:
    local = PartsFolder(tmp_path / "out")
    local.folder.mkdir()
    write_missing(local, rows)
    write_missing(parts_in(store), rows)
    found = {name: store.get(f"out/{name}") for name in store.names("out")}
    assert found == {path.name: path.read_bytes() for path in local.folder.iterdir()}
    assert found.keys() >= {PLAN, SUMMARY}


def test_it_goes_on_and_only_with_the_same_settings(store: Store, rows: list[Path]) -> None:
    write_missing(parts_in(store), rows, most=1)
    store.put(f"out/{STOPPING}", b"")
    assert SUMMARY not in store.names("out")
    with pytest.raises(InputError, match="--top_k: predictions that were begun go on with the same settings"):
        write_missing(parts_in(store), rows, **{"--top_k": 3})
    store.put("out/part-00000-of-00003.csv", b"kept")
    write_missing(parts_in(store), rows)
    assert store.get("out/part-00000-of-00003.csv") == b"kept"
    assert SUMMARY in store.names("out")
    assert STOPPING not in store.names("out")
    parts_in(store).begin(rows, 3, SETTINGS, overwrite=True)
    assert store.names("out") == [PLAN]
    store.put("out/part-00000-of-00003.csv", b"of another program")
    store.delete(f"out/{PLAN}")
    with pytest.raises(InputError, match=r"must be for these predictions alone\. Received: s3://logs/out with part-0"):
        parts_in(store).begin(rows, 3, SETTINGS, overwrite=False)


def test_each_part_has_one_worker(store: Store, rows: list[Path]) -> None:
    parts = parts_in(store)
    plan = parts.begin(rows, 1, SETTINGS, overwrite=False)
    store.put(f"out/{plan.parts()[1].name}", b"done")
    shares = [[part.first_row for part in parts.share(plan, rank, 3)] for rank in range(3)]
    assert shares == [[0], [2], [3, 4]]


def test_another_worker_that_stops_is_noticed(store: Store, rows: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    parts, other = parts_in(store), parts_in(store)
    other.stop_all()
    assert not parts.is_stopping(), "it does not ask for every batch"
    monkeypatch.setattr(store_parts.time, "monotonic", lambda: 1e9)
    assert parts.is_stopping()


def test_a_part_that_fails_is_not_there(store: Store, rows: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MOST_SECONDS", 1.0)
    store.proxy.fail(Fault.LOST, only="PUT /logs/out/part")
    with pytest.raises(InputError, match=r"^s3://logs/out/part-00000-of-00003\.csv: the store must answer\."):
        write_missing(parts_in(store), rows)
    store.proxy.fail(Fault.DENIED, only="PUT /logs/out/part")
    with pytest.raises(InputError, match=r"^s3://logs/out/part-00000-of-00003\.csv: must be writable\."):
        write_missing(parts_in(store), rows)
    assert store.names("out") == [PLAN]
    store.proxy.fail(Fault.NONE)
    parts = parts_in(store)
    plan = parts.begin(rows, 2, SETTINGS, overwrite=False)
    with pytest.raises(ValueError, match="in the middle"), parts.published(plan.parts()[0]) as stream:
        stream.write(b"half")
        raise ValueError("in the middle")
    assert store.names("out") == [PLAN]
