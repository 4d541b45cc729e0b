"""How much a model owes to each feature: its metric, less the metric when the feature's values are permuted.

The model is not trained again. A permuted feature has the same values, but tells nothing about the example (Breiman
2001, "Random Forests"). A feature of users is permuted among the users of the split, one of events among its events,
and one of items among all items, as candidates and in histories. Features that tell the same share their worth: each of
them seems worth little while the model has the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from din_dist.data.event_store import EventStore
from din_dist.data.splits import Examples
from din_dist.evaluation.confidence import affordable_samples, intervals_of_sums
from din_dist.features.encoding import StoredFeature
from din_dist.features.spec import Kind, Owner
from din_dist.metrics.bootstrap import WeightedAuc, intervals
from din_dist.metrics.ranking import auc, aucs_by_user
from din_dist.tables.values import places_of

_NUM_SAMPLES = 1000


class Difference(NamedTuple):
    """How much better one ranking of examples is than another.

    Attributes:
        metric: "GAUC", or "AUC" where no user has examples of both labels.
        value: the metric of the one less that of the other.
        low: bound of the 95 % interval, by resampling users; both metrics are of the same users.
        high: likewise.
    """

    metric: str
    value: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """True if the interval does not include 0."""
        return self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True)
class Gain:
    """The worth of a feature.

    Attributes:
        name: of the feature.
        owner: whose it is.
        metric: "GAUC", or "AUC" where no user has examples of both labels.
        value: the metric less the one with permuted values: positive if the model ranks better by the feature.
        low: bound of the 95 % interval, by resampling users; both metrics are of the same users.
        high: likewise.
    """

    name: str
    owner: str
    metric: str
    value: float
    low: float
    high: float


def gains(
    store: EventStore,
    examples: Examples,
    labels: np.ndarray,
    logits: np.ndarray,
    logits_with: Callable[[EventStore, Owner], np.ndarray],
    seed: int,
) -> Iterator[Gain]:
    """Yields the gain of each feature.

    Args:
        store: the data.
        examples: of the split, M of them.
        labels: `[M]` in {0, 1}.
        logits: `[M]`, those of the model.
        logits_with: returns the logits `[M]` of the model on data in which a feature of that owner is permuted.
        seed: of the permutations and of the bootstrap.
    """
    owners = dict.fromkeys(store.item_features, Owner.ITEM)
    owners |= {name: feature.encoding.spec.owner for name, feature in store.features.items()}
    users = examples.user_of_example()
    for number, (name, owner) in enumerate(owners.items()):
        random = np.random.default_rng([seed, number])
        if name in store.features and store.features[name].encoding.spec.kind is Kind.TIME_SINCE:
            other = logits_with(with_permuted_times(store, random), owner)
        else:
            other = logits_with(permuted(store, name, _order(store, examples, owner, random)), owner)
        yield Gain(name, str(owner), *difference(logits, other, labels, users, seed))


def permuted(store: EventStore, name: str, order: np.ndarray) -> EventStore:
    """Returns the data with another order of a feature's values: row i has the value that row `order[i]` had.

    Of a feature of offers, the circumstances of events are permuted: items are offered as at another event.
    """
    if name in store.item_features:
        return dataclasses.replace(
            store, item_features={**store.item_features, name: np.ascontiguousarray(store.item_features[name][order])}
        )
    feature = store.features[name]
    return dataclasses.replace(store, features={**store.features, name: _permuted(feature, order)})


def with_permuted_times(store: EventStore, random: np.random.Generator) -> EventStore:
    """Returns the data with the times of each history's behaviours in another order."""
    found = []
    for history in store.histories(0):
        rows = np.arange(len(history.item_ids)) if history.rows is None else history.rows
        times = store.behaviour_times[rows] if history.times is None else history.times
        found.append(dataclasses.replace(history, times=random.permutation(times)))
    if store.sets:
        return dataclasses.replace(store, sets=tuple(found))
    return dataclasses.replace(store, history_times=found[0].times)


def _permuted(feature: StoredFeature, order: np.ndarray) -> StoredFeature:
    if feature.offers is not None:
        circumstances = np.ascontiguousarray(feature.offers.circumstances[order])
        return dataclasses.replace(feature, offers=dataclasses.replace(feature.offers, circumstances=circumstances))
    if feature.offsets is None:
        return dataclasses.replace(feature, values=np.ascontiguousarray(feature.values[order]))
    places, offsets = places_of(feature.offsets, order)
    weights = None if feature.weights is None else feature.weights[places]
    return dataclasses.replace(feature, values=feature.values[places], offsets=offsets, weights=weights)


def _order(store: EventStore, examples: Examples, owner: Owner, random: np.random.Generator) -> np.ndarray:
    """Returns the permuted rows of an owner; those that the split does not have stay."""
    match owner:
        case Owner.ITEM:
            order, rows = np.arange(store.facts.num_items + 1), np.arange(1, store.facts.num_items + 1)
        case Owner.HISTORY:
            return random.permutation(len(store.behaviour_times))
        case Owner.USER:
            order, rows = np.arange(store.facts.num_users), np.unique(examples.users).astype(np.int64)
        case _:
            order, rows = np.arange(store.facts.num_events), examples.events()
    order[rows] = random.permutation(rows)
    return order


def difference(
    ours: np.ndarray,
    others: np.ndarray,
    labels: np.ndarray,
    users: np.ndarray,
    seed: int,
    num_samples: int = _NUM_SAMPLES,
) -> Difference:
    """Compares two rankings of the same examples.

    Args:
        ours: scores `[M]`.
        others: scores `[M]`.
        labels: `[M]` in {0, 1}.
        users: int `[M]`.
        seed: of the bootstrap.
        num_samples: the most samples of the bootstrap.
    """
    (own, impressions), (other, _) = (aucs_by_user(scores, labels, users) for scores in (ours, others))
    counted = np.where(np.isnan(own), 0, impressions)
    if counted.any():
        weighted = np.where(counted, own - other, 0) * counted
        affordable = affordable_samples(num_samples, len(counted))
        low, high = intervals_of_sums({"gain": (weighted, counted)}, affordable, seed)["gain"]
        return Difference("GAUC", float(weighted.sum() / counted.sum()), low, high)
    found, user_of = np.unique(users, return_inverse=True)
    areas = [WeightedAuc(scores, labels, user_of) for scores in (ours, others)]
    affordable = affordable_samples(num_samples, len(labels))
    ((low, high),) = intervals(lambda weights: areas[0](weights) - areas[1](weights), len(found), affordable, seed)
    value = auc(ours, labels) - auc(others, labels)
    return Difference("AUC", value if math.isfinite(value) else math.nan, float(low), float(high))
