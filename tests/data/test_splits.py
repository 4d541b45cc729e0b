"""Which event trains, validates and tests, against a slow reading of the rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from din_dist.config import DataConfig, Split, UnknownItem
from din_dist.data.checksums import write_checksums
from din_dist.data.event_store import EventStore
from din_dist.data.popularity import popularity
from din_dist.data.prepared import prepare
from din_dist.data.splits import Examples, item_counts, split_examples
from din_dist.data.trained_items import trained_items
from din_dist.errors import InputError
from din_dist.features.spec import FeatureSpec, Kind, Owner, to_text
from tests.support.small_log import small_config, write_log


def expected_events(store: EventStore, split: Split, cuts: tuple[int, int]) -> dict[str, list[int]]:
    """The rules of din_dist/data/README.md ("Splits"), one event at a time."""
    found: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    found |= {"history": []} if split is Split.USERS else {}
    for user in range(store.facts.num_users):
        begin, end = store.user_offsets[user : user + 2]
        side = side_of(store.vocabulary("users")[user].as_py())
        for event in range(begin, end):
            from_end = end - event
            is_first = event == begin and not store.facts.has_labels
            if split is Split.USERS and side != "train":
                is_late = event - begin >= int(0.8 * (end - begin))
                found[side if is_late and not is_first else "history"].append(event)
                continue
            if is_first:
                continue
            if split is Split.USERS:
                name = "train"
            elif split is Split.TEMPORAL:
                time = store.timestamps[event]
                name = "test" if time >= cuts[1] else "validation" if time >= cuts[0] else "train"
            elif from_end == 1:
                name = "test"
            elif from_end == 2 and split is Split.LEAVE_TWO_OUT:
                name = "validation"
            else:
                name = "train"
            found[name].append(event)
    return found


def side_of(user: str) -> str:
    """FarmHash of the text, by TensorFlow's own operation."""
    return [*["train"] * 8, "validation", "test"][int(tf.strings.to_hash_bucket_fast(f"split:{user}", 10))]


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("split", list(Split))
def test_splits_follow_the_rules(tmp_path: Path, split: Split, labels: bool) -> None:
    cuts = {"validation_from": 10, "test_from": 15} if split is Split.TEMPORAL else {}
    config = small_config(tmp_path, labels=labels, split=split, negatives_per_positive=3, **cuts).data
    store = prepare(config)
    for _ in range(2):  # made, then read from the cache
        splits = split_examples(store, config)
        expected = expected_events(store, split, (10, 15))
        assert {name: examples.events().tolist() for name, examples in splits.items()} == expected
        for name, examples in splits.items():
            draws = 1 if labels or name == "history" else 4 if name == "train" else 2
            assert examples.num_examples == draws * len(expected[name])
            users = np.searchsorted(store.user_offsets, expected[name], side="right") - 1
            assert examples.user_of_example().tolist() == np.repeat(users, draws).tolist()


def save(file: Path, values: np.ndarray) -> None:
    """Another array, with its checksum: as a fault of ours would."""
    np.save(file, values)
    write_checksums(file.parent)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-3]), "cannot be read"),
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (lambda file: save(file, np.load(file)[:-1]), "Received: arrays of different lengths"),
        (lambda file: save(file, np.load(file) + 1), "the splits must hold"),
    ],
    ids=["missing", "cut", "empty", "shorter", "of other data"],
)
def test_a_kept_cut_that_is_damaged(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    config = small_config(tmp_path, split=Split.LEAVE_TWO_OUT).data
    store = prepare(config)
    split_examples(store, config)
    damage(store.folder / "packed" / "split-leave_two_out" / "train-row_ends.npy")
    with pytest.raises(InputError, match=message) as refused:
        split_examples(store, config)
    assert "Delete " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_kept_cut_that_changes_under_a_job(tmp_path: Path) -> None:
    config = small_config(tmp_path, split=Split.LEAVE_TWO_OUT).data
    store = prepare(config)
    split_examples(store, config)
    file = store.folder / "packed" / "split-leave_two_out" / "train-users.npy"
    store.check_unchanged()
    file.write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="this file was written to"):
        store.check_unchanged()


