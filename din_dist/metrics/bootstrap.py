"""Bootstrap confidence intervals. Whole users are resampled, because examples of one user are not independent.

Each sample draws as many users as there are, with replacement. A user drawn twice counts twice. Nothing is ranked or
scored again: a metric must follow from sums per user, or accept weights per user. The bounds of an interval are
percentiles of the metric over the samples (Efron 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

CONFIDENCE = 0.95
Statistic = Callable[[np.ndarray], np.ndarray]  # each user's weight, float64 `[U]`, to values `[M]`


def intervals(statistic: Statistic, num_users: int, num_samples: int, seed: int) -> np.ndarray:
    """Returns the low and high bound of each value of `statistic`: `[M, 2]`, NaN where no sample defines the value."""
    samples = np.stack([statistic(weights) for weights in user_weights(num_users, num_samples, seed)])  # [S, M]
    bounds = np.full((samples.shape[1], 2), np.nan)
    for number, values in enumerate(samples.T):
        if (defined := values[~np.isnan(values)]).size:
            bounds[number] = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return bounds


def user_weights(num_users: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields, for each sample, how often each user was drawn: float64 `[num_users]`."""
    random = np.random.default_rng(seed)
    for _ in range(num_samples):
        drawn = random.integers(num_users, size=num_users)
        yield np.bincount(drawn, minlength=num_users).astype(np.float64)


class RatiosOfSums:
    """Metrics that are one sum over users divided by another, such as means.

    Args:
        parts: metric name -> what each user adds to the numerator and to the denominator, `[U]` each.
    """

    def __init__(self, parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self.names = tuple(parts)
        pairs = [np.stack(pair, axis=1) for pair in parts.values()]
        self._sums = np.concatenate(pairs, axis=1, dtype=np.float64)  # [U, 2 M]

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        numerators, denominators = (weights @ self._sums).reshape(-1, 2).T
        return np.divide(numerators, denominators, out=np.full(len(numerators), np.nan), where=denominators > 0)


class WeightedAuc:
    """AUC over all examples, each with the weight of its user. The examples are sorted only once.

    Args:
        scores: `[M]`.
        labels: `[M]` in {0, 1}.
        user_of: int `[M]`, the index of each example's user among the weights.
    """

    def __init__(self, scores: np.ndarray, labels: np.ndarray, user_of: np.ndarray) -> None:
        order = np.argsort(scores, kind="stable")
        scores = np.asarray(scores)[order]
        self._user_of = np.asarray(user_of)[order]
        self._positive = np.asarray(labels)[order].astype(np.float64)
        self._tie_starts = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]])[: len(scores)])

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Returns the weighted share of (positive, negative) pairs that are won, `[1]`; a tie is half a win."""
        if not len(self._tie_starts):
            return np.array([np.nan])
        of_example = weights[self._user_of]
        positives = np.add.reduceat(of_example * self._positive, self._tie_starts)
        negatives = np.add.reduceat(of_example * (1 - self._positive), self._tie_starts)
        pairs = positives.sum() * negatives.sum()
        wins = positives @ (np.cumsum(negatives) - negatives / 2)
        return np.array([wins / pairs if pairs else np.nan])
