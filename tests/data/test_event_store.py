"""The packed arrays, against a slow grouping in plain Python."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from din_dist import schema
from din_dist.data import blocks as blocks_module
from din_dist.data import event_store
from din_dist.data.blocks import Block, SortedBlocks
from din_dist.data.checksums import CHECKSUMS_FILE, write_checksums
from din_dist.data.event_store import EventStore, open_store, pack
from din_dist.data.log_reader import Columns, read_log
from din_dist.errors import InputError
from tests.support.event_stores import check_against_plain_python, store_of
from tests.support.thorough import up_to


@st.composite
def logs(draw: st.DrawFn) -> list[dict]:
    """Rows with string or integer ids, with or without labels, many ties in time."""
    names = {"user_id": draw(st.integers(1, 8)), "item_id": draw(st.integers(1, 9))}
    as_text = {name: draw(st.booleans()) for name in names}
    labelled = draw(st.booleans())
    categories = draw(st.lists(st.sampled_from([None, "c1", "c2", "c3"]), min_size=10, max_size=10))
    rows = []
    for _ in range(draw(st.integers(1, 60))):
        row: dict = {"timestamp": draw(st.integers(-3, 6))}
        for name, size in names.items():
            number = draw(st.integers(0, size))
            row[name] = f"{name}-{number}" if as_text[name] else number * 7
            if name == "item_id":
                row["category_id"] = categories[number]
        if labelled:
            row["label"] = draw(st.integers(0, 1))
        rows.append(row)
    return rows


@settings(max_examples=up_to(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=logs(), events_per_block=st.integers(1, 30))
def test_round_trip(rows: list[dict], events_per_block: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("store") / "1.0.0"
    check_against_plain_python(store_of(rows, folder, events_per_block), rows)


ROWS = [
    {"user_id": "u", "item_id": "i", "timestamp": 1, "category_id": "c"},
    {"user_id": "u", "item_id": "j", "timestamp": 2, "category_id": "c"},
    {"user_id": "v", "item_id": "i", "timestamp": 3, "category_id": "c"},
]
LABELLED = [{**row, "label": label} for row, label in zip(ROWS, (1, 0, 1), strict=True)]


def test_dtypes_and_sharing(tmp_path: Path) -> None:
    plain, labelled = store_of(ROWS, tmp_path / "a", 99), store_of(LABELLED, tmp_path / "b", 99)
    assert plain.history_item_ids is plain.item_ids and plain.history_offsets is plain.user_offsets
    assert plain.labels is None and plain.history_ends is None
    assert labelled.touched_gaps is None and labelled.touched_offsets is None
    dtypes = {
        "user_offsets": np.int64,
        "item_ids": np.int32,
        "timestamps": np.int64,
        "labels": np.uint8,
        "history_item_ids": np.int32,
        "history_offsets": np.int64,
        "history_ends": np.int64,
        "touched_offsets": np.int64,
        "touched_gaps": np.int32,
    }
    for store, (name, dtype) in itertools.product((plain, labelled), dtypes.items()):
        array = getattr(store, name)
        if array is not None:
            assert type(array) is np.ndarray and array.dtype == dtype, name
            assert array.ctypes.data % 64 == 0, name
    plain.item_ids[0] = 7  # copy-on-write: this process alone sees it
    assert open_store(tmp_path / "a", []).item_ids[0] == 1


def test_labels_that_are_all_negative(tmp_path: Path) -> None:
    store = store_of([{**row, "label": 0} for row in ROWS], tmp_path / "s", 1)
    assert store.history_item_ids.shape == (0,)
    assert store.history_ends is not None and store.history_ends.tolist() == [0, 0, 0]


def test_blocks_hold_whole_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "EVENTS_PER_BLOCK", 4)
    offsets = np.array([0, 3, 9, 10, 11, 12, 13])
    values = np.arange(13)
    cut = SortedBlocks(offsets, values, values, values)
    assert [(block.first_user, block.offsets.tolist()) for block in cut] == [
        (0, [0, 3, 9]),  # users that begin among events 0 to 3, the second a long one
        (2, [0, 1, 2, 3]),  # 8 to 11
        (5, [0, 1]),
    ]
    assert np.concatenate([block.item_ids for block in cut]).tolist() == values.tolist()


OF_BOTH = [
    "facts.json",
    "item_features/category_id.npy",
    "vocabulary/category_id.parquet",
    "vocabulary/items.parquet",
    "vocabulary/users.parquet",
    "packed/item_ids.npy",
    "packed/timestamps.npy",
    "packed/user_offsets.npy",
]
FILES = {
    "plain": [*OF_BOTH, "packed/touched_gaps.npy", "packed/touched_offsets.npy"],
    "labelled": [
        *OF_BOTH,
        "packed/history_ends.npy",
        "packed/history_item_ids.npy",
        "packed/history_offsets.npy",
        "packed/labels.npy",
    ],
}
each_file = pytest.mark.parametrize(("log", "name"), [(log, name) for log, names in FILES.items() for name in names])
MakeStore = Callable[[str], EventStore]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for log, rows in {"plain": ROWS, "labelled": LABELLED}.items():
        store_of(rows, folder / log, 99)
        for path in (folder / log).rglob("*"):  # else the clock may be too coarse to tell a write that follows
            os.utime(path, (1, 1))
    return folder


@pytest.fixture
def store_with(originals: Path, tmp_path: Path) -> MakeStore:
    """Opens a copy, to be damaged, of the `plain` or the `labelled` log."""
    return lambda log: open_store(shutil.copytree(originals / log, tmp_path / log), ["category_id"])


def remedy(path: Path) -> str:
    """What an error must say to do about a damaged file."""
    overwrite = "launch/train.sh or prepare_data --overwrite_prepared"
    return f"Delete {path.parent}, or give {overwrite}" if path.parent.name == "packed" else f"Give {overwrite}"


def test_a_store_knows_all_its_files(store_with: MakeStore) -> None:
    for log, names in FILES.items():
        store = store_with(log)
        assert sorted(str(path.relative_to(store.folder)) for path in store.files) == sorted(names)
        others = ("log.parquet", CHECKSUMS_FILE)
        in_folder = {path for path in store.folder.rglob("*") if path.is_file() and path.name not in others}
        assert in_folder == set(store.files)


@each_file
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: None,
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[:128],  # the header of an array, whole
        lambda content: content[: len(content) * 3 // 4],
        lambda content: content[:-1],
        lambda content: content + bytes(4),
    ],
    ids=["missing", "empty", "beginning", "header", "most", "all_but_a_byte", "too_much"],
)
def test_damaged_files(store_with: MakeStore, log: str, name: str, damage: Callable[[bytes], bytes | None]) -> None:
    store = store_with(log)
    path = store.folder / name
    damaged = damage(path.read_bytes())
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    with pytest.raises(InputError) as caught:
        open_store(store.folder, ["category_id"])
    text = str(caught.value)
    assert text.startswith(f"{path}: cannot be read (") and text.endswith(f"). {remedy(path)}.")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("log", "name"), [(log, name) for log, names in FILES.items() for name in names if name.endswith(".npy")]
)
def test_arrays_that_are_too_short_and_say_so(store_with: MakeStore, log: str, name: str) -> None:
    store = store_with(log)
    path = store.folder / name
    np.save(path, np.load(path)[:-1])
    write_checksums(path.parent)  # as a fault of ours would
    with pytest.raises(InputError, match=rf"{path}: must hold \d values of \w+\. Received: .* {remedy(path)}\.$"):
        open_store(store.folder, ["category_id"])


@pytest.mark.parametrize("name", ["users", "items", "category_id"])
def test_damaged_vocabularies(store_with: MakeStore, name: str) -> None:
    store = store_with("plain")
    path = store.folder / "vocabulary" / f"{name}.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 40 + content[44:])  # its end, which says what there is, is whole
    with pytest.raises(InputError, match=rf"^{path}: cannot be read \(.*\)\. Give .* --overwrite_prepared\.$"):
        store.vocabulary(name)
    pq.write_table(pa.table({"id": ["a", "b", "c", "d", "e"]}), path)
    write_checksums(path.parent)
    with pytest.raises(InputError, match=rf"{path}: must hold \d ids\. Received: 5\. Give .* --overwrite_prepared\.$"):
        open_store(store.folder, ["category_id"])


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(path.read_bytes()[:1])


@each_file
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (Path.unlink, "was removed"),
        (replace, "was replaced by another"),
        (lambda path: os.truncate(path, 9), r"was cut from \d+ to 9 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "was written to"),
        (write_in_place, "was written to"),
    ],
    ids=["removed", "replaced", "cut", "longer", "written_in_place"],
)
def test_files_that_change_under_a_job(
    store_with: MakeStore, log: str, name: str, change: Callable[[Path], None], what: str
) -> None:
    store = store_with(log)
    store.check_unchanged()
    path = store.folder / name
    change(path)
    with pytest.raises(InputError) as caught:
        store.check_unchanged()
    assert re.fullmatch(
        rf"{path}: prepared data must stay as it is while a job uses it\. Received: this file {what}\. {remedy(path)}, "
        "and start the job again\\.",
        str(caught.value),
    )


def test_what_is_no_change(store_with: MakeStore) -> None:
    store = store_with("plain")
    (store.folder / "packed" / "split-leave_one_out").mkdir()  # what this and other jobs add
    for path in store.files:
        path.read_bytes()
        path.chmod(0o400)
    store.check_unchanged()
    fields = {field.name: getattr(store, field.name) for field in dataclasses.fields(store) if field.name != "files"}
    EventStore(**fields).check_unchanged()  # of arrays that are mapped from nowhere


def test_a_cache_that_is_packed_again_under_a_job(tmp_path: Path, store_with: MakeStore) -> None:
    store = store_with("plain")
    (store.folder / "packed").rename(tmp_path / "aside")
    with pytest.raises(InputError, match=r"packed/user_offsets.npy: .* this file was removed\. Delete .*/packed, or"):
        store.check_unchanged()
    pack(store.folder, store.facts, read_log([store.folder / "log.parquet"], Columns()).blocks)
    with pytest.raises(InputError, match=r"packed/user_offsets.npy: .* this file was replaced by another\. Delete"):
        store.check_unchanged()


def test_a_folder_that_is_removed_under_a_job(store_with: MakeStore) -> None:
    store = store_with("plain")
    shutil.rmtree(store.folder)
    with pytest.raises(InputError, match=rf"^{store.folder}: .* Received: it was removed under the running"):
        store.check_unchanged()


def test_files_that_change_while_they_are_opened(store_with: MakeStore) -> None:
    """Else a store could be half of what was there before, half of what came after."""
    store = store_with("plain")
    real_read = event_store.read_facts

    def read_and_meddle(folder: Path) -> schema.DatasetFacts:
        replace(folder / "facts.json")
        return real_read(folder)

    with (
        mock.patch.object(event_store, "read_facts", read_and_meddle),
        pytest.raises(InputError, match="this file was replaced by another"),
    ):
        open_store(store.folder, ["category_id"])


def test_arrays_of_another_log(tmp_path: Path) -> None:
    store, longer = store_of(ROWS, tmp_path / "a", 99), store_of([*ROWS, ROWS[0]], tmp_path / "b", 99)
    path = store.folder / "packed" / "item_ids.npy"
    path.write_bytes((longer.folder / "packed" / "item_ids.npy").read_bytes())
    write_checksums(path.parent)
    with pytest.raises(InputError, match=r"item_ids.npy: must hold 3 values of int32. Received: \(4,\) of int32"):
        open_store(store.folder, [])
    offsets = store.folder / "packed" / "user_offsets.npy"
    np.save(offsets, np.array([0, 2, 4]))
    write_checksums(path.parent)
    with pytest.raises(InputError, match=r"user_offsets.npy: must end with 3. Received: 4"):
        open_store(store.folder, [])


def test_damaged_facts(tmp_path: Path) -> None:
    store = store_of(ROWS, tmp_path / "s", 99)
    facts = store.folder / schema.FACTS_FILE
    for text in ("{", json.dumps({"num_users": 1})):
        facts.write_text(text)
        with pytest.raises(InputError, match=r"facts.json: cannot be read .* --overwrite_prepared"):
            open_store(store.folder, [])


def test_blocks_that_do_not_fit_the_facts(tmp_path: Path) -> None:
    block = Block(0, np.array([0, 1]), np.array([1], np.int32), np.array([5]), np.array([1], np.uint8))
    store = store_of(ROWS, tmp_path / "s", 99)
    facts = dataclasses.replace(store.facts, num_users=2, num_events=2)
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(InputError, match=r"records must hold 2 users and 2 events\. Received: 1 and 1"):
        pack(folder, facts, [block])
    expected = rf"{folder}: records must hold all users in order\. Received: user 0 where user 1 must stand\. Give"
    with pytest.raises(InputError, match=expected):
        pack(folder, facts, [block, block])
    assert list(folder.iterdir()) == []  # nothing half-written


def test_packing_again_after_being_killed(tmp_path: Path) -> None:
    store = store_of(ROWS, tmp_path / "s", 99)
    (store.folder / "packed").rename(store.folder / "packed.incomplete")
    (store.folder / "packed.incomplete" / "junk").touch()
    log = read_log([store.folder / "log.parquet"], Columns())
    pack(store.folder, store.facts, log.blocks)
    assert not (store.folder / "packed.incomplete").exists()
    assert not (store.folder / "packed" / "junk").exists()