@pytest.mark.parametrize("unknown_item", UnknownItem)
def test_processes_that_cut_at_once_keep_the_files_of_the_first(tmp_path: Path, unknown_item: UnknownItem) -> None:
    """Ranks begin together: one finds nothing, and publishes when the other has opened its own files already."""
    config = small_config(tmp_path, split=Split.LEAVE_TWO_OUT, unknown_item=unknown_item, negatives="batch").data

    def cut(store: EventStore) -> None:
        splits = split_examples(store, config)
        trained = trained_items(store, config, splits)
        popularity(store, config, splits, trained)

    store, late = prepare(config), prepare(config)
    cut(store)
    opened = [path for path in store.files if path.parent.parent.name == "packed"]
    assert len({path.parent.name for path in opened}) == (3 if unknown_item is UnknownItem.FEATURES else 2)
    with mock.patch.object(Path, "is_dir", lambda path: False):
        cut(late)
    store.check_unchanged()


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("split", [Split.LEAVE_TWO_OUT, Split.USERS])
def test_item_counts_leave_out_what_is_held_out(tmp_path: Path, split: Split, labels: bool) -> None:
    config = small_config(tmp_path, labels=labels, split=split).data
    store = prepare(config)
    splits = split_examples(store, config)
    held_out = np.concatenate([splits["validation"].events(), splits["test"].events()])
    if split is Split.USERS:  # all events of those users, also of one who has a single event and no example
        sides = [side_of(user.as_py()) for user in store.vocabulary("users")]
        users = np.repeat(np.arange(store.facts.num_users), np.diff(store.user_offsets))
        held_out = np.flatnonzero(np.array(sides)[users] != "train")
    counts = np.zeros(store.facts.num_items + 1, int)
    for event in range(store.facts.num_events):
        if event not in held_out and (store.labels is None or store.labels[event]):
            counts[store.item_ids[event]] += 1
    assert item_counts(store, splits).tolist() == counts.tolist()


def sides_by_own_id(folder: Path, table: pa.Table) -> dict[object, tuple[list, ...]]:
    """The items of each user's events in each split, by the user's own id."""
    folder.mkdir()
    pq.write_table(table, folder / "log.parquet")
    config = small_config(folder, split=Split.USERS).data
    store = prepare(config)
    items = store.vocabulary("items").to_pylist()
    found: dict = {user: ([], [], [], []) for user in store.vocabulary("users").to_pylist()}
    for place, examples in enumerate(split_examples(store, config).values()):
        for event in examples.events():
            user = int(np.searchsorted(store.user_offsets, event, side="right")) - 1
            found[store.vocabulary("users")[user].as_py()][place].append(items[store.item_ids[event] - 1])
    return found


def test_a_user_stays_in_a_split_whoever_else_is_there(tmp_path: Path) -> None:
    """The order of the file, and users beside them, change no user's split."""
    write_log(tmp_path / "log.parquet", num_users=60)
    table = pq.read_table(tmp_path / "log.parquet").sort_by("timestamp")
    random = np.random.default_rng(0)
    rows = {"user_id": random.permutation(np.arange(3000) % 1000), "item_id": np.arange(3000) % 30}
    others = pa.table(
        {
            "user_id": pa.array([f"new{user}" for user in rows["user_id"]]),
            "item_id": pa.array([f"i{item}" for item in rows["item_id"]]),
            "category_id": pa.array([f"c{item % 5}" for item in rows["item_id"]]),
            "timestamp": pa.array(np.arange(3000)),
        }
    )
    reordered = table.take(pa.array(np.argsort(-table["timestamp"].to_numpy(), kind="stable")))
    alone, turned, among = (
        sides_by_own_id(tmp_path / name, given)
        for name, given in {
            "alone": table,
            "turned": reordered,
            "among": pa.concat_tables([others, table]),
        }.items()
    )
    assert {user: [*map(sorted, of_user)] for user, of_user in turned.items()} == {
        user: [*map(sorted, of_user)] for user, of_user in alone.items()
    }
    assert {user: among[user] for user in alone} == alone
    sizes = np.array([[bool(part) for part in of_user] for of_user in among.values()]).sum(axis=0)
    num_users = len(among)
    # Each share has three standard deviations of room.
    for size, share in zip(sizes[:3], (0.8, 0.1, 0.1), strict=True):
        assert abs(size - share * num_users) < 3 * np.sqrt(num_users * share * (1 - share))


def test_a_user_of_an_integer_or_a_text_is_in_one_split(tmp_path: Path) -> None:
    users = np.repeat(np.arange(200), 5)
    columns = {"item_id": pa.array(np.arange(1000) % 30), "timestamp": pa.array(np.arange(1000))}
    integers, texts = (
        sides_by_own_id(tmp_path / name, pa.table({"user_id": pa.array(ids), **columns}))
        for name, ids in (("integers", users), ("texts", users.astype(str)))
    )
    assert {str(user): of_user for user, of_user in integers.items()} == texts


