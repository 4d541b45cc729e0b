"""Where training cuts a user's events into history and target, against a slow reading of the rules."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

from din_dist.config import Config, HistoryCut, ModelKind, Split
from din_dist.data.event_store import EventStore
from din_dist.data.pipeline import BatchMaker, Shard, num_steps_per_epoch, training_batches
from din_dist.data.prepared import prepare
from din_dist.data.sampled_items import sampled_items
from din_dist.data.splits import Examples, split_examples
from din_dist.errors import InputError
from din_dist.execution import Execution
from tests.support.small_log import small_config
from tests.support.splitmix import splitmix

BATCH, SEED, LONGEST = 50, 11, 8


class Job(NamedTuple):
    config: Config
    store: EventStore
    splits: dict[str, Examples]

    @property
    def num_steps(self) -> int:
        return num_steps_per_epoch(self.splits["train"].num_examples, BATCH)

    def batches(self, steps: range, shard: Shard | None = None, *, kernels: bool = False):
        data = self.config.data
        drawn = sampled_items(self.store, self.config.model, self.splits, None, SEED)
        execution = Execution(kernels=kernels)
        maker = BatchMaker.for_training(self.store, self.splits["train"], data, SEED, None, execution, drawn)
        return training_batches(maker, data, global_batch_size=BATCH, steps=steps, shard=shard).as_numpy_iterator()

    def in_training(self, user: int) -> range:
        """The events of a user that are in training without any cut, those that can be a target."""
        begin, end = self.store.user_offsets[user : user + 2]
        first = begin if self.store.facts.has_labels else begin + 1
        return range(first, max(first, end - 2))  # the last two are held out

    def history(self, event: int) -> list[int]:
        """The items of the history of an event, of a log with or without labels."""
        store = self.store
        user = int(np.searchsorted(store.user_offsets, event, side="right")) - 1
        before = range(store.user_offsets[user], event)
        if store.labels is not None:
            before = [e for e in before if store.labels[e] and store.timestamps[e] < store.timestamps[event]]
        return [int(store.item_ids[e]) for e in before][-LONGEST:]


def job_of(folder: Path, cut: HistoryCut, *, labels: bool = False, **settings: object) -> Job:
    config = small_config(
        folder,
        labels=labels,
        split=Split.LEAVE_TWO_OUT,
        model=ModelKind.YOUTUBE_DNN,
        history_cut=cut,
        num_sampled=5,
        max_history_length=LONGEST,
        **settings,
    )
    store = prepare(config.data)
    return Job(config, store, split_examples(store, config.data))


def examples_of(batches) -> dict[int, tuple[int, list[int], float]]:
    """Target, history and weight of each example."""
    found = {}
    for batch in batches:
        histories = np.split(batch.history_item_ids, np.cumsum(batch.history_lengths)[:-1])
        weights = batch.weights if len(batch.weights) else np.ones(len(batch.example_ids))
        for place, example in enumerate(batch.example_ids):
            assert int(example) not in found
            target, history = int(batch.candidate_item_ids[place]), histories[place].tolist()
            found[int(example)] = target, history, float(weights[place])
    return found


@pytest.mark.parametrize("labels", [False, True])
def test_cuts_are_drawn_anew_in_each_epoch(tmp_path: Path, labels: bool) -> None:
    """Example e of epoch p has the event that the hash of seed, epoch and e's own event names among its user's."""
    job = job_of(tmp_path, HistoryCut.RANDOM, labels=labels)
    store, events = job.store, job.splits["train"].events()
    mean = None if store.labels is None else store.labels[events].mean()
    assert len(events) == sum(len(job.in_training(user)) for user in range(store.facts.num_users))
    drawn = []
    for epoch in (0, 1):
        found = examples_of(job.batches(range(epoch * job.num_steps, (epoch + 1) * job.num_steps)))
        assert sorted(found) == [*range(len(events))]
        for example, (target, history, weight) in found.items():
            own = int(events[example])
            run = job.in_training(int(np.searchsorted(store.user_offsets, own, side="right")) - 1)
            event = run[splitmix(SEED, 7, epoch, own) % len(run)]
            assert (target, history) == (store.item_ids[event], job.history(event))
            if store.labels is not None:
                assert weight == pytest.approx(store.labels[event] / mean)
            drawn.append(event)
    assert drawn[: len(events)] != drawn[len(events) :]
    assert max(Counter(drawn[: len(events)]).values()) > 2  # with replacement


def test_each_event_of_a_user_is_drawn_alike(tmp_path: Path) -> None:
    job = job_of(tmp_path, HistoryCut.RANDOM)
    sizes = np.array([len(job.in_training(user)) for user in range(job.store.facts.num_users)])
    user = int(sizes.argmax())
    own = set(job.in_training(user))
    places = [place for place, event in enumerate(job.splits["train"].events()) if int(event) in own]
    maker = BatchMaker(job.store, job.splits["train"], LONGEST, SEED, 1, cut=HistoryCut.RANDOM)
    times: Counter[int] = Counter()
    for epoch in range(300):
        batch = maker.batch(tf.constant(places, tf.int64), tf.constant(epoch, tf.int64))
        times.update(batch.candidate_item_ids.numpy().tolist())
    expected = Counter(int(job.store.item_ids[event]) for event in own)
    for item, number in expected.items():
        mean = 300 * number
        assert abs(times[item] - mean) < 4 * np.sqrt(mean), item
    assert set(times) == set(expected)


@pytest.mark.parametrize("cut", [HistoryCut.RANDOM, HistoryCut.FIXED])
def test_workers_kernels_and_a_restart_change_nothing(tmp_path: Path, cut: HistoryCut) -> None:
    job = job_of(tmp_path, cut)
    end = 2 * job.num_steps
    every = [examples_of([batch]) for batch in job.batches(range(end))]
    for kernels in (False, True):
        resumed = [examples_of([batch]) for batch in job.batches(range(3, end), kernels=kernels)]
        assert resumed == every[3:]
    for world_size in (2, 3):
        ranks = [job.batches(range(end), Shard(rank, world_size)) for rank in range(world_size)]
        for whole, *parts in zip(every, *ranks, strict=True):
            assert {key: value for part in parts for key, value in examples_of([part]).items()} == whole


@pytest.mark.parametrize("labels", [False, True])
def test_a_fixed_history_has_the_oldest_events(tmp_path: Path, labels: bool) -> None:
    """Four of five events of training are the history of all examples; those behind them are the targets."""
    job = job_of(tmp_path, HistoryCut.FIXED, labels=labels)
    store = job.store
    expected = []
    for user in range(store.facts.num_users):
        begin, run = int(store.user_offsets[user]), job.in_training(user)
        first = max(run.start, begin + int(0.8 * (run.stop - begin)))
        expected += [(int(store.item_ids[event]), job.history(first)) for event in range(first, run.stop)]
    found = examples_of(job.batches(range(job.num_steps)))
    assert [found[example][:2] for example in sorted(found)] == expected
    assert len({tuple(history) for _, history in expected}) < len(expected) / 2
    held_out = {name: job_of(tmp_path, HistoryCut.EVENT).splits[name].events() for name in ("validation", "test")}
    for name, events in held_out.items():
        assert_array_equal(job.splits[name].events(), events)


def test_context_is_that_of_the_fixed_history(tmp_path: Path) -> None:
    """The hour of the cut belongs to the user's side."""
    settings = {"feature_declarations": '[{"name":"hour","owner":"context","kind":"hour_of_day"}]'}
    job = job_of(tmp_path, HistoryCut.FIXED, timestamp_unit="seconds", **settings)
    store = job.store
    hours = 1 + np.arange(store.facts.num_events)  # a value of its own for each event
    stored = store.features["hour"]
    object.__setattr__(stored, "values", hours.astype(np.int32))
    users = np.repeat(np.arange(store.facts.num_users), np.diff(store.user_offsets))
    events = job.splits["train"].events()
    first = {user: min(event for event in events if users[event] == user) for user in users[events]}
    for batch in job.batches(range(job.num_steps)):
        own = users[events[batch.example_ids]]
        assert batch.features["hour"].tolist() == [1 + first[user] for user in own]


@pytest.mark.parametrize("model", [ModelKind.DIN, ModelKind.MEAN_POOLING])
@pytest.mark.parametrize("cut", ["random", "fixed"])
def test_models_that_rank_have_histories_of_their_events(model: ModelKind, cut: str) -> None:
    message = f"--history_cut: is for models that find items, and {model} ranks. Received: '{cut}'. Drop it, or use"
    with pytest.raises(InputError, match=re.escape(message)):
        Config().replace(model=model, history_cut=HistoryCut(cut))
