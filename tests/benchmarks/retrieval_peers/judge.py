"""Ranks the whole catalogue for every test event by vectors, and compares systems with each other.

All systems, ours too, are judged by this one piece of code, which is that of `din_dist.cli.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from din_dist.config import DataConfig
from din_dist.data.event_store import EventStore
from din_dist.data.splits import Examples, item_counts, split_examples
from din_dist.distributed.runtime import Runtime
from din_dist.evaluation.confidence import Interval, intervals_of_sums
from din_dist.evaluation.retrieval import Askers, Queries, Task, Tick, by_user, queries_of, rank

VALIDATION, TEST = "validation", "test"
MOST_VALIDATED = 5000  # events of validation that are asked

Parts = Mapping[
    str, tuple[np.ndarray, np.ndarray]
]  # metric -> each user's share of numerator and denominator, [U] each


def asked(store: EventStore, splits: Mapping[str, Examples], longest: int) -> dict[str, Queries]:
    """Returns the events whose vectors are judged, by split: some of validation, and all of test.

    Args:
        store: the prepared data.
        splits: of the data.
        longest: the longest history.
    """
    most = {VALIDATION: MOST_VALIDATED, TEST: splits[TEST].num_rows}
    return {name: queries_of(store, splits[name], longest, number) for name, number in most.items()}


class Measured(NamedTuple):
    """A metric or a difference of two, with its 95 % interval over users."""

    value: float
    interval: Interval


class VectorScorer:
    """Scores an item by its largest product with a user's vectors.

    Args:
        events: int64 `[E]`, ascending, the events that vectors are given for.
        users: float32 `[E, K, H]`.
        items: float32 `[I + 1, H]`; row 0 is no item.
    """

    def __init__(self, events: np.ndarray, users: np.ndarray, items: np.ndarray) -> None:
        self._events, self._users, self._items = events, users, items[1:]

    def of_all(
        self, history_item_ids: np.ndarray, history_lengths: np.ndarray, tick: Tick, askers: Askers | None = None
    ) -> np.ndarray:
        """Returns the scores of all items for the events of `askers`, float32 `[B, I]`."""
        assert askers is not None
        users = self._users[np.searchsorted(self._events, askers.events)]
        found = users[:, 0] @ self._items.T
        for place in range(1, users.shape[1]):
            np.maximum(found, users[:, place] @ self._items.T, out=found)
        return found

    def of_some(
        self,
        history_item_ids: np.ndarray,
        history_lengths: np.ndarray,
        candidate_item_ids: np.ndarray,
        candidate_counts: np.ndarray,
        askers: Askers | None = None,
    ) -> np.ndarray:
        """All items are ranked here."""
        raise NotImplementedError


class Judge:
    """Measures recall, NDCG and hit rate of vectors on the events that are `asked`.

    Args:
        store: the prepared data.
        config: of the data.
        exclude_history: leave out items of the user's history, but never the target.
        k: the length of the lists.
        num_samples: bootstrap samples of users.
    """

    def __init__(
        self, store: EventStore, config: DataConfig, *, exclude_history: bool, k: int = 20, num_samples: int = 1000
    ) -> None:
        splits = split_examples(store, config)
        self._store, self._k, self._num_samples = store, k, num_samples
        self._asked = asked(store, splits, config.max_history_length)
        self._task = Task(0, exclude_history, seed=0)
        self._popularity = item_counts(store, splits)

    def parts(self, users: np.ndarray, items: np.ndarray) -> dict[str, Parts]:
        """Returns each user's share of the metrics of some vectors, as `VectorScorer` takes them, by split.

        Raises:
            ValueError: there are vectors of other events or items.
        """
        expected = (sum(map(len, self._asked.values())), self._store.facts.num_candidates + 1)
        if (len(users), len(items)) != expected:
            raise ValueError(f"vectors: must be of {expected} events and items. Received: {len(users), len(items)}.")
        own = np.split(users, np.cumsum([len(queries) for queries in self._asked.values()])[:-1])
        return {
            name: self._of(queries, VectorScorer(queries.events, vectors, items))
            for (name, queries), vectors in zip(self._asked.items(), own, strict=True)
        }

    def _of(self, queries: Queries, scorer: VectorScorer) -> Parts:
        positions = rank(self._store, queries, self._task, scorer, self._k, Runtime())
        found = by_user(queries, positions, self._popularity, [self._k])
        return {name: found[f"{name}@{self._k}"] for name in ("recall", "ndcg", "hit_rate")}

    def measure(self, parts: Parts) -> dict[str, Measured]:
        """Returns the metrics of a system, given its `parts`."""
        bounds = intervals_of_sums(parts, self._num_samples, seed=0)
        return {
            name: Measured(float(above.sum() / below.sum()), bounds[name]) for name, (above, below) in parts.items()
        }

    def compare(self, ours: Parts, theirs: Parts) -> dict[str, Measured]:
        """Returns our metrics less theirs, over the same samples of users, so that their common chance drops out."""
        return self.measure({name: (ours[name][0] - theirs[name][0], ours[name][1]) for name in ours})
