"""Negatives by popularity and among the items of the batch: draws, weights, and the correction of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from din_dist import assembly
from din_dist.config import Config, Negatives, Split, UnknownItem
from din_dist.data.negatives import is_touched, weighted_untouched_items
from din_dist.data.pipeline import BatchMaker, Shard, num_steps_per_epoch, training_batches
from din_dist.data.popularity import popularity
from din_dist.data.prepared import prepare
from din_dist.data.splits import item_counts, split_examples
from din_dist.data.trained_items import trained_items
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.schema import Batch
from tests.support.small_log import small_config

NUM_ITEMS = 7
users_items = st.lists(st.sets(st.integers(1, NUM_ITEMS), max_size=NUM_ITEMS), min_size=1, max_size=4).filter(any)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(touched=users_items, weights=st.lists(st.integers(0, 5), min_size=NUM_ITEMS, max_size=NUM_ITEMS))
def test_each_untouched_item_has_as_many_numbers_as_its_weight(touched: list[set[int]], weights: list[int]) -> None:
    """All numbers of each user in turn, and after the last one the first again."""
    cumulative = np.cumsum([0, *weights])
    offsets = np.cumsum([0, *map(len, touched)])
    gaps = [item - 1 - place for items in touched for place, item in enumerate(sorted(items))]
    below = [
        sum(weights[other - 1] for other in range(1, item) if other not in items)
        for items in touched
        for item in sorted(items)
    ]
    expected = [
        [item for item in range(1, NUM_ITEMS + 1) if item not in items for _ in range(weights[item - 1])]
        for items in touched
    ]
    expected = [[*items, *items[:1]] for items in expected]
    users = np.repeat(np.arange(len(touched)), list(map(len, expected)))
    numbers = [number for items in expected for number in range(len(items))]
    begins, ends = (tf.constant(offsets[users + end], tf.int64) for end in (0, 1))
    num_halvings = max(map(len, touched)).bit_length()
    flat = tf.constant(gaps, tf.int32)
    found = weighted_untouched_items(
        tf.constant(numbers, tf.uint64), begins, ends, flat, tf.constant(below, tf.int64),
        tf.constant(cumulative, tf.int64), num_halvings,
    ).numpy()  # fmt: skip
    assert found.dtype == np.int32
    assert found.tolist() == [item for items in expected for item in items]
    for item in range(1, NUM_ITEMS + 1):
        users = np.arange(len(touched))
        begins, ends = (tf.constant(offsets[users + end], tf.int64) for end in (0, 1))
        seen = is_touched(tf.fill([len(users)], item), begins, ends, flat, num_halvings).numpy()
        assert seen.tolist() == [item in items for items in touched]


def zipf_config(folder: Path, num_users: int = 3000, num_items: int = 150, **settings: Any) -> Config:
    """Each user has two events, of items by Zipf's law; the second one is an example."""
    random = np.random.default_rng(0)
    shares = 1 / np.arange(5, num_items + 5)
    items = np.array([random.choice(num_items, 2, replace=False, p=shares / shares.sum()) for _ in range(num_users)])
    table = pa.table(
        {
            "user_id": np.repeat(np.arange(num_users), 2),
            "item_id": items.ravel(),
            "category_id": items.ravel() % 5,
            "timestamp": np.tile([1, 2], num_users),
        }
    )
    pq.write_table(table, folder / "log.parquet")
    defaults = {"split": Split.TEMPORAL, "validation_from": 3, "test_from": 4, "global_batch_size": 500}
    return small_config(folder, **defaults | {"resample_negatives": True} | settings)


def batches(config: Config, num_epochs: int, shard: Shard | None = None) -> list[Batch]:
    store = prepare(config.data)
    splits = split_examples(store, config.data)
    trained, size = trained_items(store, config.data, splits), config.job.global_batch_size
    drawn = popularity(store, config.data, splits, trained)
    maker = BatchMaker.for_training(store, splits["train"], config.data, 1, trained, drawn=drawn)
    steps = range(num_epochs * num_steps_per_epoch(splits["train"].num_examples, size))
    made = training_batches(maker, config.data, global_batch_size=size, steps=steps, shard=shard)
    return list(made.as_numpy_iterator())


