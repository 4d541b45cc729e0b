"""The items that a softmax compares targets with: which, how often, and what their logits are corrected by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.config import Config, ModelKind, Sampler, Softmax, Split, UnknownItem
from din_dist.data.pipeline import BatchMaker, Shard, training_batches
from din_dist.data.prepared import prepare
from din_dist.data.sampled_items import SampledItems, sampled_items, weights_of
from din_dist.data.splits import item_counts, split_examples
from din_dist.data.trained_items import TrainedItems, trained_items
from din_dist.errors import InputError
from din_dist.schema import Batch
from tests.support.small_log import small_config

COUNTS = np.array([3, 100, 0, 7, 7])


@pytest.mark.parametrize(
    ("sampler", "shares"),
    [
        (Sampler.UNIFORM, [0.2, 0.2, 0.2, 0.2, 0.2]),
        (Sampler.POPULARITY, [3 / 118, 100 / 118, 1 / 118, 7 / 118, 7 / 118]),
        # By frequency: items 1, 3, 4, 0, 2. Rank r has log((r + 2) / (r + 1)) / log 6.
        (Sampler.LOG_UNIFORM, np.log([5 / 4, 2, 6 / 5, 3 / 2, 4 / 3]) / np.log(6)),
    ],
)
def test_shares_by_hand_are_those_of_a_million_draws(sampler: Sampler, shares: list[float]) -> None:
    weights = weights_of(COUNTS, sampler)
    assert_allclose(weights / weights.sum(), shares, rtol=1e-9)
    drawn = SampledItems(np.concatenate([[0], weights]), 1_000_000, seed=5).of_update(tf.constant(3, tf.int64))
    found = np.bincount(drawn.numpy() - 1, minlength=5)
    errors = (found - 1e6 * np.array(shares)) / np.sqrt(1e6 * np.array(shares))
    assert np.abs(errors).max() < 4.5  # of a standard deviation or less


def test_offsets_are_minus_the_logarithm_of_what_is_expected() -> None:
    sampled = SampledItems(np.array([0, 1, 3, 0, 4]), 16, seed=0)
    assert_allclose(sampled.offsets(tf.constant([1, 2, -4])), -np.log([2, 6, 8]), rtol=1e-6)


def test_log_uniform_weights_of_many_items_are_exact_enough() -> None:
    weights = weights_of(np.arange(2_000_000)[::-1], Sampler.LOG_UNIFORM)
    expected = np.log1p(1 / (np.arange(2_000_000) + 1.0)) / np.log(2_000_001)
    assert_allclose(weights / weights.sum(), expected, rtol=1e-5)


def test_the_sampled_loss_tends_to_the_full_one() -> None:
    """The sum of exp(logit + offset) over drawn items is, on average, the sum over all items."""
    random = np.random.default_rng(0)
    counts, logits = random.integers(1, 50, 40), random.normal(size=41)
    full = np.exp(logits[1:]).sum()
    errors = []
    for num_sampled in (100, 10_000, 1_000_000):
        sampled = SampledItems(np.concatenate([[0], weights_of(counts, Sampler.LOG_UNIFORM)]), num_sampled, seed=1)
        items = sampled.of_update(tf.constant(0, tf.int64)).numpy()
        errors.append(abs(np.exp(logits[items] + sampled.offsets(tf.constant(items)).numpy()).sum() / full - 1))
    assert errors[2] < 0.005
    assert errors[2] < errors[0]


def setting(tmp_path: Path, **others: object) -> Config:
    return small_config(tmp_path, model=ModelKind.YOUTUBE_DNN, num_sampled=6, global_batch_size=32, **others)


def batches_of(config: Config, shard: Shard, epochs: int = 1) -> list[Batch]:
    store = prepare(config.data)
    splits = split_examples(store, config.data)
    trained = trained_items(store, config.data, splits)
    drawn = sampled_items(store, config.model, splits, trained, seed=3)
    maker = BatchMaker.for_training(store, splits["train"], config.data, 3, trained, drawn=drawn)
    num_steps = epochs * -(-splits["train"].num_examples // 32)
    return [*training_batches(maker, config.data, global_batch_size=32, steps=range(num_steps), shard=shard)]


def test_all_workers_have_the_same_items_and_each_event_is_one_example(tmp_path: Path) -> None:
    config = setting(tmp_path)
    alone = batches_of(config, Shard(), epochs=2)
    store = prepare(config.data)
    num_examples = split_examples(store, config.data)["train"].num_examples
    ids = np.concatenate([batch.example_ids for batch in alone])
    assert_array_equal(np.sort(ids), np.repeat(np.arange(num_examples), 2))
    events = split_examples(store, config.data)["train"].events()
    assert_array_equal(np.concatenate([batch.candidate_item_ids for batch in alone]), store.item_ids[events[ids]])
    for other in (batches_of(config, Shard(place, 3), epochs=2) for place in range(3)):
        for mine, theirs in zip(alone, other, strict=True):
            assert_array_equal(mine.sampled_item_ids, theirs.sampled_item_ids)
            assert_array_equal(mine.sampled_offsets, theirs.sampled_offsets)
    assert len({tuple(batch.sampled_item_ids.numpy()) for batch in alone}) == len(alone)  # other ones in each update


def test_the_index_has_the_places_of_the_sampled_items(tmp_path: Path) -> None:
    batch = batches_of(setting(tmp_path), Shard())[0]
    items = tf.concat([batch.candidate_item_ids, batch.history_item_ids, batch.sampled_item_ids], axis=0)
    assert_array_equal(tf.gather(batch.distinct_item_ids, batch.item_index), items)
    assert len(np.unique(batch.distinct_item_ids)) == len(batch.distinct_item_ids)


def test_with_the_full_softmax_every_item_is_there_once(tmp_path: Path) -> None:
    batch = batches_of(setting(tmp_path, softmax=Softmax.FULL), Shard())[0]
    assert_array_equal(batch.sampled_item_ids, np.arange(1, 31))
    assert not batch.sampled_offsets.numpy().any()
    assert not batch.logit_offsets.numpy().any()


def test_items_that_training_never_sees_are_not_drawn_if_they_have_no_row(tmp_path: Path) -> None:
    config = setting(tmp_path, unknown_item=UnknownItem.FEATURES, softmax=Softmax.FULL, split=Split.TEMPORAL)
    store = prepare(config.data)
    splits = split_examples(store, config.data)
    trained = trained_items(store, config.data, splits)
    assert trained is not None
    drawn = sampled_items(store, config.model, splits, trained, seed=3)
    assert drawn is not None
    assert_array_equal(drawn.of_update(tf.constant(0, tf.int64)), np.flatnonzero(trained.occur))


def test_events_that_are_not_positive_count_nothing(tmp_path: Path) -> None:
    config = setting(tmp_path, labels=True, split=Split.TEMPORAL)
    batches = batches_of(config, Shard())
    weights, labels = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("weights", "labels"))
    assert 0 < labels.mean() < 1
    assert_allclose(weights, labels / labels.mean(), rtol=1e-5)
    store = prepare(config.data)
    assert item_counts(store, split_examples(store, config.data)).sum() == labels.sum()


def test_one_item_is_not_enough(tmp_path: Path) -> None:
    config = setting(tmp_path)
    store = prepare(config.data)
    splits = split_examples(store, config.data)
    only = TrainedItems(30, np.arange(31) == 4, None, None)
    with pytest.raises(InputError, match=r"--model=youtube_dnn: must have two items or more .* Received: 1\. Use more"):
        sampled_items(store, config.model, splits, only, seed=3)
