"""Walks over many events in parts that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

EVENTS_AT_ONCE = 10_000_000  # bounds the memory


def parts(length: int, at_once: int | None = None) -> Iterator[slice]:
    """Yields the slices of an array of some length, one after the other. None: of `EVENTS_AT_ONCE` values."""
    at_once = at_once or EVENTS_AT_ONCE
    return (slice(first, min(first + at_once, length)) for first in range(0, length, at_once))


def windows(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the integers of all windows, concatenated, int64.

    Args:
        starts: int64 `[R]`, the first of each window.
        lengths: int64 `[R]`.
    """
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def user_runs(ends: np.ndarray, at_once: int | None = None) -> Iterator[tuple[int, int]]:
    """Yields first and end of runs of users, one after the other.

    Args:
        ends: int64 `[U]`, the number of events of each user and all before.
        at_once: about how many events a run has, but at least one user. None: `EVENTS_AT_ONCE`.
    """
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + (at_once or EVENTS_AT_ONCE), side="right")))
        yield first, end
        first = end
