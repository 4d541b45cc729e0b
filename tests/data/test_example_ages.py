"""The age of each example in batches of training, by hand and by a slow reading."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose

from din_dist.assembly import Assembly
from din_dist.config import HistoryCut, ModelKind, Split
from din_dist.data.event_store import EventStore
from din_dist.data.example_ages import ExampleAges
from din_dist.data.prepared import prepare
from din_dist.data.splits import Examples, split_examples
from din_dist.distributed.runtime import Runtime
from din_dist.evaluation.evaluator import logits_of
from tests.support.small_log import small_config


def store_at(tmp_path: Path, times: list[int]) -> EventStore:
    store = prepare(small_config(tmp_path).data)
    return dataclasses.replace(store, timestamps=np.array(times))


def test_ages_by_hand(tmp_path: Path) -> None:
    """Training has the events 1 to 4; event 0 is older than all of them, and event 5 newer."""
    store = store_at(tmp_path, [0, 100, 150, 180, 200, 900])
    examples = Examples(np.array([0]), np.array([4]), np.array([1]), 1)
    ages = ExampleAges.of_training(store, examples)
    assert (ages.oldest, ages.newest) == (100, 200)
    assert_allclose(ages.of(tf.constant([1, 2, 3, 4, 1], tf.int64)), [1, 0.5, 0.2, 0, 1], rtol=1e-6)


def test_microseconds_keep_their_digits(tmp_path: Path) -> None:
    """float32 would not know these times apart, nor would float64 half as long after 1970."""
    base = 1_700_000_000_000_000_123
    store = store_at(tmp_path, [base, base + 1, base + 4])
    ages = ExampleAges.of_training(store, Examples(np.array([0]), np.array([3]), np.array([0]), 1))
    assert_allclose(ages.of(tf.constant([0, 1, 2], tf.int64)), [1, 0.75, 0], rtol=1e-6)


def test_one_time_alone_is_age_0(tmp_path: Path) -> None:
    store = store_at(tmp_path, [7, 7, 7])
    ages = ExampleAges.of_training(store, Examples(np.array([0]), np.array([2]), np.array([0]), 1))
    assert ages.of(tf.constant([0, 1], tf.int64)).numpy().tolist() == [0, 0]


@pytest.mark.parametrize("cut", HistoryCut)
def test_batches_tell_the_age_of_the_target(tmp_path: Path, cut: HistoryCut) -> None:
    """With a cut, too, it is the time of the target that counts. Batches of evaluation tell none."""
    config = small_config(
        tmp_path, model=ModelKind.YOUTUBE_DNN, example_age=True, history_cut=cut, split=Split.TEMPORAL, num_sampled=5
    )
    store = prepare(config.data)
    item_ids = np.arange(store.facts.num_events) % store.facts.num_items + 1
    store = dataclasses.replace(store, item_ids=item_ids.astype(np.int32))  # neighbours differ
    job = Assembly(config, Runtime(), store)
    events = split_examples(store, config.data)["train"].events()
    times = store.timestamps[events].astype(np.float64)
    users = np.repeat(np.arange(store.facts.num_users), np.diff(store.user_offsets))
    num_told = 0
    for batch in job.batches(0, 5):
        for example, item, age in zip(batch.example_ids, batch.candidate_item_ids, batch.example_ages, strict=True):
            own = events[int(example)]
            if cut is HistoryCut.RANDOM:
                (own,) = [e for e in events if users[e] == users[own] and store.item_ids[e] == int(item)]
            expected = (times.max() - store.timestamps[own]) / (times.max() - times.min())
            assert float(age) == pytest.approx(expected, abs=1e-6)
            num_told += 1
    assert num_told > 100
    scores = job.evaluator.scores("test", logits_of(job.model))
    assert np.isfinite(scores).all()


def test_other_models_are_told_none(tmp_path: Path) -> None:
    config = small_config(tmp_path, model=ModelKind.YOUTUBE_DNN, num_sampled=5)
    job = Assembly(config, Runtime(), prepare(config.data))
    assert all("example_ages" not in batch.extras for batch in job.batches(0, 2))
