"""Retrieval metrics of queries with several targets each. Arithmetic on whole arrays, in float64.

As in `metrics/retrieval.py`, `greater` candidates score higher than a target, and `tied` other candidates score exactly
as high, among them other targets. All orders of a tie have the same chance, and every metric is the expected value.

Letters of shapes: E queries, M targets of all of them, R runs: the targets of a query that are tied with each other.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from din_dist.metrics.retrieval import ndcg_at, recall_at


class _Runs(NamedTuple):
    """Targets of one query that have one score; int64 `[R]` each."""

    query: np.ndarray
    greater: np.ndarray
    size: np.ndarray  # the candidates with this score
    targets: np.ndarray  # how many of them are targets


@dataclasses.dataclass(frozen=True, eq=False)
class SeveralTargets:
    """The targets of E queries, and how near the top they stand.

    Attributes:
        query_of: int64 `[M]`, the query of each target.
        greater: int64 `[M]`.
        tied: int64 `[M]`.
        num_queries: E. A query without a target has 0 in every metric.
    """

    query_of: np.ndarray
    greater: np.ndarray
    tied: np.ndarray
    num_queries: int

    @functools.cached_property
    def num_targets(self) -> np.ndarray:
        """The number of targets of each query, int64 `[E]`."""
        return np.bincount(self.query_of, minlength=self.num_queries)

    @functools.cached_property
    def _runs(self) -> _Runs:
        rows = np.stack([self.query_of, self.greater, self.tied + 1], axis=1)
        found, targets = np.unique(rows, axis=0, return_counts=True)
        return _Runs(found[:, 0], found[:, 1], found[:, 2], targets)

    def recall_at(self, k: int) -> np.ndarray:
        """Returns the share of each query's targets that is among the first `k`, `[E]`."""
        found = self._sums(recall_at(k, self.greater, self.tied))
        return found / np.maximum(self.num_targets, 1)

    def hit_at(self, k: int) -> np.ndarray:
        """Returns the chance that at least one target of each query is among the first `k`, `[E]`."""
        sure, last, chances = self._hits_at(k)
        missed = np.ones(self.num_queries)
        missed[last.query] = chances[:, 0]
        return 1 - np.where(sure > 0, 0.0, missed)

    def ndcg_at(self, k: int, *, ideal_of_hits: bool = False) -> np.ndarray:
        """Returns the discounted gain of each query's targets among the first `k`, over the ideal, `[E]`.

        A target at position p gains 1 / log2(1 + p). Ideally, as many targets as fit stand first.

        Args:
            k: the length of the list.
            ideal_of_hits: the ideal has only the targets that were found. So one that was found first gives 1, however
                many others were not. Source: ComiRec's `evaluate_full` in src/train.py.
        """
        gains = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
        found = self._sums(ndcg_at(k, self.greater, self.tied))
        if not ideal_of_hits:
            return found / gains[np.clip(self.num_targets, 1, k)]
        sure, last, chances = self._hits_at(k)
        of_sure = found.copy()
        slots = k - last.greater
        of_hit = (gains[k] - gains[last.greater]) / slots  # of a target of the last run that is among the first k
        of_sure[last.query] -= last.targets * slots / last.size * of_hit
        found = of_sure / gains[np.maximum(sure, 1)]
        hits = np.arange(chances.shape[1])  # x more are found, with each chance
        dcg = of_sure[last.query][:, None] + hits * of_hit[:, None]
        found[last.query] = (chances * dcg / gains[np.clip(sure[last.query][:, None] + hits, 1, k)]).sum(axis=1)
        return found

    def first_reciprocal_rank(self) -> np.ndarray:
        """Returns 1 / position of the first target of each query, `[E]`."""
        runs = self._runs
        best = np.unique(runs.query, return_index=True)[1]  # runs are in the order of `greater`
        shapes = np.stack([runs.greater[best], runs.size[best], runs.targets[best]], axis=1)
        different, shape_of = np.unique(shapes, axis=0, return_inverse=True)
        values = np.array([_mean_reciprocal_of_first(*map(int, shape)) for shape in different], np.float64)
        found = np.zeros(self.num_queries)
        found[runs.query[best]] = values[shape_of.reshape(-1)]
        return found

    def _sums(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.query_of, values, self.num_queries).astype(np.float64)

    def _hits_at(self, k: int) -> tuple[np.ndarray, _Runs, np.ndarray]:
        """Finds how many targets are among the first `k`.

        Returns:
            How many targets of each query are there in every order, int64 `[E]`. The runs of which only a part fits,
            at most one a query. The chance that x targets of each of these are there, float64 `[R, 1 + most]`.
        """
        runs = self._runs
        fits = runs.greater + runs.size <= k
        sure = np.bincount(runs.query[fits], runs.targets[fits], self.num_queries).astype(np.int64)
        last = _Runs(*(values[~fits & (runs.greater < k)] for values in runs))
        slots, size, targets = k - last.greater, last.size, last.targets
        most = int(np.minimum(slots, targets).max(initial=0))
        hits = np.arange(most + 1)
        chances = np.zeros((len(size), most + 1))
        chances[:, 0] = 1
        for placed in range(int(targets.max(initial=0))):  # targets take places among those left, one after the other
            left = np.maximum(size - placed, 1)[:, None]
            is_hit = np.where((targets > placed)[:, None], np.maximum(slots[:, None] - hits, 0) / left, 0.0)
            chances, hit = chances * (1 - is_hit), chances * is_hit
            chances[:, 1:] += hit[:, :-1]
        return sure, last, chances


def _mean_reciprocal_of_first(greater: int, size: int, targets: int) -> float:
    """Returns the mean of 1 / position of the first of some targets among `size` candidates that are tied.

    Args:
        greater: the candidates above the tie.
        size: the candidates in it.
        targets: how many of them are targets.
    """
    before = np.arange(size - targets + 1)
    # The chance that none of the first j is a target, given that none of the first j - 1 is.
    goes_on = (size - targets - before) / (size - before)
    reaches = np.concatenate([[1.0], np.cumprod(goes_on)[:-1]])
    return float((reaches * (1 - goes_on) / (greater + 1 + before)).sum())
