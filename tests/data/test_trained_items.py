"""Which items training sees, and what negatives are drawn from, against hand-made logs and a slow reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.config import DataConfig, UnknownItem
from din_dist.data import trained_items as module
from din_dist.data import walks
from din_dist.data.checksums import write_checksums
from din_dist.data.event_store import ITEMS, EventStore
from din_dist.data.prepared import prepare
from din_dist.data.splits import split_examples
from din_dist.data.trained_items import TrainedItems, trained_items
from din_dist.errors import InputError
from tests.support.small_log import small_config, write_log

# The last of each is tested; without labels the first is no example, and user 3 and 4 train on nothing.
HISTORIES = ["abc", "abd", "fgh", "ie", "j"]


def write(folder: Path, histories: list[str], labels: str | None = None, category: str | None = "c") -> DataConfig:
    rows = [
        {"user_id": user, "item_id": item, "timestamp": time, "category_id": category}
        for user, items in enumerate(histories)
        for time, item in enumerate(items)
    ]
    table = pa.Table.from_pylist(rows)
    if labels is not None:
        table = table.append_column("label", pa.array([int(label) for label in labels]))
    if category is None:
        table = table.drop_columns("category_id")
    pq.write_table(table, folder / "log.parquet")
    return small_config(folder, unknown_item=UnknownItem.FEATURES).data


def find(config: DataConfig) -> tuple[EventStore, TrainedItems]:
    store = prepare(config)
    found = trained_items(store, config, split_examples(store, config))
    assert found
    return store, found


def names(store: EventStore, occur: np.ndarray) -> str:
    return "".join(sorted(store.own_ids(ITEMS, np.flatnonzero(occur))))


def test_items_of_training_examples_and_their_histories_by_hand(tmp_path: Path) -> None:
    """Not c, d and h, which are tested only; nor i, the history of a tested event; nor j, which is no example."""
    store, found = find(write(tmp_path, HISTORIES))
    assert names(store, found.occur) == "abfg"
    rows = found.row_of_item
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, np.where(found.occur, np.arange(len(rows)), 0))
    assert names(store, np.isin(np.arange(len(rows)), found.ids[1:])) == "abfg"
    assert found.ids[0] == 0
    assert found.max_touched == 2


def test_with_labels_an_item_that_was_only_passed_over_was_seen_too(tmp_path: Path) -> None:
    """Every event but the last of each user trains, and what was shown without a click has taught its row."""
    store, found = find(write(tmp_path, ["abc", "ad", "e"], labels="101111"))
    assert names(store, found.occur) == "ab"
    assert found.touched_offsets is None
    assert found.touched_gaps is None


@pytest.mark.parametrize("chunk", [10_000_000, 7])
def test_what_users_touched_of_these_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """From the gaps of each user, the numbers of the items they touched, whatever is read at once."""
    monkeypatch.setattr(walks, "EVENTS_AT_ONCE", chunk)
    write_log(tmp_path / "log.parquet", num_items=1000)
    store, found = find(small_config(tmp_path, unknown_item=UnknownItem.FEATURES).data)
    assert 100 < len(found.ids) < len(found.occur) - 20
    assert found.touched_offsets is not None
    assert found.touched_gaps is not None
    for user in range(store.facts.num_users):
        items = set(store.item_ids[store.user_offsets[user] : store.user_offsets[user + 1]].tolist())
        gaps = found.touched_gaps[found.touched_offsets[user] : found.touched_offsets[user + 1]]
        numbers = gaps + 1 + np.arange(len(gaps))
        assert found.ids[numbers].tolist() == sorted(item for item in items if found.occur[item])


def test_it_is_found_once_and_mapped_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, HISTORIES)
    store, found = find(config)
    monkeypatch.setattr(module, "occurring_items", lambda *_: pytest.fail("found again"))
    _, again = find(config)
    for name in ("occur", "touched_offsets", "touched_gaps"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    (kept,) = store.folder.glob("packed/trained-leave_one_out")
    np.save(kept / "trained-occur.npy", found.occur[:-1])
    write_checksums(kept)
    with pytest.raises(InputError, match=rf"{kept}: the arrays must be those of 10 items and 5 users. Received: len"):
        find(config)


def test_nothing_to_find_where_all_items_have_their_own_rows(tmp_path: Path) -> None:
    write(tmp_path, HISTORIES)
    config = small_config(tmp_path).data
    store = prepare(config)
    assert trained_items(store, config, split_examples(store, config)) is None
    assert not list(store.folder.glob("packed/trained-*"))


def test_a_user_who_leaves_nothing_to_draw(tmp_path: Path) -> None:
    """b and c are left of all items, but not of those that training sees."""
    with pytest.raises(InputError, match="user 0, who touched all 2 items of the training events. Remove that user"):
        find(write(tmp_path, ["xyx", "b", "c"]))


def test_items_without_features(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="--unknown_item: needs features that tell of an item. Received: 'features'. Name their"
    ):
        find(write(tmp_path, HISTORIES, category=None))
