"""Makes packed batches from events, inside the TensorFlow graph.

No example is ever materialised:
- An epoch is a bijection of example numbers, so there is no shuffle buffer and no state.
- A history is a window into its user's own events.
- The arrays stay in the memory-mapped files that all workers of a machine share.

Letters of shapes: B examples of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from din_dist.config import DataConfig, HistoryCut, UnknownItem
from din_dist.data.event_store import KEY_BITS, EventStore, HistorySet
from din_dist.data.example_ages import ExampleAges
from din_dist.data.hashing import hash64
from din_dist.data.negatives import first_not, is_touched, untouched_items, weighted_untouched_items
from din_dist.data.popularity import Popularity
from din_dist.data.sampled_items import SampledItems
from din_dist.data.side_information import SideInformation
from din_dist.data.splits import Examples
from din_dist.data.trained_items import TrainedItems
from din_dist.errors import InputError
from din_dist.execution import Execution
from din_dist.features.encoding import Encoding
from din_dist.features.gathering import FeatureValues, OfferRows, signature_of, without_copying
from din_dist.features.session_graph import session_graph
from din_dist.features.spec import OF_EXAMPLES, Owner
from din_dist.kernels import operations
from din_dist.schema import UNKNOWN_ID, Batch, SessionGraph

# Streams of random numbers that must not resemble each other.
_NEGATIVES, _DROPOUT, _EVALUATION, _HIDING, _IN_BATCH = 1, 2, 3, 4, 5
_CUTS = 7  # `sampled_items.py` has 6

MOST_DEALERS = 8
_COUNTED_AT_ONCE = 8192  # examples
_ATTEMPTS = 4  # to find an item in the batch that the user never touched


def batch_signature(encodings: Iterable[Encoding] = (), extras: Collection[str] = (), num_tasks: int = 1) -> Batch:
    """Returns the TensorSpec of each field of a batch that has all of them.

    Args:
        encodings: of the data set's features. Those of items are not in batches.
        extras: as `Batch.extras` names them.
        num_tasks: the labels of an example.
    """
    ids, ids64 = tf.TensorSpec([None], tf.int32), tf.TensorSpec([None], tf.int64)
    encodings = list(encodings)
    sides = {encoding.spec.name: ids for encoding in encodings if encoding.spec.owner is Owner.HISTORY}
    others = {"sampled_item_ids": ids, "graph": SessionGraph(*[ids] * len(SessionGraph._fields))}
    return Batch(
        candidate_item_ids=ids,
        history_item_ids=ids,
        history_lengths=ids,
        dropout_seeds=ids64,
        labels=tf.TensorSpec([None] if num_tasks == 1 else [None, num_tasks], tf.float32),
        distinct_item_ids=ids,
        item_index=ids,
        example_ids=ids64,
        features=signature_of(encoding for encoding in encodings if encoding.spec.owner in OF_EXAMPLES) or (),
        sides=sides or (),
        side_index=ids if sides else (),
        **{name: others.get(name, tf.TensorSpec([None], tf.float32)) for name in extras},
    )


class ExampleFeatures:
    """The user, context and candidate features of a data set.

    Args:
        store: the events.
        execution: how lists are gathered. None: by TensorFlow's operations.
    """

    def __init__(self, store: EventStore, execution: Execution | None = None) -> None:
        features = {name: each for name, each in store.features.items() if each.encoding.spec.owner in OF_EXAMPLES}
        self._execution = execution
        self._values = {name: FeatureValues(stored) for name, stored in features.items()}
        offers = {id(values.offers): values.offers for values in self._values.values() if values.offers is not None}
        self._offers = {key: OfferRows(found) for key, found in offers.items()}  # searched once for all their features

    @property
    def encodings(self) -> list[Encoding]:
        """The features' encodings."""
        return [values.encoding for values in self._values.values()]

    def of(self, users: tf.Tensor, events: tf.Tensor, candidates: tf.Tensor) -> dict[str, Any] | tuple[()]:
        """Returns the values of each feature by name, as `Batch.features` has them; () without features.

        Args:
            users: int64 `[B]`, the user of each example.
            events: int64 `[B]`, its event.
            candidates: int32 `[B]`, its item, which a drawn negative does not share with the event.
        """
        rows: dict[Any, tf.Tensor] = {Owner.USER: users, Owner.CONTEXT: events, Owner.CANDIDATE: events}
        rows |= {key: offers.of(events, candidates) for key, offers in self._offers.items()}
        return {
            name: values.of(rows[id(values.offers) if values.offers else values.encoding.spec.owner], self._execution)
            for name, values in self._values.items()
        } or ()


