"""Who takes which example: whatever happens to a job's workers, every example counts once an epoch."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from din_dist import schema
from din_dist.config import DataConfig
from din_dist.data.event_store import EventStore
from din_dist.data.pipeline import BatchMaker, Shard, deal, num_steps_per_epoch, share, training_batches
from din_dist.data.splits import Examples
from din_dist.training.undo import UndoLog, agree
from din_dist.training_state import TrainingState
from tests.support.thorough import up_to

SEED = 7
Taken = list[tuple[int, int]]  # of each example its id, and the number from which all that is random about it comes
Take = Callable[[int, int, int], list[list[Taken]]]  # first update, how many, world size -> of each update, each rank


@dataclasses.dataclass(frozen=True)
class Job:
    num_examples: int
    global_batch_size: int
    epochs: int

    @property
    def steps_per_epoch(self) -> int:
        return num_steps_per_epoch(self.num_examples, self.global_batch_size)

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def places(self, step: int) -> range:
        """What update `step`, counted from 0, takes of its epoch's order, over all ranks."""
        first = step % self.steps_per_epoch * self.global_batch_size
        return range(first, min(first + self.global_batch_size, self.num_examples))


@dataclasses.dataclass(frozen=True)
class Stretch:
    """From one change of workers to the next."""

    world_size: int
    num_updates: int
    undone: bool  # the last update, which not all had made when one was lost


def jobs(most_examples: int, most_epochs: int) -> st.SearchStrategy[Job]:
    return st.builds(Job, *(st.integers(1, most) for most in (most_examples, most_examples + 5, most_epochs)))


def stretches(most_ranks: int, most_updates: int, most: int) -> st.SearchStrategy[list[Stretch]]:
    one = st.builds(Stretch, st.integers(1, most_ranks), st.integers(0, most_updates), st.booleans())
    return st.lists(one, min_size=1, max_size=most)


def walk(job: Job, changes: Sequence[Stretch], take: Take) -> list[Taken]:
    """Trains through all `changes` to the end: what the weights have learned of each update, in order.

    Checks on the way that the ranks of an update have near-equal shares, and at the end that the weights of those that
    are left know every example once an epoch.
    """
    learned = tf.Variable(np.zeros([job.epochs, job.num_examples], np.int64))  # the weights: how often each example
    history, state = UndoLog([], [learned]), TrainingState()
    applied: list[Taken] = []
    last = Stretch(changes[-1].world_size, job.num_steps, undone=False)
    for stretch in (*changes, last):
        history.begin(state, finished=True)
        num_updates = min(stretch.num_updates, job.num_steps - state.step)
        for shares in take(state.step, num_updates, stretch.world_size):
            sizes = [len(one) for one in shares]
            assert len(sizes) == stretch.world_size and max(sizes) - min(sizes) <= 1
            applied.append(list(itertools.chain(*shares)))
            now = learned.numpy()
            now[state.epoch] += np.bincount([example_id for example_id, _ in applied[-1]], minlength=job.num_examples)
            learned.assign(now)
            state.advance(sum(sizes), loss=0.0)
            history.add(state, None, [])
            if state.examples_seen == job.num_examples:
                state.end_epoch()
            history.finish(state)
        if stretch.undone and num_updates:  # a change before anything was made leaves nothing to undo
            step, finished = agree([history.newest(), (state.step - 1, True)])
            state = history.go_back(step, finished=finished)
            del applied[step:]
    assert (state.step, state.epoch, state.examples_seen) == (job.num_steps, job.epochs, 0)
    assert (learned.numpy() == 1).all()
    return applied


@settings(max_examples=up_to(300), deadline=None)
@given(job=jobs(60, 3), changes=stretches(70, 20, 6))
@example(job=Job(5, 4, 2), changes=[Stretch(3, 2, undone=True)])  # undoes the one example of an epoch's end
def test_plans_through_any_changes(job: Job, changes: list[Stretch]) -> None:
    def take(first: int, num_updates: int, world_size: int) -> list[list[Taken]]:
        found = []
        for step in range(first, first + num_updates):
            whole = [(place, 0) for place in job.places(step)]
            found.append([whole[slice(*share(len(whole), rank, world_size))] for rank in range(world_size)])
        return found

    applied = walk(job, changes, take)
    assert [example_id for update in applied for example_id, _ in update] == [*range(job.num_examples)] * job.epochs
    assert applied == [update for (update,) in take(0, job.num_steps, 1)]  # as one worker has them


