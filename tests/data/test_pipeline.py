"""Packed batches against a slow reading of the rules, and every example exactly once."""

from __future__ import annotations

import dataclasses
import re
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

from din_dist import kernels
from din_dist.config import DataConfig, UnknownItem
from din_dist.data.event_store import EventStore
from din_dist.data.pipeline import (
    BatchMaker,
    Shard,
    batch_signature,
    evaluation_batches,
    num_steps_per_epoch,
    read_ahead,
    share,
    training_batches,
)
from din_dist.data.prepared import prepare
from din_dist.data.splits import Examples, split_examples
from din_dist.data.trained_items import trained_items
from din_dist.execution import Execution
from din_dist.features.encoding import Lists, StoredFeature
from din_dist.features.gathering import without_copying
from din_dist.features.spec import Owner
from din_dist.schema import Batch
from tests.support.featured_store import with_features
from tests.support.owners import OWNERS
from tests.support.small_log import small_config, write_log


@pytest.fixture(params=[False, True], ids=["no_labels", "labels"])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[DataConfig, EventStore, dict[str, Examples]]:
    config = small_config(tmp_path, labels=request.param, negatives_per_positive=2).data
    store = prepare(config)
    return config, store, split_examples(store, config)


def train(
    prepared,
    *,
    world_size: int = 1,
    rank: int = 0,
    steps: tuple[int, int],
    batch: int = 50,
    seed: int = 7,
    native: bool = False,
):
    config, store, splits = prepared
    maker = BatchMaker.for_training(
        store, splits["train"], config, seed, trained_items(store, config, splits), Execution(kernels=native)
    )
    return training_batches(
        maker, config, global_batch_size=batch, steps=range(*steps), shard=Shard(rank, world_size)
    ).as_numpy_iterator()


def test_batches_hold_what_the_rules_say(prepared) -> None:
    config, store, splits = prepared
    examples = splits["train"]
    events = examples.events()
    for batch in train(prepared, steps=(0, num_steps_per_epoch(examples.num_examples, 50))):
        ends = np.cumsum(batch.history_lengths)
        histories = np.split(batch.history_item_ids, ends[:-1])
        for place, example in enumerate(batch.example_ids):
            row, draw = divmod(int(example), examples.draws_per_row)
            event = events[row]
            user = np.searchsorted(store.user_offsets, event, side="right") - 1
            before = np.arange(store.user_offsets[user], event)
            if store.labels is not None:
                before = before[store.labels[before] == 1]
                assert batch.labels[place] == store.labels[event]
            else:
                assert batch.labels[place] == (draw == 0)
            expected = store.item_ids[before][-config.max_history_length :]
            assert histories[place].tolist() == expected.tolist()
            candidate = batch.candidate_item_ids[place]
            touched = store.item_ids[store.user_offsets[user] : store.user_offsets[user + 1]]
            if store.labels is None and draw:
                assert 1 <= candidate <= store.facts.num_items
                assert candidate not in touched
            else:
                assert candidate == store.item_ids[event]


@pytest.mark.parametrize("native", [False, True])
def test_ids_are_hidden_only_when_asked(prepared, native: bool) -> None:
    """To the bit what it was before they could be: the numbers were taken from the code before."""
    checksum = 0
    for batch in train(prepared, steps=(0, 12), native=native):
        for values in (batch.candidate_item_ids, batch.history_item_ids, batch.distinct_item_ids, batch.item_index):
            checksum = zlib.crc32(values.astype("<i4").tobytes(), checksum)
    assert checksum == (3133498422 if prepared[1].labels is None else 1969495897)


RATE = 0.3