def mean_weight(store: EventStore, examples: Examples, *, positives: bool = False) -> float | None:
    """Returns the mean weight of the examples of a split, or None if all count alike.

    Args:
        store: the events.
        examples: of the split.
        positives: examples whose label is 0 have weight 0.

    Raises:
        InputError: no example has a weight above 0.
    """
    labels = store.labels if positives else None
    if store.weights is None and labels is None:
        return None

    def of_part(events: np.ndarray) -> float:
        weights = np.ones(len(events)) if store.weights is None else store.weights[events].astype(np.float64)
        return float(weights.sum() if labels is None else weights[labels[events] == 1].sum())

    total = sum(map(of_part, examples.event_parts()))
    if not total and store.weights is None:
        raise InputError(
            f"--label_column: training needs a positive event. Received: none among {examples.num_rows:,}. Use more "
            "data, or another split."
        )
    if not total:
        raise InputError(
            f"--weight_column: training examples must have a weight above 0. Received: 0 for all "
            f"{examples.num_rows:,} of them. Correct the column, or drop it."
        )
    return total / examples.num_rows


def share(total: Any, index: int, num_shards: int) -> tuple[Any, Any]:
    """Returns the first and the end of a shard's run, if `total` is divided into runs of nearly equal length.

    Args:
        total: an integer, or an int64 tensor.
        index: the shard, from 0.
        num_shards: the number of shards.
    """
    return total * index // num_shards, total * (index + 1) // num_shards