@given(total=st.integers(0, 2**31), world_size=st.integers(1, 5000))
@example(total=1, world_size=5000)
def test_shares_of_any_size(total: int, world_size: int) -> None:
    bounds = [share(total, rank, world_size) for rank in range(world_size)]
    assert bounds[0][0] == 0 and bounds[-1][1] == total
    assert all(end == first for (_, end), (first, _) in itertools.pairwise(bounds))
    sizes = Counter(end - first for first, end in bounds)
    assert sizes.keys() <= {total // world_size, total // world_size + 1}
    if total < world_size:
        assert sizes[0] == world_size - total  # more ranks than examples: the others have none
    inside_a_graph = share(tf.constant(total, tf.int64), world_size - 1, world_size)
    assert tuple(int(bound) for bound in inside_a_graph) == bounds[-1]


@given(
    lengths=st.lists(st.integers(0, 100), max_size=40),
    head=st.integers(0, 2),
    tail=st.integers(0, 2),
    num_shards=st.integers(2, 5),
)
@example(lengths=[], head=2, tail=0, num_shards=2)
@example(lengths=[100, 0, 0, 99], head=0, tail=0, num_shards=2)
@settings(max_examples=up_to(60), deadline=None)
def test_groups_are_dealt_from_the_longest_to_the_shortest(
    lengths: list[int], head: int, tail: int, num_shards: int
) -> None:
    ids = np.arange(head + 3 * len(lengths) + tail)
    of_group = tf.constant([0, *lengths, 0], tf.int64)
    dealt = deal(
        tf.constant(ids),
        tf.constant(head, tf.int64),
        3,
        num_shards,
        lambda ids: tf.gather(of_group, (ids - head) // 3 + 1),
    ).numpy()
    assert [*dealt[:head], *dealt[len(dealt) - tail :]] == [*ids[:head], *ids[len(ids) - tail :]]
    groups = dealt[head : len(dealt) - tail].reshape(-1, 3)
    assert (np.diff(groups, axis=1) == 1).all() and sorted(groups[:, 0]) == list(ids[head : len(ids) - tail : 3])
    order = (groups[:, 0] - head) // 3
    counts = [
        len(range(shard, len(order), 2 * num_shards))
        + len(range(2 * num_shards - 1 - shard, len(order), 2 * num_shards))
        for shard in range(num_shards)
    ]
    shards = np.split(order, np.cumsum(counts)[:-1])
    assert all(list(shard) == sorted(shard) for shard in shards)  # as they came
    sums = [sum(lengths[group] for group in shard) for shard in shards]
    assert max(sums) - min(sums) <= max(lengths, default=0)


def store_of(num_events: int) -> tuple[EventStore, Examples]:
    """One user's events, all of them examples, all clicked."""
    events = np.arange(num_events, dtype=np.int64)
    items, offsets = (events % 5 + 1).astype(np.int32), np.array([0, num_events])
    facts = schema.DatasetFacts(1, 5, num_events, True, {}, 0, num_events, "fingerprint", {})
    store = EventStore(
        facts=facts,
        folder=Path("nowhere"),
        user_offsets=offsets,
        item_ids=items,
        timestamps=events,
        labels=np.ones(num_events, np.uint8),
        history_item_ids=items,
        history_offsets=offsets,
        history_ends=events,
        touched_offsets=None,
        touched_gaps=None,
        item_features={},
    )
    user, end, base = (np.array([number], np.int32) for number in (0, num_events, 0))
    return store, Examples(user, end, base, draws_per_row=1)


def epoch_order(job: Job, epoch: int) -> np.ndarray:
    order = tf.constant([SEED, epoch], tf.int64)
    places = tf.range(tf.constant(job.num_examples, tf.int64))
    return tf.random.experimental.index_shuffle(places, seed=order, max_index=job.num_examples - 1).numpy()


@settings(max_examples=10, deadline=None)  # TensorFlow traces each dataset anew
@given(job=jobs(40, 2), changes=stretches(4, 6, 2))
@example(job=Job(9, 4, 2), changes=[Stretch(4, 4, undone=True), Stretch(2, 1, undone=False)])  # 1 example, 4 ranks
def test_batches_through_any_changes(job: Job, changes: list[Stretch]) -> None:
    """The real batches, from `first_step` on after each change: examples, and what is drawn for each."""
    store, examples = store_of(job.num_examples)

    def take(first: int, num_updates: int, world_size: int) -> list[list[Taken]]:
        if not num_updates:
            return []
        of_ranks = []
        for rank in range(world_size):
            config = DataConfig(max_history_length=3)
            batches = training_batches(
                BatchMaker.for_training(store, examples, config, SEED),
                config,
                global_batch_size=job.global_batch_size,
                steps=range(first, job.num_steps),
                shard=Shard(rank, world_size),
            )
            made = itertools.islice(batches.as_numpy_iterator(), num_updates)
            of_ranks.append(
                [list(zip(batch.example_ids.tolist(), batch.dropout_seeds.tolist(), strict=True)) for batch in made]
            )
        return [list(shares) for shares in zip(*of_ranks, strict=True)]

    applied = walk(job, changes, take)
    ids = [[example_id for example_id, _ in update] for update in applied]
    orders = [epoch_order(job, epoch) for epoch in range(job.epochs)]
    assert ids == [orders[step // job.steps_per_epoch][job.places(step)].tolist() for step in range(job.num_steps)]
    assert applied == [update for (update,) in take(0, job.num_steps, 1)]  # as one worker has them
