"""How near the top each chosen item stands among its candidates: arithmetic on whole arrays, exact, in float64.

A query is one event: the item that was really chosen, the target, among candidates. Of those, `greater` score higher
than it and `tied` (itself not counted) exactly as high. Its place is then any of greater + 1 to greater + tied + 1 with
the same chance, and every figure is the expected value over those places: a model that scores all alike gets what
chance would give it, neither the best nor the worst.
"""

from __future__ import annotations

import numpy as np


def recall_at(k: int, greater: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """`[E]`: whether the target is among the first `k`; a chance where it is tied."""
    return np.clip(k - greater, 0, tied + 1) / (tied + 1)


def ndcg_at(k: int, greater: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """`[E]`: 1 / log2(1 + place), 0 beyond place `k`. With one target a query the ideal is 1."""
    return _mean_over_places(1 / np.log2(np.arange(2, k + 2)), greater, tied)


def reciprocal_rank(greater: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """`[E]`: 1 / place."""
    last = int((greater + tied).max(initial=0)) + 1
    return _mean_over_places(1 / np.arange(1, last + 1), greater, tied)


def hit_rate_by_user(recall: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The users among `users` `[E]`, ascending, and each one's chance that at least one of their events is a hit."""
    found, place = np.unique(users, return_inverse=True)
    missed = np.ones(len(found))
    np.multiply.at(missed, place.reshape(-1), 1 - recall)
    return found, 1 - missed


def coverage(top_items: np.ndarray, num_items: int) -> float:
    """Share of the catalogue that stands in at least one of the lists `[E, k]`; 0 in a list is no item."""
    return len(np.setdiff1d(top_items, [0])) / num_items if num_items else float("nan")


def _mean_over_places(gains: np.ndarray, greater: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Of each query, the mean of `gains` over its places, counted from 1; beyond the end of `gains` they are 0."""
    sums = np.concatenate([[0.0], np.cumsum(gains)])
    first, end = (np.minimum(places, len(gains)) for places in (greater, greater + tied + 1))
    return (sums[end] - sums[first]) / (tied + 1)