def num_steps_per_epoch(num_examples: int, global_batch_size: int) -> int:
    """Returns the number of updates an epoch; the last one may have fewer examples."""
    return -(-num_examples // global_batch_size)


class _Draws(NamedTuple):
    """Which negatives to draw; tensors `[B]`."""

    events: tf.Tensor
    users: tf.Tensor
    numbers: tf.Tensor  # of the draw among those of its event; 0 is the event itself
    round: tf.Tensor  # a number for (all epochs), or for each


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of `count` parts of every update."""

    index: int = 0
    count: int = 1


@dataclasses.dataclass(frozen=True)
class BatchMaker:
    """Turns example numbers of one split into packed batches.

    Attributes:
        store: the events.
        examples: the split.
        max_history_length: the most items of a history; the newest stay.
        seed: the seed of all draws.
        stream: keeps the draws of evaluation apart from those of training.
        resample: draw other negatives in each epoch.
        trained: the items that negatives are drawn from; None: all items.
        hidden_rate: the share of the item ids that are hidden.
        mean_weight: the weights of events are divided by it. None: the batches have no weights.
        popularity: the weights by which negatives are drawn. None: uniformly.
        sampled: what draws the items of a softmax; the candidates are then its targets. None: there is none.
        cut: where a user's events are cut into history and target.
        ages: the ages of the targets' events. None: the batches have none.
        graphs: find the graph of each history.
        execution: how batches are made; every way makes the same.
    """

    store: EventStore
    examples: Examples
    max_history_length: int
    seed: int
    stream: int
    resample: bool = False
    trained: TrainedItems | None = None
    hidden_rate: float = 0.0
    mean_weight: float | None = None
    popularity: Popularity | None = None
    sampled: SampledItems | None = None
    cut: HistoryCut = HistoryCut.EVENT
    ages: ExampleAges | None = None
    graphs: bool = False
    execution: Execution = dataclasses.field(default_factory=Execution)

    @classmethod
    def for_training(
        cls,
        store: EventStore,
        examples: Examples,
        config: DataConfig,
        seed: int,
        trained: TrainedItems | None = None,
        execution: Execution | None = None,
        drawn: Popularity | SampledItems | None = None,
        ages: ExampleAges | None = None,
    ) -> BatchMaker:
        """Returns what makes the batches of training.

        Args:
            store: the events.
            examples: the split to train on.
            config: of the data.
            seed: the seed of all draws.
            trained: the items of training, if other items are hidden at random; see `trained_items`.
            execution: how batches are made. None: TensorFlow's operations make them.
            drawn: the weights by which negatives are drawn, as of `data/popularity.py`, or what draws the items of a
                softmax. None: negatives are drawn uniformly.
            ages: the ages of the examples, if the model reads them.
        """
        if (trained is None) != (config.unknown_item is UnknownItem.UNTRAINED):
            raise ValueError(f"trained: must be as unknown_item={config.unknown_item} says. Received: {trained}.")
        return cls(
            store,
            examples,
            config.max_history_length,
            seed,
            _NEGATIVES,
            config.resample_negatives,
            trained,
            hidden_rate=config.unknown_item_rate if trained else 0.0,
            mean_weight=mean_weight(store, examples, positives=isinstance(drawn, SampledItems)),
            popularity=drawn if isinstance(drawn, Popularity) else None,
            sampled=drawn if isinstance(drawn, SampledItems) else None,
            cut=config.history_cut,
            ages=ages,
            execution=execution or Execution(),
        )

    def __post_init__(self) -> None:
        arrays = {
            "users": self.examples.users,
            "row_ends": self.examples.row_ends,
            "event_bases": self.examples.event_bases,
            "item_ids": self.store.item_ids,
            "labels": self.store.labels if self.store.task_labels is None else self.store.task_labels,
            "touched_gaps": self._drawn_from.touched_gaps,
            "touched_offsets": self._drawn_from.touched_offsets,
            "trained_ids": self.trained.ids if self.trained else None,
            "weights": self.store.weights if self.mean_weight and self.store.weights is not None else None,
            "sessions": self.store.sessions,
        }
        for place, history in enumerate(self._histories):
            own = {"item_ids": history.item_ids, "offsets": history.offsets, "ends": history.ends, "keys": history.keys}
            own |= {"feature_of": self.store.item_features[history.feature]} if history.feature else {}
            arrays |= {f"{place}-{name}": values for name, values in own.items()}
        if self.popularity is not None:
            arrays |= {
                "touched_gaps": self.store.touched_gaps,
                "touched_offsets": self.store.touched_offsets,
                "touched_below": self.popularity.touched_below,
                "cumulative": self.popularity.cumulative,
                "logit_offsets": self.popularity.logit_offsets,
            }
        tensors = {name: without_copying(array) for name, array in arrays.items() if array is not None}
        object.__setattr__(self, "_tensors", tensors)
        object.__setattr__(self, "_features", ExampleFeatures(self.store, self.execution))
        object.__setattr__(self, "_sides", SideInformation(self.store, self._histories))

    @property
    def _histories(self) -> tuple[HistorySet, ...]:
        return self.store.histories(self.max_history_length)

    @property
    def _drawn_from(self) -> EventStore | TrainedItems:
        return self.trained or self.store

    def _rows(self, example_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the row of each example, int64 `[B]`, and its place in `examples.users`, int32 `[B]`."""
        arrays: dict[str, tf.Tensor] = self._tensors  # type: ignore[attr-defined]
        row = example_ids // self.examples.draws_per_row
        return row, tf.searchsorted(arrays["row_ends"], tf.cast(row, arrays["row_ends"].dtype), side="right")

    def _located(self, example_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the user and the event of each example, int64 `[B]` each."""
        arrays: dict[str, tf.Tensor] = self._tensors  # type: ignore[attr-defined]
        row, segment = self._rows(example_ids)
        user = tf.cast(tf.gather(arrays["users"], segment), tf.int64)
        return user, tf.cast(tf.gather(arrays["event_bases"], segment), tf.int64) + row

    def _cut(self, example_ids: tf.Tensor, epoch: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns each example's user, the event whose history the user has, and the event that is the target.

        Args:
            example_ids: int64 `[B]`.
            epoch: int64, the epoch from 0. None: 0.

        Returns:
            int64 `[B]` each.
        """
        user, event = self._located(example_ids)
        if self.cut is HistoryCut.EVENT:
            return user, event, event
        arrays: dict[str, tf.Tensor] = self._tensors  # type: ignore[attr-defined]
        row, segment = self._rows(example_ids)
        begin = tf.cast(tf.gather(arrays["row_ends"], tf.maximum(segment - 1, 0)), tf.int64)
        begin = tf.where(segment > 0, begin, 0)
        first = event - (row - begin)
        if self.cut is HistoryCut.FIXED:
            return user, first, event
        count = tf.cast(tf.gather(arrays["row_ends"], segment), tf.int64) - begin
        random = hash64(self.seed, _CUTS, 0 if epoch is None else epoch, event, execution=self.execution)
        drawn = first + tf.cast(tf.math.floormod(random, tf.cast(count, tf.uint64)), tf.int64)
        return user, drawn, drawn

    def bounds(
        self, user: tf.Tensor, event: tf.Tensor, candidate: tf.Tensor | None = None
    ) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Returns the first and the end of each history of some examples, int64 `[B]` each, among its behaviours.

        Args:
            user: int64 `[B]`.
            event: int64 `[B]`.
            candidate: int32 `[B]`. None: histories that depend on it are left out.
        """
        arrays: dict[str, tf.Tensor] = self._tensors  # type: ignore[attr-defined]
        owner = tf.gather(arrays["sessions"], event) if "sessions" in arrays else user
        found = []
        for place, history in enumerate(self._histories):
            end = tf.gather(arrays[f"{place}-ends"], event) if f"{place}-ends" in arrays else event
            start = tf.gather(arrays[f"{place}-offsets"], owner)
            if history.feature:
                if candidate is None:
                    continue
                feature = tf.cast(tf.gather(arrays[f"{place}-feature_of"], candidate), tf.int64)
                stop = tf.gather(arrays[f"{place}-offsets"], user + 1)
                longest_user = int(np.diff(history.offsets).max(initial=0))
                start, end = run_of_feature(
                    arrays[f"{place}-keys"], (start, stop), feature, end, longest_user.bit_length()
                )
            found.append((tf.maximum(start, end - tf.constant(history.longest, tf.int64)), end))
        return found

    def history_lengths(self, example_ids: tf.Tensor, epoch: tf.Tensor | None = None) -> tf.Tensor:
        """Returns how many behaviours the histories of each example have that do not depend on the candidate.

        Args:
            example_ids: int64 `[B]`.
            epoch: int64, the epoch from 0. None: 0.

        Returns:
            int64 `[B]`.
        """
        user, asked, _ = self._cut(example_ids, epoch)
        lengths = [end - start for start, end in self.bounds(user, asked)]
        return tf.add_n(lengths) if len(lengths) > 1 else lengths[0]

    def batch(
        self,
        example_ids: tf.Tensor,
        epoch: tf.Tensor,
        global_ids: tf.Tensor | None = None,
        step: tf.Tensor | None = None,
    ) -> Batch:
        """Returns the packed batch of some examples; `schema` documents its parts.

        Args:
            example_ids: int64 `[B]`.
            epoch: int64, the epoch from 0.
            global_ids: int64, the examples of the global batch, for negatives that are drawn among its items.
            step: int64, the number of the update, for the items of a softmax. None: 0.
        """
        arrays: dict[str, tf.Tensor] = self._tensors  # type: ignore[attr-defined]
        user, asked, event = self._cut(example_ids, epoch)
        draw = example_ids % self.examples.draws_per_row
        draws = _Draws(event, user, draw, epoch if self.resample else tf.zeros_like(epoch))
        candidate, labels = self._candidates(draws, epoch, global_ids)
        offsets = tf.gather(arrays["logit_offsets"], candidate) if self.popularity is not None else ()
        sampled: tuple = ((), ())
        if self.sampled is not None:
            items = self.sampled.of_update(tf.constant(0, tf.int64) if step is None else step)
            sampled, offsets = (items, self.sampled.offsets(items)), self.sampled.offsets(candidate)
        bounds = self.bounds(user, asked, candidate)
        windows = [self._windows(arrays[f"{place}-item_ids"], *bound) for place, bound in enumerate(bounds)]
        lengths = [tf.cast(end - start, tf.int32) for start, end in bounds]
        history, history_lengths = (tf.concat(x, axis=0) if len(x) > 1 else x[0] for x in (windows, lengths))
        if self.hidden_rate:
            candidate, history = self._hide(candidate, history, history_lengths, example_ids, epoch)
        # The rows that a step needs are found here, while the step before it runs.
        distinct, index = self._distinct([candidate, history, *([sampled[0]] if self.sampled else ())])
        sides, side_index = self._sides.of(bounds, asked)  # type: ignore[attr-defined]
        graph: SessionGraph | tuple[()] = ()
        if self.graphs:
            of_positions = index[tf.size(candidate) :][: tf.size(history)]
            graph = session_graph(of_positions, history_lengths)
        return Batch(
            candidate_item_ids=candidate,
            history_item_ids=history,
            history_lengths=history_lengths,
            dropout_seeds=tf.cast(hash64(self.seed, _DROPOUT, epoch, example_ids, execution=self.execution), tf.int64),
            labels=labels,
            distinct_item_ids=distinct,
            item_index=index,
            example_ids=example_ids,
            features=self._features.of(user, asked, candidate),  # type: ignore[attr-defined]
            sides=sides,
            side_index=side_index,
            weights=self._weights(event, labels),
            logit_offsets=offsets,
            sampled_item_ids=sampled[0],
            sampled_offsets=sampled[1],
            example_ages=() if self.ages is None else self.ages.of(event),
            graph=graph,
        )

    def _weights(self, events: tf.Tensor, labels: tf.Tensor) -> tf.Tensor | tuple[()]:
        """Returns by how much each example's loss counts, float32 `[B]`; () if all count alike."""
        arrays: dict[str, tf.Tensor] = self._tensors  # type: ignore[attr-defined]
        if not self.mean_weight:
            return ()
        found = [tf.gather(arrays["weights"], events)] if "weights" in arrays else []
        found += [labels] if self.sampled is not None and self.store.labels is not None else []
        return functools.reduce(tf.multiply, found) / self.mean_weight

    def _candidates(self, draws: _Draws, epoch: tf.Tensor, global_ids: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the candidate of each example, int32 `[B]`, and its labels."""
        arrays: dict[str, tf.Tensor] = self._tensors  # type: ignore[attr-defined]
        items = tf.gather(arrays["item_ids"], draws.events)
        if self.store.facts.has_labels:
            return items, self._labels(tf.gather(arrays["labels"], draws.events))
        is_event = draws.numbers == 0
        if self.examples.draws_per_row > 1:
            if self.popularity is None:
                negative = self._uniform_negatives(draws)
            else:
                negative = self._weighted_negatives(draws, epoch, global_ids)
            items = tf.where(is_event, items, negative)
        return items, tf.cast(is_event, tf.float32)

    def _labels(self, found: tf.Tensor) -> tf.Tensor:
        """Returns labels as batches have them, given those of the events or their bits by task, uint8 `[B]`."""
        if self.store.task_labels is not None:
            places = tf.constant([*range(self.store.facts.num_tasks)], tf.uint8)
            found = tf.bitwise.right_shift(found[:, None], places) & 1
        return tf.cast(found, tf.float32)

    def _uniform_negatives(self, draws: _Draws) -> tf.Tensor:
        """Returns a negative for each example, int32 `[B]`."""
        arrays: dict[str, tf.Tensor] = self._tensors  # type: ignore[attr-defined]
        negative = untouched_items(
            hash64(self.seed, self.stream, draws.round, draws.events, draws.numbers, execution=self.execution),
            tf.gather(arrays["touched_offsets"], draws.users),
            tf.gather(arrays["touched_offsets"], draws.users + 1),
            arrays["touched_gaps"],
            self.store.facts.num_candidates if self.trained is None else len(self.trained.ids) - 1,
            num_halvings=self._drawn_from.max_touched.bit_length(),
            execution=self.execution,
        )
        return negative if self.trained is None else tf.gather(arrays["trained_ids"], negative)

    def _weighted_negatives(self, draws: _Draws, epoch: tf.Tensor, global_ids: tf.Tensor | None) -> tf.Tensor:
        """Returns a negative for each example, int32 `[B]`: by popularity, or among the items of the global batch."""
        arrays: dict[str, tf.Tensor] = self._tensors  # type: ignore[attr-defined]
        assert self.popularity is not None
        begins, ends = (tf.gather(arrays["touched_offsets"], draws.users + end) for end in (0, 1))
        num_halvings = self.store.max_touched.bit_length()
        negative = weighted_untouched_items(
            hash64(self.seed, self.stream, draws.round, draws.events, draws.numbers, execution=self.execution),
            begins,
            ends,
            arrays["touched_gaps"],
            arrays["touched_below"],
            arrays["cumulative"],
            num_halvings,
        )
        if not self.popularity.in_batch or global_ids is None:
            return negative
        _, events = self._located(global_ids)
        pool = tf.gather(arrays["item_ids"], events)
        for attempt in range(_ATTEMPTS):  # the last that fits is taken; if none fits, what is drawn by popularity
            random = hash64(self.seed, _IN_BATCH, epoch, draws.events, draws.numbers * _ATTEMPTS + attempt)
            place = tf.cast(tf.math.floormod(random, tf.cast(tf.size(pool), tf.uint64)), tf.int64)
            item = tf.gather(pool, place)
            touched = is_touched(item, begins, ends, arrays["touched_gaps"], num_halvings)
            negative = tf.where(touched, negative, item)
        return negative

    def _windows(self, values: tf.Tensor, begins: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
        """Returns `values[begin:end]` for each pair of `begins` and `ends` `[B]`, concatenated."""
        if not self.execution.kernels:
            return tf.gather(values, tf.ragged.range(begins, ends).values)
        return operations.windows(values, begins, ends)

    def _distinct(self, item_ids: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the distinct items, and the index among them of each item, in the order of `item_ids`."""
        if not self.execution.kernels:
            return tf.unique(tf.concat(item_ids, axis=0))
        return operations.distinct_ids(item_ids)

    def _hide(
        self,
        candidate: tf.Tensor,
        history: tf.Tensor,
        history_lengths: tf.Tensor,
        example_ids: tf.Tensor,
        epoch: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns candidates and histories in which the ids of a share of the items are hidden.

        An example hides an item everywhere, as candidate and in its history, because a new item is unknown everywhere.
        """
        keys = hash64(self.seed, _HIDING, epoch, example_ids)
        items = tf.concat([candidate, history], axis=0)
        of_positions = tf.repeat(tf.tile(keys, [len(self._histories)]), history_lengths)
        random = hash64(tf.concat([keys, of_positions], axis=0), items)
        items = tf.where(random < tf.constant(int(self.hidden_rate * 2**64), tf.uint64), -items, items)
        return items[: tf.size(candidate)], items[tf.size(candidate) :]


def side_counts(
    store: EventStore, examples: Examples, max_history_length: int, encodings: Iterable[Encoding]
) -> dict[str, np.ndarray]:
    """Returns at how many history positions of a split each row of side information occurs, by its name.

    Args:
        store: the events.
        examples: of the split. The draws of an event are counted with it.
        max_history_length: as of `BatchMaker`.
        encodings: of the features of behaviours.
    """
    maker = BatchMaker(store, examples, max_history_length, 0, _NEGATIVES)
    counts = {encoding.spec.name: np.zeros(encoding.num_rows) for encoding in encodings}
    for first in range(0, examples.num_examples, _COUNTED_AT_ONCE):
        end = min(first + _COUNTED_AT_ONCE, examples.num_examples)
        batch = maker.batch(tf.range(first, end, dtype=tf.int64), tf.constant(0, tf.int64))
        for name, rows in batch.sides.items():
            counts[name] += np.bincount(tf.gather(rows, batch.side_index).numpy(), minlength=len(counts[name]))
    return counts


def run_of_feature(
    keys: tf.Tensor, bounds: tuple[tf.Tensor, tf.Tensor], feature: tf.Tensor, end: tf.Tensor, num_halvings: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where a user's behaviours with a feature begin that come before an end, and where these end.

    Args:
        keys: int64, as of `HistorySet`.
        bounds: int64 `[B]` each, where each user's behaviours begin and end.
        feature: int64 `[B]`; there is no behaviour for 0, which is unknown.
        end: int64 `[B]`, the place in the order of time.
        num_halvings: `ceil(log2(longest + 1))` for the user with the most behaviours.
    """
    last = tf.size(keys, tf.int64) - 1  # without keys there are no halvings, so none is read
    first_key = tf.bitwise.left_shift(feature, tf.constant(KEY_BITS, tf.int64))

    def place_of(wanted: tf.Tensor) -> tf.Tensor:
        def is_passed(place: tf.Tensor) -> tf.Tensor:
            return tf.gather(keys, tf.minimum(place, last)) < wanted

        return first_not(is_passed, *bounds, num_halvings)

    behind = place_of(first_key | end)
    return tf.where(feature == UNKNOWN_ID, behind, place_of(first_key)), behind


def training_batches(
    maker: BatchMaker,
    config: DataConfig,
    *,
    global_batch_size: int,
    steps: range,
    shard: Shard | None = None,
    num_parallel_calls: int = 2,
) -> tf.data.Dataset:
    """Returns a shard's batches of the updates `steps`, counted from 0 through all epochs.

    Together the shards see every example exactly once an epoch, whatever their number. Update s of an epoch takes
    examples s * G to (s + 1) * G - 1 of its order, G being the global batch size, and the shards divide those. With
    `group_negatives` they divide them so that shards that wait for each other have histories of nearly equal length.

    Args:
        maker: by `BatchMaker.for_training`.
        config: of the data.
        global_batch_size: examples of an update over all shards.
        steps: the updates.
        shard: the part of each update; None: all of it.
        num_parallel_calls: batches that are made at a time.
    """
    examples, shard = maker.examples, shard or Shard()
    shard_index, num_shards = shard.index, shard.count
    num_examples = examples.num_examples
    together = examples.draws_per_row if config.group_negatives else 1  # these examples stay neighbours in the order
    per_epoch = num_steps_per_epoch(num_examples, global_batch_size)
    dealers = _dealers(shard_index, num_shards) if config.group_negatives else range(shard_index, shard_index + 1)

    def make(step: tf.Tensor) -> Batch:
        epoch = step // per_epoch
        first = step % per_epoch * global_batch_size
        total = tf.minimum(num_examples - first, global_batch_size)
        begin, end = share(total, shard_index, num_shards)
        dealt_begin, dealt_end = share(total, dealers[0], num_shards)[0], share(total, dealers[-1], num_shards)[1]
        order = tf.stack([tf.constant(maker.seed, tf.int64), epoch])
        # A rank that gets no example looks at one all the same, because index_shuffle refuses an empty vector.
        place = tf.minimum(first + dealt_begin, num_examples - 1)
        last = tf.maximum(first + dealt_end - 1, place)
        groups = tf.random.experimental.index_shuffle(
            tf.range(place // together, last // together + 1), seed=order, max_index=num_examples // together - 1
        )
        ids = tf.reshape(groups[:, None] * together + tf.range(together, dtype=tf.int64), [-1])
        ids = ids[place % together :][: dealt_end - dealt_begin]
        if len(dealers) > 1:
            ids = deal(ids, -place % together, together, len(dealers), lambda few: maker.history_lengths(few, epoch))
        return maker.batch(ids[begin - dealt_begin : end - dealt_begin], epoch, of_update(first, total, order), step)

    def of_update(first: tf.Tensor, total: tf.Tensor, order: tf.Tensor) -> tf.Tensor | None:
        """Returns the examples of the whole update, for negatives that are drawn among its items."""
        if maker.popularity is None or not maker.popularity.in_batch:
            return None
        groups = tf.range(first // together, (first + total - 1) // together + 1)
        most = num_examples // together - 1
        groups = tf.random.experimental.index_shuffle(groups, seed=order, max_index=most)
        ids = tf.reshape(groups[:, None] * together + tf.range(together, dtype=tf.int64), [-1])
        return ids[first % together :][:total]

    return _mapped(tf.data.Dataset.range(steps.start, steps.stop), make, num_parallel_calls)


def _dealers(shard_index: int, num_shards: int) -> range:
    """Returns the shards that deal examples among themselves: a few, because each looks at the examples of all."""
    first = shard_index // MOST_DEALERS * MOST_DEALERS
    return range(first, min(first + MOST_DEALERS, num_shards))


def deal(
    ids: tf.Tensor,
    head: tf.Tensor,
    together: int,
    num_shards: int,
    history_lengths: Callable[[tf.Tensor], tf.Tensor],
) -> tf.Tensor:
    """Returns examples in an order in which `num_shards` equal runs have histories of nearly equal total length.

    From the longest to the shortest, groups of examples go to the shards in turn, to and fro. Within a shard their
    order stays. The examples before the first whole group and after the last one stay where they are.

    Args:
        ids: int64, the examples.
        head: int64, the number of examples before the first whole group.
        together: the number of examples of a group.
        num_shards: the number of runs.
        history_lengths: returns the length of each example's history.
    """
    head = tf.minimum(head, tf.size(ids, tf.int64))
    tail = head + (tf.size(ids, tf.int64) - head) // together * together
    groups = tf.reshape(ids[head:tail], [-1, together])
    turn = tf.range(tf.shape(groups)[0])
    there, seat = turn // num_shards % 2 == 0, turn % num_shards
    shard_in_turn = tf.where(there, seat, num_shards - 1 - seat)
    by_length = tf.argsort(history_lengths(groups[:, 0]), direction="DESCENDING")
    shard = tf.gather(shard_in_turn, tf.math.invert_permutation(by_length))
    dealt = tf.gather(groups, tf.argsort(shard, stable=True))
    return tf.concat([ids[:head], tf.reshape(dealt, [-1]), ids[tail:]], axis=0)


def evaluation_batches(
    store: EventStore,
    examples: Examples,
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    shard: Shard | None = None,
    graphs: bool = False,
    num_parallel_calls: int = 2,
) -> tf.data.Dataset:
    """Returns a shard's batches of a split, in order. Together the shards have each example exactly once.

    The draws depend on the event alone, so validation and test negatives stay the same from epoch to epoch.

    Args:
        store: the events.
        examples: of the split.
        config: of the data.
        seed: the seed of all draws.
        batch_size: examples of a batch.
        shard: the part of the split; None: all of it.
        graphs: as of `BatchMaker`.
        num_parallel_calls: batches that are made at a time.
    """
    maker = BatchMaker(store, examples, config.max_history_length, seed, _EVALUATION, graphs=graphs)
    shard = shard or Shard()
    first, end = share(examples.num_examples, shard.index, shard.count)

    def make(start: tf.Tensor) -> Batch:
        return maker.batch(tf.range(start, tf.minimum(start + batch_size, end)), tf.constant(0, tf.int64))

    starts = tf.data.Dataset.range(first, end, batch_size)
    return _mapped(starts, make, num_parallel_calls)


def read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields `batches`; a thread fetches each while the one before it is used.

    A data set has its next batch ready, but handing it to Python takes as long as some kernels of an update do.
    """
    with ThreadPoolExecutor(1, "read_ahead") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def _mapped(dataset: tf.data.Dataset, make: Callable[[tf.Tensor], Batch], num_parallel_calls: int) -> tf.data.Dataset:
    options = tf.data.Options()
    # tf.data's rewrites would copy every captured array into the graph: at 200 million events, 800 MB a worker.
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    options.deterministic = True
    make = tf.autograph.experimental.do_not_convert(make)  # it has no branches on tensors, and converting takes seconds
    return dataset.map(make, num_parallel_calls=num_parallel_calls).prefetch(2).with_options(options)
