"""Cuts events into splits if histories are sessions: a session's first event has no history, so it is no example.

A user's examples of a split are then several runs of events. All else is as in `splits.py`: the same rules divide each
user's examples, and what is held out without being an example is `HISTORY`.

Letters of shapes: U users, X events that can be examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from din_dist.data.event_store import EventStore
from din_dist.data.walks import windows

Bounds = Mapping[str, tuple[np.ndarray, np.ndarray]]  # of each split, where each user's examples begin and end, [U]


def cut_sessions(
    store: EventStore,
    held_from: np.ndarray | None,
    bounds_of: Callable[[np.ndarray, np.ndarray], Bounds],
) -> dict[str, list[np.ndarray]]:
    """Returns the users, the row ends and the event bases of each split, as `Examples` has them, and of `HISTORY`.

    Args:
        store: the events, of a log without labels.
        held_from: int64 `[U]`, the first event of each user that is held out. None: the first example held out.
        bounds_of: returns the bounds of each split among the events that can be examples. It is given where each user's
            begin among them, int64 `[U + 1]`, and these events, int64 `[X]`.
    """
    can_be = np.flatnonzero(~store.begins_a_session)
    offsets = np.searchsorted(can_be, store.user_offsets)
    bounds = bounds_of(offsets, can_be)
    found = {}
    if held_from is None:
        first = bounds["validation"][0]
        beyond = np.append(can_be, 0)[np.minimum(first, len(can_be))]
        held_from = np.where(first < offsets[1:], beyond, store.user_offsets[1:])
    is_history = np.zeros(store.facts.num_events, bool)
    is_history[windows(held_from, store.user_offsets[1:] - held_from)] = True
    for name, (low, high) in bounds.items():
        events = can_be[windows(low, high - low)]
        found[name] = _runs(store, events)
        if name != "train":
            is_history[events] = False
    return found | {"history": _runs(store, np.flatnonzero(is_history))}


def _runs(store: EventStore, events: np.ndarray) -> list[np.ndarray]:
    """Returns users, row ends and event bases of events, ascending: of runs without a gap, each of one user."""
    users = np.searchsorted(store.user_offsets, events, side="right") - 1
    begins = np.flatnonzero(np.append(True, (np.diff(events) != 1) | (np.diff(users) != 0))[: len(events)])
    row_ends = np.append(begins[1:], len(events))[: len(begins)]
    return [users[begins], row_ends, events[begins] - begins]
