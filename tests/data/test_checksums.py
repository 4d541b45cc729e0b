"""A byte that a disk has changed: found before anything is learned from it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from din_dist import schema
from din_dist.config import DataConfig
from din_dist.data.checksums import CHECKSUMS_FILE
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import open_prepared, prepare
from din_dist.data.splits import split_examples
from din_dist.errors import InputError
from tests.support import special_files


@pytest.fixture(scope="module", params=[True, False], ids=["with_labels", "without"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("log")
    names = ["user_id", "item_id", "category_id", "timestamp", *(["label"] if request.param else [])]
    rows = [
        [f"u{n % 17}", f"i{n * 7 % 101}", f"c{n * 7 % 101 % 4}", str(n), str(n % 2)][: len(names)] for n in range(200)
    ]
    (folder / "log.csv").write_text("".join(",".join(row) + "\n" for row in [names, *rows]))
    config = DataConfig(dataset="event_log", data_path=str(folder / "log.csv"), data_dir=str(folder / "prepared"))
    split_examples(prepare(config), config)
    return config


@pytest.fixture
def store(prepared: DataConfig) -> EventStore:
    return open_prepared(prepared)


def opened(config: DataConfig) -> None:
    split_examples(open_prepared(config), config)


def put_back(path: Path, content: bytes) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(content)


def test_any_byte_of_any_file(prepared: DataConfig, store: EventStore) -> None:
    """The first of the values, one in the middle and the last, in each file that is opened."""
    paths = [path for path in store.folder.rglob("*") if path.suffix in (".npy", ".parquet")]
    assert len(paths) >= 12
    for path in paths:
        content = path.read_bytes()
        for place in (min(128, len(content) - 1), len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(
                InputError, match=rf"^{re.escape(str(path))}: cannot be read \(its content changed since"
            ):
                opened(prepared)
        put_back(path, content)
    opened(prepared)


@pytest.mark.parametrize("kind", special_files.KINDS)
def test_what_is_no_file(prepared: DataConfig, store: EventStore, kind: str) -> None:
    paths = [path for path in store.folder.rglob("*") if path.suffix in (".npy", ".parquet")]
    for path in (*paths, store.folder / schema.FACTS_FILE, store.folder / "packed" / CHECKSUMS_FILE):
        content = path.read_bytes()
        special_files.put(kind, path)
        if kind != "dangling" or path.name != CHECKSUMS_FILE:  # without them data is taken as it is
            with pytest.raises(InputError, match=rf"^{re.escape(str(store.folder))}/.*: cannot be read \("):
                opened(prepared)
        put_back(path, content)


def test_data_of_an_earlier_version_has_none(prepared: DataConfig, store: EventStore, tmp_path: Path) -> None:
    found = list(store.folder.rglob(CHECKSUMS_FILE))
    assert len(found) >= 4  # packed, its split, vocabulary, item_features
    for path in found:
        shutil.move(path, tmp_path / str(found.index(path)))
    opened(prepared)
    for path in found:
        shutil.move(tmp_path / str(found.index(path)), path)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: [facts],
        lambda facts: None,
        *(
            lambda facts, name=name, value=value: {**facts, name: value}
            for name, values in {
                "has_labels": ([], {}, "yes", -1, 1.5, None),
                "num_events": (None, [], -1, 10**30, True, "9"),
                "num_users": (None, 1.5),
                "num_items": (None, -3),
                "item_features": (None, -1, True, [], {"category_id": None}, {"category_id": "4"}),
                "sources": (None, -1, True, [], {"log.csv": None}),
                "reader": (None, [], {}, "x"),
                "first_timestamp": ("x", 2**70),
                "last_timestamp": ([], None),
                "fingerprint": (5, None),
                "history_rule": ("another", None),
                "more": (1,),
            }.items()
            for value in values
        ),
    ],
    ids=map(str, range(40)),
)
def test_facts_that_cannot_be(prepared: DataConfig, store: EventStore, change: Callable[[dict], object]) -> None:
    path = store.folder / schema.FACTS_FILE
    content = path.read_bytes()
    try:
        path.write_text(json.dumps(change(json.loads(content))))
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: cannot be read \(.+\)\. Give "):
            opened(prepared)
    finally:
        path.write_bytes(content)


def test_facts_nested_too_deeply(prepared: DataConfig, store: EventStore) -> None:
    path = store.folder / schema.FACTS_FILE
    content = path.read_bytes()
    try:
        path.write_text("[" * 100_000 + "]" * 100_000)
        with pytest.raises(InputError, match="nested too deeply"):
            opened(prepared)
    finally:
        path.write_bytes(content)