@pytest.mark.thorough(unless=lambda case: case["negatives"] != "popularity:0.3")
@pytest.mark.parametrize("negatives", ["uniform", "popularity:0.75", "popularity:0.3", "batch"])
def test_logits_mean_the_same_however_negatives_are_drawn(tmp_path: Path, negatives: str) -> None:
    """The logits of best likelihood, corrected, give the softmax of what users click: by counting, for a model of one
    logit an item. Without the correction popular items come out too low.
    """
    config = zipf_config(tmp_path, negatives=negatives)
    store = prepare(config.data)
    positives, drawn = np.zeros(store.facts.num_items + 1), np.zeros(store.facts.num_items + 1)
    offsets = np.zeros_like(drawn)
    for batch in batches(config, num_epochs=60):
        positives += np.bincount(batch.candidate_item_ids[batch.labels == 1], minlength=len(positives))
        drawn += np.bincount(batch.candidate_item_ids[batch.labels == 0], minlength=len(drawn))
        if "logit_offsets" in batch.extras:
            offsets[batch.candidate_item_ids] = batch.logit_offsets
    seen = (positives > 60 * 5) & (drawn > 0)
    assert seen.sum() > 80
    best = np.log(positives[seen] / drawn[seen])  # of the loss on logit + offset, an item at a time
    for logits, is_right in ((best - offsets[seen], True), (best, negatives == "uniform")):
        softmax = np.exp(logits) / np.exp(logits).sum()
        error = np.abs(np.log(softmax / (positives[seen] / positives[seen].sum()))).mean()
        assert error < 0.06 if is_right else error > 0.15, error


@pytest.mark.parametrize("negatives", ["popularity:0.75", "batch"])
@pytest.mark.parametrize("unknown_item", UnknownItem)
def test_negatives_are_never_touched(tmp_path: Path, negatives: str, unknown_item: UnknownItem) -> None:
    """Nor items that training does not know, where only known ones are drawn."""
    config = small_config(tmp_path, negatives=negatives, unknown_item=unknown_item, negatives_per_positive=3)
    store = prepare(config.data)
    examples = split_examples(store, config.data)["train"]
    users = np.repeat(np.arange(store.facts.num_users), np.diff(store.user_offsets))
    touched = [set(store.item_ids[users == user]) for user in range(store.facts.num_users)]
    trained = trained_items(store, config.data, split_examples(store, config.data))
    num_drawn = 0
    for batch in batches(config, num_epochs=2):
        owners, _ = examples.users_and_events(batch.example_ids)
        for user, item, label in zip(owners, np.abs(batch.candidate_item_ids), batch.labels, strict=True):
            assert (item in touched[user]) == (label == 1)
            assert trained is None or trained.occur[item]
            num_drawn += label == 0
    assert num_drawn == 2 * 3 * examples.num_rows


def test_negatives_of_the_batch_are_its_items(tmp_path: Path) -> None:
    """So that an update has fewer different items."""
    config = zipf_config(tmp_path, negatives="batch", global_batch_size=400)
    store = prepare(config.data)
    examples = split_examples(store, config.data)["train"]
    outside, num_drawn = 0, 0
    for batch in batches(config, num_epochs=1):
        _, events = examples.users_and_events(batch.example_ids)
        drawn = batch.candidate_item_ids[batch.labels == 0]
        outside += np.count_nonzero(~np.isin(drawn, store.item_ids[events]))
        num_drawn += len(drawn)
    assert outside < 0.001 * num_drawn


