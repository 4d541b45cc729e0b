"""95 % confidence intervals of the metrics of a split, by resampling users."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from din_dist.metrics.bootstrap import RatiosOfSums, WeightedAuc, intervals
from din_dist.metrics.ranking import aucs_by_user, log_losses

_MAX_WORK = 2_000_000_000  # values read over all samples: about 10 s
_FEWEST_SAMPLES = 100  # fewer give no usable interval

Interval = tuple[float, float]


def affordable_samples(wanted: int, num_values: int) -> int:
    """Returns how many of the `wanted` samples take about 10 s, but at least 100 of them."""
    return min(wanted, max(_FEWEST_SAMPLES, _MAX_WORK // max(num_values, 1)))


def intervals_of_scores(
    scores: np.ndarray, labels: np.ndarray, users: np.ndarray, draws_per_row: int | None, num_samples: int, seed: int
) -> dict[str, Interval]:
    """Returns the intervals of `gauc`, `auc`, `log_loss` and, if negatives are drawn, `pairwise_gauc`.

    Args:
        scores: logits `[M]`.
        labels: `[M]` in {0, 1}.
        users: int `[M]`.
        draws_per_row: one positive and its drawn negatives; None if the log has labels.
        num_samples: the number of bootstrap samples.
        seed: the seed of the bootstrap samples.
    """
    found, user_of = np.unique(users, return_inverse=True)
    aucs, impressions = aucs_by_user(scores, labels, users)
    counted = np.where(np.isnan(aucs), 0, impressions)
    parts = {
        "gauc": (np.where(counted, aucs, 0) * counted, counted),
        "log_loss": (np.bincount(user_of, log_losses(scores, labels), len(found)), impressions),
    }
    if draws_per_row is not None:
        pairs = scores.reshape(-1, draws_per_row)
        wins = (pairs[:, :1] > pairs[:, 1:]).sum(axis=1)
        num_rows = impressions / draws_per_row
        parts["pairwise_gauc"] = (
            np.bincount(user_of[::draws_per_row], wins, len(found)),
            num_rows * (draws_per_row - 1),
        )
    ratios, area = RatiosOfSums(parts), WeightedAuc(scores, labels, user_of)
    bounds = intervals(lambda weights: np.append(ratios(weights), area(weights)), len(found), num_samples, seed)
    return _named((*ratios.names, "auc"), bounds)


def intervals_of_sums(
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]], num_samples: int, seed: int
) -> dict[str, Interval]:
    """Returns the intervals of metrics that are ratios of sums over users; for `parts` see `RatiosOfSums`."""
    ratios = RatiosOfSums(parts)
    num_users = len(next(iter(parts.values()))[0])
    return _named(ratios.names, intervals(ratios, num_users, num_samples, seed))


def _named(names: tuple[str, ...], bounds: np.ndarray) -> dict[str, Interval]:
    return {name: (float(low), float(high)) for name, (low, high) in zip(names, bounds, strict=True)}