@pytest.fixture(params=[False, True], ids=["no_labels", "labels"])
def hiding(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[DataConfig, EventStore, dict[str, Examples]]:
    """As `prepared`, with some of the items never in training."""
    write_log(tmp_path / "log.parquet", num_items=1000, labels=request.param)
    settings = {"unknown_item": UnknownItem.FEATURES, "unknown_item_rate": RATE, "negatives_per_positive": 2}
    config = small_config(tmp_path, **settings).data
    store = prepare(config)
    return config, store, split_examples(store, config)


def test_a_share_of_the_ids_is_hidden_by_example_and_item(hiding) -> None:
    """Of candidates and positions alike; within an example the same item is hidden everywhere or nowhere."""
    config, store, splits = hiding
    trained = trained_items(store, config, splits)
    examples = splits["train"]
    assert trained
    assert (~trained.occur[1:]).sum() > 20
    per_epoch = num_steps_per_epoch(examples.num_examples, 50)
    hidden: list[dict[tuple[int, int], bool]] = [{}, {}]
    shares = {"candidates": [], "positions": []}
    for epoch in range(2):
        for batch in train(hiding, steps=(epoch * per_epoch, (epoch + 1) * per_epoch)):
            candidates = batch.candidate_item_ids
            shares["candidates"] += (candidates < 0).tolist()
            shares["positions"] += (batch.history_item_ids < 0).tolist()
            for example, candidate, label, _, history in examples_of(batch):
                for item in {candidate, *history}:
                    assert hidden[epoch].setdefault((example, abs(item)), item < 0) == (item < 0)
                row = example // examples.draws_per_row
                event = examples.events(row, row + 1)[0]
                user = np.searchsorted(store.user_offsets, event, side="right") - 1
                touched = store.item_ids[store.user_offsets[user] : store.user_offsets[user + 1]]
                assert trained.occur[abs(candidate)]
                if store.labels is None and not label:
                    assert abs(candidate) not in touched
                else:
                    assert abs(candidate) == store.item_ids[event]
    for name, found in shares.items():
        assert np.mean(found) == pytest.approx(RATE, abs=5 * (RATE / len(found)) ** 0.5), name
    both = hidden[0].keys() & hidden[1].keys()
    same = np.mean([hidden[0][place] == hidden[1][place] for place in both])
    assert same == pytest.approx(RATE**2 + (1 - RATE) ** 2, abs=0.05)  # each epoch hides others


def test_ranks_hide_the_same_ids(hiding) -> None:
    whole = list(train(hiding, steps=(3, 6)))
    parts = [next(train(hiding, world_size=3, rank=rank, steps=(5, 6))) for rank in range(3)]
    assert [example for part in parts for example in examples_of(part)] == examples_of(whole[2])


@pytest.mark.parametrize("rank", range(3))
def test_kernels_make_the_same_batches(hiding, rank: int) -> None:
    """With hidden ids; of a rank of three, also of a batch that leaves it nothing."""
    config, store, splits = hiding
    grouped = dataclasses.replace(config, group_negatives=store.labels is None), store, splits
    asked = {"world_size": 3, "rank": rank, "batch": 57, "steps": (0, splits["train"].num_examples // 57 + 1)}
    for theirs, ours in zip(train(grouped, **asked), train(grouped, native=True, **asked), strict=True):
        assert ours.features == theirs.features == ()
        assert ours.extras == theirs.extras == ()
        for name, own, values in zip(Batch._fields, ours, theirs, strict=True):
            if isinstance(own, tuple):
                continue
            assert values.dtype == own.dtype
            np.testing.assert_array_equal(own, values, err_msg=name)
    empty = {**asked, "batch": 2, "steps": (0, 3)}
    assert [[*map(len, batch)] for batch in train(grouped, native=True, **empty)] == [
        [*map(len, batch)] for batch in train(grouped, **empty)
    ]


def test_evaluation_hides_nothing_and_takes_negatives_of_all_items(hiding) -> None:
    config, store, splits = hiding
    trained = trained_items(store, config, splits)
    assert trained
    (batch,) = evaluation_batches(store, splits["test"], config, seed=7, batch_size=9999).as_numpy_iterator()
    assert batch.distinct_item_ids.min() > 0
    candidates = batch.candidate_item_ids.reshape(-1, splits["test"].draws_per_row)
    assert not trained.occur[candidates[:, -1]].all()


def test_training_batches_must_be_given_the_trained_items(hiding) -> None:
    config, store, splits = hiding
    with pytest.raises(ValueError, match="trained: must be as unknown_item=features says. Received: None"):
        BatchMaker.for_training(store, splits["train"], config, seed=1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_example_exactly_once_an_epoch(prepared, world_size: int) -> None:
    num_examples = prepared[2]["train"].num_examples
    per_epoch = num_steps_per_epoch(num_examples, 50)
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for rank in range(world_size):
            steps = (epoch * per_epoch, (epoch + 1) * per_epoch)
            for batch in train(prepared, world_size=world_size, rank=rank, steps=steps):
                seen.update(batch.example_ids.tolist())
        assert seen == Counter(range(num_examples))


def test_ranks_divide_the_same_global_batch_and_resume_anywhere(prepared) -> None:
    """Step by step, the ranks' shares end to end are the one worker's batch; starting later changes nothing."""
    whole = list(train(prepared, steps=(0, 12)))
    parts = [list(train(prepared, world_size=3, rank=rank, steps=(5, 12))) for rank in range(3)]
    for step, batch in enumerate(whole[5:]):
        assert [example for part in parts for example in examples_of(part[step])] == examples_of(batch)


def examples_of(batch: dict[str, np.ndarray]) -> list[tuple]:
    """All that a batch says of each of its examples, with each item by way of the batch's distinct ones."""
    items = np.concatenate([batch.candidate_item_ids, batch.history_item_ids])
    distinct = batch.distinct_item_ids
    assert len(np.unique(distinct)) == len(distinct)
    np.testing.assert_array_equal(distinct[batch.item_index], items)
    histories = np.split(batch.history_item_ids, np.cumsum(batch.history_lengths)[:-1])
    columns = (batch.example_ids, batch.candidate_item_ids, batch.labels, batch.dropout_seeds)
    return list(zip(*(column.tolist() for column in columns), map(tuple, histories), strict=True))


def test_order_differs_by_epoch_and_seed_and_is_not_the_logs(prepared) -> None:
    per_epoch = num_steps_per_epoch(prepared[2]["train"].num_examples, 50)

    def order(epoch: int, seed: int = 7) -> list[int]:
        batches = train(prepared, steps=(epoch * per_epoch, (epoch + 1) * per_epoch), seed=seed)
        return np.concatenate([batch.example_ids for batch in batches]).tolist()

    orders = [order(0), order(1), order(0, seed=8), sorted(order(0))]
    assert order(0) == orders[0]
    assert all(one != other for place, one in enumerate(orders) for other in orders[:place])


def test_the_last_batch_may_leave_ranks_without_examples(prepared) -> None:
    num_examples = prepared[2]["train"].num_examples
    batch_size = num_examples - 1  # the last batch has one example
    sizes = [
        [len(batch.labels) for batch in train(prepared, world_size=3, rank=rank, steps=(0, 2), batch=batch_size)]
        for rank in range(3)
    ]
    assert np.sum(sizes, axis=0).tolist() == [batch_size, 1]
    assert sorted(last for _, last in sizes) == [0, 0, 1]


@pytest.mark.parametrize("resample", [False, True])
def test_negatives_are_redrawn_each_epoch_only_when_asked(tmp_path: Path, resample: bool) -> None:
    config = small_config(tmp_path, resample_negatives=resample).data
    store = prepare(config)
    prepared = config, store, split_examples(store, config)
    per_epoch = num_steps_per_epoch(prepared[2]["train"].num_examples, 50)

    def negatives(epoch: int) -> dict[int, int]:
        batches = train(prepared, steps=(epoch * per_epoch, (epoch + 1) * per_epoch))
        pairs = [zip(b.example_ids, b.candidate_item_ids, b.labels, strict=True) for b in batches]
        return {int(example): int(item) for batch in pairs for example, item, label in batch if not label}

    first, second = negatives(0), negatives(1)
    same = np.mean([first[example] == item for example, item in second.items()])
    assert same == 1 if not resample else same < 0.3


@pytest.mark.parametrize("group", [False, True])
def test_an_event_and_its_negatives_are_neighbours_only_when_asked(tmp_path: Path, group: bool) -> None:
    """Through the ranks and batches, whose sizes split groups of four; events come in another order each epoch."""
    config = small_config(tmp_path, negatives_per_positive=3, group_negatives=group).data
    store = prepare(config)
    prepared = config, store, split_examples(store, config)
    num_examples = prepared[2]["train"].num_examples
    per_epoch = num_steps_per_epoch(num_examples, 50)

    def order(epoch: int) -> list[int]:
        steps = (epoch * per_epoch, (epoch + 1) * per_epoch)
        ranks = [train(prepared, world_size=3, rank=rank, steps=steps) for rank in range(3)]
        return [int(e) for step in zip(*ranks, strict=True) for share in step for e in share.example_ids]

    first, second = order(0), order(1)
    assert sorted(first) == sorted(second) == list(range(num_examples))
    events = np.array(first).reshape(-1, 4) // 4
    assert (events == events[:, :1]).all() == group
    assert first != second
    if group:
        assert np.array(first).reshape(-1, 4).tolist() == [[4 * e + draw for draw in range(4)] for e in events[:, 0]]
        assert (np.diff(events[:, 0]) == 1).mean() < 0.1


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("world_size", [2, 11])
def test_ranks_share_positions_as_well_as_examples(tmp_path: Path, world_size: int, labels: bool) -> None:
    """Grouped, the batch of an update stays what one worker has; 11 ranks are more than deal among themselves."""
    config = small_config(tmp_path, labels=labels, negatives_per_positive=3, group_negatives=True).data
    store = prepare(config)
    prepared = config, store, split_examples(store, config)
    batch_size = 40 * world_size + 3
    asked = {"batch": batch_size, "steps": (0, prepared[2]["train"].num_examples // batch_size + 1)}
    whole = list(train(prepared, **asked))
    shares = [list(train(prepared, world_size=world_size, rank=rank, **asked)) for rank in range(world_size)]
    assert len(whole) > 1
    for update, of_ranks in zip(whole, zip(*shares, strict=True), strict=True):
        ids = np.concatenate([batch.example_ids for batch in of_ranks])
        assert sorted(ids) == sorted(update.example_ids)
        sizes = [len(batch.example_ids) for batch in of_ranks]
        assert sizes == [e - b for b, e in (share(len(ids), rank, world_size) for rank in range(world_size))]
    first = next(zip(*shares, strict=True))[:8]  # of a whole batch, those that deal
    lengths = np.array([len(batch.history_item_ids) for batch in first])
    as_they_come = whole[0].history_lengths[: share(batch_size, len(first) - 1, world_size)[1]]
    expected = np.array([part.sum() for part in np.array_split(as_they_come, len(first))])
    assert lengths.std() < expected.std() / 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_takes_each_example_once_in_order(prepared, world_size: int) -> None:
    config, store, splits = prepared
    ids, candidates = [], []
    for rank in range(world_size):
        for batch in evaluation_batches(
            store, splits["test"], config, seed=7, batch_size=16, shard=Shard(rank, world_size)
        ).as_numpy_iterator():
            ids += batch.example_ids.tolist()
            candidates += batch.candidate_item_ids.tolist()
    assert ids == list(range(splits["test"].num_examples))
    draws = splits["test"].draws_per_row
    assert candidates[::draws] == store.item_ids[splits["test"].events()].tolist()


def test_shares_cover_everything_and_differ_by_one() -> None:
    for total in range(20):
        runs = [share(total, index, 6) for index in range(6)]
        assert [place for first, end in runs for place in range(first, end)] == list(range(total))
        sizes = [end - first for first, end in runs]
        assert max(sizes) - min(sizes) <= 1


def test_functions_of_batches_are_traced_as_they_are(prepared) -> None:
    """Converting them to what may branch on tensors would take seconds of each start."""
    config, store, splits = prepared
    known = set(sys.modules)
    next(train(prepared, steps=(0, 1)))
    next(iter(evaluation_batches(store, splits["test"], config, seed=1, batch_size=8)))
    assert not [name for name in sys.modules.keys() - known if name.startswith("__autograph")]


def test_batches_have_the_declared_signature(prepared) -> None:
    config, store, splits = prepared
    maker = BatchMaker.for_training(store, splits["train"], config, seed=1)
    dataset = training_batches(maker, config, global_batch_size=8, steps=range(1))
    assert dataset.element_spec == batch_signature()


@pytest.mark.parametrize("native", [False, True])
def test_batches_carry_the_features_of_their_examples(prepared, native: bool) -> None:
    """Those of users by the user, the others by the event, list by list; those of items stay where they are."""
    config, plain, splits = prepared
    store = with_features(plain, OWNERS)
    maker = BatchMaker.for_training(store, splits["train"], config, 1, execution=Execution(kernels=native))
    dataset = training_batches(maker, config, global_batch_size=16, steps=range(2))
    encodings = [feature.encoding for feature in store.features.values()]
    assert dataset.element_spec == batch_signature(encodings)
    without = BatchMaker.for_training(plain, splits["train"], config, 1, execution=Execution(kernels=native))
    others = training_batches(without, config, global_batch_size=16, steps=range(2))
    for batch, other in zip(dataset, others, strict=True):
        assert not other.features
        for found, expected in zip(batch[:-1], other[:-1], strict=True):
            assert_array_equal(found, expected)
        row = batch.example_ids.numpy() // splits["train"].draws_per_row
        rows = {Owner.USER: splits["train"].user_of_example()[batch.example_ids], Owner.ITEM: None}
        rows[Owner.CONTEXT] = rows[Owner.CANDIDATE] = splits["train"].events()[row]
        names = {name for name, feature in store.features.items() if feature.encoding.spec.owner is not Owner.ITEM}
        assert set(batch.features) == names
        for name in names:
            check_values(store.features[name], rows[store.features[name].encoding.spec.owner], batch.features[name])


def check_values(stored: StoredFeature, rows: np.ndarray, found: object) -> None:
    """Asserts that `found` are the values of `rows`, in their type."""
    if not isinstance(found, Lists):
        assert_array_equal(found, stored.values[rows])
        assert found.dtype == stored.values.dtype
        return
    places = [np.arange(stored.offsets[row], stored.offsets[row + 1]) for row in rows]
    assert_array_equal(found.lengths, [len(each) for each in places])
    assert_array_equal(found.values, stored.values[np.concatenate(places)])
    assert_array_equal(found.weights, [] if stored.weights is None else stored.weights[np.concatenate(places)])


def test_features_are_not_copied(tmp_path: Path) -> None:
    array = np.zeros(4096, np.float16)
    start = -array.ctypes.data % 64 // 2
    aligned = array[start : start + 1024]
    tensor = without_copying(aligned)
    aligned[3] = 5
    assert tensor[3] == 5


def test_mapped_arrays_are_not_copied(tmp_path: Path) -> None:
    """Private memory grows by less than the events' own size when a pipeline over them runs."""
    small = small_config(tmp_path).data
    small_store = prepare(small)
    config = small_config(
        tmp_path, dataset="synthetic", data_path="", synthetic_num_users=60_000, synthetic_events_per_user=100
    ).data
    store = prepare(config)
    splits = split_examples(store, config)
    assert store.item_ids.nbytes > 20_000_000

    def private_bytes() -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    list(train((small, small_store, split_examples(small_store, small)), steps=(0, 1)))  # the pipeline's own machinery
    before = private_bytes()
    batches = train((config, store, splits), steps=(0, 20))
    next(batches)
    grown = private_bytes() - before
    assert grown < store.item_ids.nbytes / 2


def test_reading_ahead_gives_the_same_and_is_one_ahead() -> None:
    asked = [threading.Event() for _ in range(4)]

    def batches() -> Iterator[dict[str, int]]:
        for place, event in enumerate(asked[:3]):
            event.set()
            yield {"place": place}
        asked[3].set()

    seen = []
    for batch in read_ahead(batches()):
        assert asked[batch["place"] + 1].wait(10)  # the next one is being fetched while this one is at work
        seen.append(batch["place"])
    assert seen == [0, 1, 2]


def test_reading_ahead_hands_on_what_fails() -> None:
    def batches() -> Iterator[dict[str, int]]:
        yield {}
        raise OSError("truncated")

    ahead = read_ahead(batches())
    next(ahead)
    with pytest.raises(OSError, match="truncated"):
        next(ahead)


def test_reading_ahead_ends_with_its_reader() -> None:
    before = threading.active_count()
    ahead = read_ahead(iter([{}, {}, {}]))
    next(ahead)
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before


def test_wrong_calls_of_the_kernels_are_refused() -> None:
    ops = kernels.library()

    def refused(call: Callable[..., object], *arguments: object, **attributes: int) -> str:
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            call(*arguments, **attributes)
        return caught.value.message.partition("}} ")[2].partition(" [Op")[0]

    windows = "windows must be of the array"
    for begin, end in ((-1, 2), (2, 1), (2, 4)):
        assert refused(ops.din_dist_windows, [5, 6, 7], [0, begin], [3, end]) == windows
    assert refused(ops.din_dist_windows, [5, 6, 7], [0], [3, 3]) == "each window must have its end"
    gaps = "a user's window must be of the gaps, and leave an item untouched"
    for begin, end, num_items in ((-1, 2, 9), (2, 1, 9), (2, 4, 9), (0, 3, 3)):
        assert refused(ops.din_dist_untouched_items, [9], [begin], [end], [0, 0, 0], num_items=num_items) == gaps
    windows_of = "each draw must have its user's window"
    assert refused(ops.din_dist_untouched_items, [9, 9], [0], [1], [0], num_items=3) == windows_of
    equally = "what is hashed together must be numbers, or equally long"
    assert refused(ops.din_dist_hash64, [[1, 2], [1, 2, 3]]) == equally
