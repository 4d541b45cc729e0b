"""Retrieval metrics: how near the top each chosen item stands. Arithmetic on whole arrays, exact, in float64.

A query is one event: the item that was really chosen, the target, among candidates. `greater` candidates score higher
than the target, and `tied` other candidates score exactly as high. The target is then at any position from greater + 1
to greater + tied + 1 with the same chance. Every metric is the expected value over those positions. A model that
scores all candidates alike therefore gets what chance would give it.
"""

from __future__ import annotations

import numpy as np

_LISTS_AT_ONCE = 1024


def recall_at(k: int, greater: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Returns the chance that each target is among the first `k`, `[E]`; 0 or 1 unless the target is tied."""
    return np.clip(k - greater, 0, tied + 1) / (tied + 1)


def ndcg_at(k: int, greater: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Returns 1 / log2(1 + position) for each query, `[E]`, and 0 beyond `k`. The ideal of one target is 1."""
    return _mean_over_positions(1 / np.log2(np.arange(2, k + 2)), greater, tied)


def reciprocal_rank(greater: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Returns 1 / position for each query, `[E]`."""
    last = int((greater + tied).max(initial=0)) + 1
    return _mean_over_positions(1 / np.arange(1, last + 1), greater, tied)


def hit_rate_by_user(recall: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct `users`, ascending, and the chance of each that at least one of their events is a hit.

    Args:
        recall: `[E]`, as from `recall_at`.
        users: int `[E]`.
    """
    found, user_of = np.unique(users, return_inverse=True)
    missed = np.ones(len(found))
    np.multiply.at(missed, user_of.reshape(-1), 1 - recall)
    return found, 1 - missed


def coverage(top_items: np.ndarray, num_items: int) -> float:
    """Returns the share of the catalogue that occurs in at least one of the lists `[E, k]`; 0 in a list is no item."""
    return len(np.setdiff1d(top_items, [0])) / num_items if num_items else float("nan")


def pairs_that_differ(top_items: np.ndarray, category_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many pairs of items of each list differ in category, and how many pairs there are, int64 `[E]` each.

    Their ratio is the diversity of Cen et al. 2020 (ComiRec).

    Args:
        top_items: int `[E, k]`; 0 is no item.
        category_of: int `[num_items + 1]`.
    """
    differ = np.zeros(len(top_items), np.int64)
    for first in range(0, len(top_items), _LISTS_AT_ONCE):
        items = top_items[first : first + _LISTS_AT_ONCE]
        categories, real = category_of[items], items > 0
        both = real[:, :, None] & real[:, None, :]
        unequal = categories[:, :, None] != categories[:, None, :]
        differ[first : first + len(items)] = (both & unequal).sum(axis=(1, 2)) // 2
    lengths = (top_items > 0).sum(axis=1).astype(np.int64)
    return differ, lengths * (lengths - 1) // 2


def _mean_over_positions(gains: np.ndarray, greater: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Returns the mean of `gains` over the positions of each query, `[E]`. Gains beyond the end of the array are 0."""
    sums = np.concatenate([[0.0], np.cumsum(gains)])
    first, end = (np.minimum(positions, len(gains)) for positions in (greater, greater + tied + 1))
    return (sums[end] - sums[first]) / (tied + 1)