@pytest.mark.thorough(unless=lambda case: not case["grouped"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("negatives", ["popularity:0.75", "batch"])
def test_shards_draw_as_one(tmp_path: Path, negatives: str, grouped: bool) -> None:
    config = small_config(tmp_path, negatives=negatives, group_negatives=grouped, negatives_per_positive=2)

    def drawn(parts: list[list[Batch]]) -> list[dict[int, int]]:
        return [
            {int(e): int(i) for batch in step for e, i in zip(batch.example_ids, batch.candidate_item_ids, strict=True)}
            for step in zip(*parts, strict=True)
        ]

    alone = drawn([batches(config, num_epochs=2)])
    assert drawn([batches(config, num_epochs=2, shard=Shard(rank, 3)) for rank in range(3)]) == alone


def test_weights_by_hand(tmp_path: Path) -> None:
    """The power of 1 + clicks in training: validation and test do not count."""
    config = small_config(tmp_path, negatives="popularity:0.5", split=Split.LEAVE_TWO_OUT)
    store = prepare(config.data)
    splits = split_examples(store, config.data)
    found = popularity(store, config.data, splits, None)
    assert found is not None
    counts = item_counts(store, splits)
    weights = np.diff(found.cumulative)
    assert found.cumulative[0] == 0 and counts.sum() < store.facts.num_events
    np.testing.assert_allclose(weights / 1024, np.sqrt(1 + counts[1:]), rtol=1e-3)
    np.testing.assert_allclose(found.logit_offsets[1:], -np.log(weights / weights.mean()), rtol=1e-5, atol=1e-6)
    again = popularity(store, config.data, splits, None)
    assert again is not None
    np.testing.assert_array_equal(again.touched_below, found.touched_below)


def test_no_popularity_is_what_there_was(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    store = prepare(config.data)
    assert popularity(store, config.data, split_examples(store, config.data), None) is None
    assert all(batch.extras == () for batch in batches(config, num_epochs=1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform", Negatives("uniform", 0)),
        ("popularity", Negatives("popularity", 0.75)),
        ("popularity:1", Negatives("popularity", 1)),
        ("batch", Negatives("batch", 1)),
    ],
)
def test_what_users_write(text: str, expected: Negatives) -> None:
    assert Negatives.from_text(text) == expected


@pytest.mark.parametrize("text", ["", "random", "batch:1", "uniform:", "popularity:", "popularity:0", "popularity:nan"])
def test_what_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError) as caught:
        small_config(tmp_path, negatives=text)
    assert str(caught.value) == (
        "--negatives: must be uniform, batch or popularity:EXPONENT, the exponent above 0 and at most 2. Received: "
        f"{text!r}. For example popularity:0.75."
    )


def test_logs_with_labels_have_their_own_negatives(tmp_path: Path) -> None:
    config = small_config(tmp_path, labels=True, negatives="batch")
    with pytest.raises(InputError, match="--negatives: is for logs without labels.*'batch', and a log with labels"):
        batches(config, num_epochs=1)


def test_a_user_who_touched_all_that_is_drawn(tmp_path: Path) -> None:
    """Item 2 is only tested, so that user 1 has touched every item of training."""
    rows = [(1, 0, 1), (1, 1, 2), (1, 2, 9), (2, 0, 1), (2, 1, 2), (2, 3, 9)]
    table = {name: [row[n] for row in rows] for n, name in enumerate(("user_id", "item_id", "timestamp"))}
    pq.write_table(pa.table(table | {"category_id": [0] * len(rows)}), tmp_path / "log.parquet")
    config = small_config(
        tmp_path, negatives="batch", split=Split.TEMPORAL, validation_from=5, test_from=6, global_batch_size=2
    )
    with pytest.raises(InputError, match="Received: user 1, who touched all of them. Remove that user, or use"):
        batches(config, num_epochs=1)


@pytest.mark.thorough(unless=lambda case: case["native"])
@pytest.mark.parametrize("negatives", ["popularity:0.75", "batch"])
@pytest.mark.parametrize("native", [True, False])
def test_a_job_learns_with_them(tmp_path: Path, negatives: str, native: bool) -> None:
    config = small_config(tmp_path, negatives=negatives, native=native, epochs=6, learning_rate=0.02)
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    before = job.trainer.test()["gauc"]
    job.trainer.train()
    assert job.trainer.test()["gauc"] > max(before, 0.6)


def test_makers_of_evaluation_draw_uniformly(tmp_path: Path) -> None:
    tests = []
    for negatives in ("uniform", "batch"):
        config = small_config(tmp_path, negatives=negatives)
        job = assembly.Assembly(config, Runtime(), prepare(config.data))
        tests.append(job.evaluator.scores("test", lambda batch: tf.cast(batch.candidate_item_ids, tf.float32)))
    np.testing.assert_array_equal(*tests)
