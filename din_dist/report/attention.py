"""Attention weights for the report: of a few real examples, and averages over many."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from din_dist import schema
from din_dist.config import AttentionNormalization, Config
from din_dist.data.event_store import ITEMS, USERS, EventStore, vocabulary_of
from din_dist.data.pipeline import evaluation_batches
from din_dist.data.splits import Examples
from din_dist.data.thinning import of_segments, thin_out
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.report.scoring import MODEL, ScoredExamples, probabilities

_PER_KIND = 2
_MOST_SHOWN = 15  # most behaviours of a history that is shown whole
_SHOWN_OF_LONGER = 12  # behaviours shown of a longer history
_MOST_AVERAGED = 20_000  # examples
_AGES = (1, 2, 3, 6, 11, 21, 51, 101, 1001)  # first age of each range; age 1 is the newest behaviour


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """A history position. `age` 1 is the newest. `weight` is None if the model has no attention."""

    age: int
    item: str
    category: str
    same_item: bool
    same_category: bool
    weight: float | None


@dataclasses.dataclass(frozen=True)
class ShownExample:
    """A real example with its attention weights.

    Attributes:
        kind: the reason why it is shown, such as "confidently wrong".
        behaviours: newest first; only the heaviest ones of a long history.
        num_rest: the number of behaviours that are not shown.
        weight_of_rest: the sum of their weights.
        history: the name of the history; empty if the model reads one.
    """

    kind: str
    user: str
    item: str
    category: str
    label: int
    probability: float
    history_length: int
    behaviours: Sequence[Behaviour]
    num_rest: int
    weight_of_rest: float
    history: str = ""


@dataclasses.dataclass(frozen=True)
class Averages:
    """Averages of the attention over examples with at least two behaviours in a history.

    Attributes:
        num_examples: the number of these examples.
        by_age: for each range of ages: its name, the mean weight relative to an equal share, the number of positions.
        same: for the item and each item feature, over the examples in which only some behaviours share it with the
            candidate: its name, the number of examples, these behaviours' share of the history and of the attention.
        history: its name; empty if the model reads one.
    """

    num_examples: int
    by_age: list[tuple[str, float, int]]
    same: list[tuple[str, int, float, float]]
    history: str = ""


def choose(scored: ScoredExamples, per_kind: int = _PER_KIND) -> dict[str, list[int]]:
    """Chooses examples to show, by kind: confidently right, confidently wrong, long history.

    A user occurs at most once. The choice is deterministic. Very short histories show little and are avoided.

    Args:
        scored: all examples.
        per_kind: the most examples of each kind and label.

    Returns:
        For each kind, the indices of its examples.
    """
    probability = probabilities(scored.rankings[MODEL])
    labels, lengths = scored.labels, scored.history_lengths
    with_history = lengths[lengths > 0]
    enough = lengths >= (min(5.0, float(np.median(with_history))) if len(with_history) else 1.0)
    clicked = labels == 1
    wanted = {
        "confidently right": [(clicked & enough, -probability), (~clicked & enough, probability)],
        "confidently wrong": [(clicked & enough, probability), (~clicked & enough, -probability)],
        "long history": [(clicked, -lengths), (~clicked, -lengths)],
    }
    chosen: dict[str, list[int]] = {}
    used: set[int] = set()
    for kind, orders in wanted.items():
        chosen[kind] = []
        for eligible, key in orders:
            candidates = np.flatnonzero(eligible & (lengths > 0))
            found: list[int] = []
            for index in candidates[np.argsort(key[candidates], kind="stable")]:
                if len(found) == per_kind:
                    break
                if int(scored.users[index]) not in used:
                    used.add(int(scored.users[index]))
                    found.append(int(index))
            chosen[kind] += found
    return chosen


def show(
    model: BehaviourModel,
    config: Config,
    store: EventStore,
    examples: Examples,
    chosen: Mapping[str, Sequence[int]],
) -> list[ShownExample]:
    """Returns the chosen examples with the weights of their histories, in the log's own ids.

    Of several histories each that has behaviours is there by itself.

    Args:
        model: gives the weights.
        config: the job's settings.
        store: gives the log's own ids.
        examples: of the split.
        chosen: indices of examples by kind, as from `choose`.
    """
    wanted = np.array(sorted({index for indices in chosen.values() for index in indices}), np.int64)
    if not len(wanted):
        return []
    # Only the users of the chosen examples are scored; the indices change to those among their examples.
    segment_of = np.searchsorted(examples.row_ends, wanted // examples.draws_per_row, side="right")
    segments = np.unique(segment_of)
    before = np.cumsum(examples.rows_per_user())[segments] - examples.rows_per_user()[segments]
    smaller = of_segments(examples, segments)
    new_before = np.concatenate([[0], np.cumsum(smaller.rows_per_user())[:-1]])
    new_segment_of = np.searchsorted(segments, segment_of)
    new_indices = wanted + (new_before - before)[new_segment_of] * examples.draws_per_row
    found: dict[int, list[WeighedExample]] = {int(index): [] for index in wanted}
    for example in weighed_examples(model, config, store, smaller):
        if len(example.history) and example.index in new_indices:
            found[int(wanted[np.searchsorted(new_indices, example.index)])].append(example)
    every = [[e.candidate, *e.history] for examples in found.values() for e in examples]
    items = np.unique(np.concatenate([[], *every]).astype(np.int64))
    item_names = dict(zip(items.tolist(), store.own_ids(ITEMS, items), strict=True))
    feature, of_item = next(iter(store.item_features.items()), ("", np.zeros(store.facts.num_items + 1, np.int32)))
    categories = np.unique(of_item[items])
    names = store.own_ids(vocabulary_of(feature), categories) if feature else [""]
    category_names = dict(zip(categories.tolist(), names, strict=True))
    users = store.own_ids(USERS, examples.user_of_example()[wanted] + 1)  # users count from 0
    user_names = dict(zip(wanted.tolist(), users, strict=True))
    return [
        _shown(kind, example, user_names[index], item_names, category_names, of_item)
        for kind, indices in chosen.items()
        for index in indices
        for example in found[index]
    ]


def averages(model: BehaviourModel, config: Config, store: EventStore, examples: Examples) -> list[Averages]:
    """Returns averages of the attention to each history; nothing if its weights do not sum to 1 or there are none."""
    if config.model.attention_normalization is not AttentionNormalization.SOFTMAX:
        return []
    features = {"item": np.arange(store.facts.num_items + 1)}
    features |= {schema.feature_label(name): of_item for name, of_item in store.item_features.items()}
    sums: dict[str, _Sums] = {}
    for example in weighed_examples(model, config, store, thin_out(examples, _MOST_AVERAGED)):
        if example.weights is None:
            return []
        if len(example.history) >= 2:
            sums.setdefault(example.name, _Sums(features)).add(example, example.weights)
    return [of_history.averages(name) for name, of_history in sums.items()]


class _Sums:
    """Sums over the examples of one history.

    Args:
        features: name -> of each item, the value that behaviours may share with the candidate.
    """

    def __init__(self, features: Mapping[str, np.ndarray]) -> None:
        self._features, self._starts = features, np.array(_AGES)
        self._totals, self._counts = np.zeros(len(_AGES)), np.zeros(len(_AGES), np.int64)
        self._shares: dict[str, list[tuple[float, float]]] = {name: [] for name in features}
        self._num_examples = 0

    def add(self, example: WeighedExample, weights: np.ndarray) -> None:
        length, num_ranges = len(example.history), len(self._starts)
        self._num_examples += 1
        range_of = np.searchsorted(self._starts, np.arange(length, 0, -1), side="right") - 1
        self._totals += np.bincount(range_of, weights * length, num_ranges)
        self._counts += np.bincount(range_of, minlength=num_ranges)
        for feature, of_item in self._features.items():
            same = of_item[example.history] == of_item[example.candidate]
            if of_item[example.candidate] and same.any() and not same.all():
                self._shares[feature].append((float(same.mean()), float(weights[same].sum())))

    def averages(self, history: str) -> Averages:
        ends = [*(self._starts[1:] - 1), None]
        ranges = [
            f"{low:,}" if low == high else f"{low:,}–{high:,}" if high else f"{low:,} and more"
            for low, high in zip(self._starts, ends, strict=True)
        ]
        by_age = [
            (ages, float(total / count), int(count))
            for ages, total, count in zip(ranges, self._totals, self._counts, strict=True)
            if count
        ]
        means = {feature: np.mean(pairs, axis=0).tolist() for feature, pairs in self._shares.items() if pairs}
        same = [(feature, len(self._shares[feature]), *means[feature]) for feature in means]
        return Averages(self._num_examples, by_age, same, history)


@dataclasses.dataclass(frozen=True)
class WeighedExample:
    index: int
    candidate: int
    label: int
    probability: float
    history: np.ndarray  # item ids, oldest first
    weights: np.ndarray | None
    name: str = ""  # of the history


def weighed_examples(
    model: BehaviourModel, config: Config, store: EventStore, examples: Examples
) -> Iterator[WeighedExample]:
    """Yields each history of `examples` in their order, with what the model makes of it."""
    names = [history.name for history in store.sets] or [""]
    batches = evaluation_batches(
        store,
        examples,
        config.data,
        seed=config.job.seed,
        batch_size=config.evaluation.evaluation_batch_size,
    )
    for batch in batches:
        weights = model.attention_weights(batch)
        clicks = probabilities(model.of_task(model(batch, training=False), config.main_task).numpy())
        columns = [
            field.numpy().tolist()
            for field in (batch.example_ids, batch.candidate_item_ids, model.of_task(batch.labels, config.main_task))
        ]
        ends = np.cumsum(batch.history_lengths.numpy())  # [S * B], the histories of all examples of each name in turn
        histories = np.split(batch.history_item_ids.numpy(), ends[:-1])
        weights_of: Sequence[np.ndarray | None] = [None] * len(histories)
        if weights is not None:
            weights_of = np.split(weights.numpy().astype(np.float64), ends[:-1])
        num_examples = len(columns[0])
        for place, (index, candidate, label, probability) in enumerate(zip(*columns, clicks.tolist(), strict=True)):
            for number, name in enumerate(names):
                own = place + number * num_examples
                yield WeighedExample(index, candidate, int(label), probability, histories[own], weights_of[own], name)


def _shown(
    kind: str,
    example: WeighedExample,
    user: str,
    item_names: Mapping[int, str],
    category_names: Mapping[int, str],
    category_of: np.ndarray,
) -> ShownExample:
    length = len(example.history)
    weights = example.weights
    order = np.arange(length - 1, -1, -1)  # newest first
    if length > _MOST_SHOWN:
        size = np.zeros(length) if weights is None else np.abs(weights)
        heaviest = order[np.argsort(-size[order], kind="stable")[:_SHOWN_OF_LONGER]]
        order = np.sort(heaviest)[::-1]
    category = int(category_of[example.candidate])
    behaviours = [
        Behaviour(
            age=int(length - position),
            item=item_names[int(example.history[position])],
            category=category_names[int(category_of[example.history[position]])],
            same_item=bool(example.history[position] == example.candidate),
            same_category=bool(category and category_of[example.history[position]] == category),
            weight=None if weights is None else float(weights[position]),
        )
        for position in order
    ]
    return ShownExample(
        kind=kind,
        user=user,
        item=item_names[example.candidate],
        category=category_names[category],
        label=example.label,
        probability=example.probability,
        history_length=length,
        behaviours=behaviours,
        num_rest=length - len(order),
        weight_of_rest=0.0 if weights is None else float(weights.sum() - weights[order].sum()),
        history=example.name,
    )
