"""What the model looks at: the attention weights of real examples, and of many of them on average."""

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
from din_dist.models.ranking_model import RankingModel
from din_dist.report.scoring import MODEL, Scored, probabilities

_PER_KIND = 2
_MOST_SHOWN = 15  # behaviours of one example
_OF_A_LONG_ONE = 12
_MOST_AVERAGED = 20_000  # examples
_AGES = (1, 2, 3, 6, 11, 21, 51, 101, 1001)  # where ranges of ages begin, 1 being the newest behaviour


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """A history position. `age` 1 is the newest; `weight` None where all count the same."""

    age: int
    item: str
    category: str
    same_item: bool
    same_category: bool
    weight: float | None


@dataclasses.dataclass(frozen=True)
class Shown:
    """A real example. `behaviours`: newest first, of a long history the heaviest; the others are `num_rest`."""

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


@dataclasses.dataclass(frozen=True)
class Averages:
    """Over `num_examples` with two behaviours or more. `by_age`: name, mean weight over the equal share, positions.

    `same`: name of what behaviour and candidate share, examples where some behaviours do and some do not, these
    behaviours' share of the history and of the attention.
    """

    num_examples: int
    by_age: list[tuple[str, float, int]]
    same: list[tuple[str, int, float, float]]


def choose(scored: Scored, per_kind: int = _PER_KIND) -> dict[str, list[int]]:
    """Examples to look at, by kind: confidently right and wrong ones, and long histories; a user comes once.

    The same examples give the same choice. Very short histories, where there is little to see, come last.
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
            places = np.flatnonzero(eligible & (lengths > 0))
            found: list[int] = []
            for place in places[np.argsort(key[places], kind="stable")]:
                if len(found) == per_kind:
                    break
                if int(scored.users[place]) not in used:
                    used.add(int(scored.users[place]))
                    found.append(int(place))
            chosen[kind] += found
    return chosen


def show(
    model: RankingModel,
    config: Config,
    store: EventStore,
    examples: Examples,
    chosen: Mapping[str, Sequence[int]],
) -> list[Shown]:
    """The chosen ones of `examples` with the weights of their histories, in the ids of the log."""
    wanted = np.array(sorted({place for places in chosen.values() for place in places}), np.int64)
    if not len(wanted):
        return []
    # Its users only, of whose batches the chosen examples are then taken.
    segment_of = np.searchsorted(examples.row_ends, wanted // examples.draws_per_row, side="right")
    segments = np.unique(segment_of)
    before = np.cumsum(examples.rows_per_user())[segments] - examples.rows_per_user()[segments]
    smaller = of_segments(examples, segments)
    new_before = np.concatenate([[0], np.cumsum(smaller.rows_per_user())[:-1]])
    place_in = np.searchsorted(segments, segment_of)
    new_places = wanted + (new_before - before)[place_in] * examples.draws_per_row
    found: dict[int, _Example] = {}
    for example in _examples(model, config, store, smaller):
        if example.place in new_places:
            found[int(wanted[np.searchsorted(new_places, example.place)])] = example
    items = np.unique(np.concatenate([[e.candidate, *e.history] for e in found.values()]).astype(np.int64))
    item_names = dict(zip(items.tolist(), store.own_ids(ITEMS, items), strict=True))
    feature, of_item = next(iter(store.item_features.items()), ("", np.zeros(store.facts.num_items + 1, np.int32)))
    categories = np.unique(of_item[items])
    names = store.own_ids(vocabulary_of(feature), categories) if feature else [""]
    category_names = dict(zip(categories.tolist(), names, strict=True))
    users = store.own_ids(USERS, examples.user_of_example()[wanted] + 1)  # users count from 0
    user_names = dict(zip(wanted.tolist(), users, strict=True))
    return [
        _shown(kind, found[place], user_names[place], item_names, category_names, of_item)
        for kind, places in chosen.items()
        for place in places
    ]


def averages(model: RankingModel, config: Config, store: EventStore, examples: Examples) -> Averages | None:
    """Where the attention goes on average; None where the weights are no shares (or there are none)."""
    if config.model.attention_normalization is not AttentionNormalization.SOFTMAX:
        return None
    features = {"item": np.arange(store.facts.num_items + 1)}
    features |= {schema.feature_label(name): of_item for name, of_item in store.item_features.items()}
    starts = np.array(_AGES)
    totals, counts, num_examples = np.zeros(len(starts)), np.zeros(len(starts), np.int64), 0
    shares: dict[str, list[tuple[float, float]]] = {name: [] for name in features}
    for example in _examples(model, config, store, thin_out(examples, _MOST_AVERAGED)):
        length = len(example.history)
        if example.weights is None:
            return None
        if length < 2:
            continue
        num_examples += 1
        part = np.searchsorted(starts, np.arange(length, 0, -1), side="right") - 1
        totals += np.bincount(part, example.weights * length, len(starts))
        counts += np.bincount(part, minlength=len(starts))
        for name, of_item in features.items():
            same = of_item[example.history] == of_item[example.candidate]
            if of_item[example.candidate] and same.any() and not same.all():
                shares[name].append((float(same.mean()), float(example.weights[same].sum())))
    if not num_examples:
        return None
    ends = [*(starts[1:] - 1), None]
    names = [
        f"{low:,}" if low == high else f"{low:,}–{high:,}" if high else f"{low:,} and more"
        for low, high in zip(starts, ends, strict=True)
    ]
    by_age = [
        (name, float(total / count), int(count))
        for name, total, count in zip(names, totals, counts, strict=True)
        if count
    ]
    same = [(name, len(pairs), *map(float, np.mean(pairs, axis=0))) for name, pairs in shares.items() if pairs]
    return Averages(num_examples, by_age, same)


@dataclasses.dataclass(frozen=True)
class _Example:
    place: int
    candidate: int
    label: int
    probability: float
    history: np.ndarray  # item ids, oldest first
    weights: np.ndarray | None


def _examples(model: RankingModel, config: Config, store: EventStore, examples: Examples) -> Iterator[_Example]:
    batches = evaluation_batches(
        store,
        examples,
        config.data,
        seed=config.job.seed,
        batch_size=config.evaluation.evaluation_batch_size,
        shard_index=0,
        num_shards=1,
    )
    for batch in batches:
        weights = model.attention_weights(batch)
        clicks = probabilities(model(batch, training=False).numpy())
        ends = np.cumsum(batch.history_lengths.numpy())
        histories = np.split(batch.history_item_ids.numpy(), ends[:-1])
        parts = [None] * len(histories) if weights is None else np.split(weights.numpy().astype(np.float64), ends[:-1])
        columns = [field.numpy().tolist() for field in (batch.example_ids, batch.candidate_item_ids, batch.labels)]
        for place, candidate, label, probability, history, part in zip(
            *columns, clicks.tolist(), histories, parts, strict=True
        ):
            yield _Example(place, candidate, int(label), probability, history, part)


def _shown(
    kind: str,
    example: _Example,
    user: str,
    item_names: Mapping[int, str],
    category_names: Mapping[int, str],
    category_of: np.ndarray,
) -> Shown:
    length = len(example.history)
    weights = example.weights
    order = np.arange(length - 1, -1, -1)  # newest first
    if length > _MOST_SHOWN:
        size = np.zeros(length) if weights is None else np.abs(weights)
        heaviest = order[np.argsort(-size[order], kind="stable")[:_OF_A_LONG_ONE]]
        order = np.sort(heaviest)[::-1]
    category = int(category_of[example.candidate])
    behaviours = [
        Behaviour(
            age=int(length - place),
            item=item_names[int(example.history[place])],
            category=category_names[int(category_of[example.history[place]])],
            same_item=bool(example.history[place] == example.candidate),
            same_category=bool(category and category_of[example.history[place]] == category),
            weight=None if weights is None else float(weights[place]),
        )
        for place in order
    ]
    return Shown(
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
    )