@pytest.mark.parametrize("labels", [False, True])
def test_users_who_do_not_train_leave_no_trace(tmp_path: Path, labels: bool) -> None:
    """What training sees, counts and encodes is the same whatever those users did."""
    write_log(tmp_path / "log.parquet", labels=labels)
    table = pq.read_table(tmp_path / "log.parquet")
    trains = pa.array([side_of(user) == "train" for user in table["user_id"].to_pylist()])
    assert 0 < trains.true_count < len(trains)
    changed = [
        name if stays else f"i{place % 30}"
        for place, (name, stays) in enumerate(zip(table["item_id"].to_pylist(), trains.to_pylist(), strict=True))
    ]
    category = pa.array([f"c{int(name[1:]) % 5}" for name in changed])
    columns = dict(zip(table.column_names, table.columns, strict=True))
    price = np.arange(len(table), dtype=np.float64)
    table = pa.table({**columns, "price": price})
    price = np.where(trains.to_numpy(zero_copy_only=False), price, 1e6)
    other = pa.table({**columns, "item_id": changed, "category_id": category, "price": price})
    assert other["item_id"] != table["item_id"]
    declared = to_text((FeatureSpec("price", Owner.CONTEXT, Kind.NUMBER, "price"),))
    found = []
    for name, given in (("first", table), ("second", other)):
        (tmp_path / name).mkdir()
        pq.write_table(given, tmp_path / name / "log.parquet")
        config = small_config(
            tmp_path / name, split=Split.USERS, unknown_item=UnknownItem.FEATURES, feature_declarations=declared
        ).data
        store = prepare(config)
        splits = split_examples(store, config)
        items = store.vocabulary("items").to_pylist()
        trained = trained_items(store, config, splits)
        assert trained is not None
        counts = dict(zip(items, item_counts(store, splits)[1:].tolist(), strict=True))
        seen = {item for item, occurs in zip(items, trained.occur[1:], strict=True) if occurs}
        encoding = store.features["price"].encoding
        assert encoding.deviation > 1
        found.append((counts, seen, encoding.mean, encoding.deviation))
    assert found[0] == found[1]


def test_a_cut_in_time_defaults_to_the_last_fifth(tmp_path: Path) -> None:
    config = small_config(tmp_path, split=Split.TEMPORAL).data
    store = prepare(config)
    validation, test = np.quantile(store.timestamps, [0.8, 0.9], method="higher")
    events = {name: examples.events() for name, examples in split_examples(store, config).items()}
    assert (store.timestamps[events["train"]] < validation).all()
    assert (store.timestamps[events["test"]] >= test).all()
    assert len(events["validation"])
    assert len(events["test"])


def test_arrays_are_mapped_and_take_12_bytes_a_user(tmp_path: Path) -> None:
    config = small_config(tmp_path).data
    examples = split_examples(prepare(config), config)["train"]
    arrays = [examples.users, examples.row_ends, examples.event_bases]
    assert all(isinstance(array, np.memmap) for array in arrays)
    assert sum(array.nbytes for array in arrays) == 12 * len(examples.users)


def test_nothing_to_train_on_is_one_clear_line(tmp_path: Path) -> None:
    write_log(tmp_path / "log.parquet", num_users=4)
    config = small_config(tmp_path, split=Split.TEMPORAL, validation_from=-5, test_from=-4).data
    with pytest.raises(InputError, match=r"--split=temporal: there must be events to train on. Received: none"):
        split_examples(prepare(config), config)


def test_a_user_who_touched_everything_is_one_clear_line(tmp_path: Path) -> None:
    write_log(tmp_path / "log.parquet", num_items=1)
    config = small_config(tmp_path).data
    with pytest.raises(InputError, match=r"never touched. Received: user 'u\d+', who touched all 1 items"):
        split_examples(prepare(config), config)


def test_cut_times_in_the_wrong_order_are_one_clear_line(tmp_path: Path) -> None:
    config = small_config(tmp_path, split=Split.TEMPORAL, test_from=2).data
    with pytest.raises(InputError, match="--validation_from: must not be later than --test_from"):
        split_examples(prepare(config), config)
    with pytest.raises(InputError, match="--validation_from: must not be later than --test_from. Received: 6"):
        DataConfig(split=Split.TEMPORAL, validation_from=6, test_from=5)


def test_equal_cut_times_leave_nothing_to_validate(tmp_path: Path) -> None:
    config = small_config(tmp_path, split=Split.TEMPORAL, validation_from=9, test_from=9).data
    store = prepare(config)
    splits = split_examples(store, config)
    assert splits["validation"].num_rows == 0
    for name, is_late in (("train", False), ("test", True)):
        assert splits[name].num_rows > 0
        assert ((store.timestamps[splits[name].events()] >= 9) == is_late).all()


def test_many_users_need_no_more_than_int32() -> None:
    """The event index is computed in 64 bits from the 32-bit arrays."""
    examples = Examples(np.array([0, 1], np.int32), np.array([2, 3], np.int32), np.array([2**31 - 3, 5], np.int32), 1)
    assert examples.events().tolist() == [2**31 - 3, 2**31 - 2, 7]
