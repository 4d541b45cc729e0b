"""Cuts histories: which behaviours, that is positive events, each event may see.

Letters of shapes: U users, E events, P positive events.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from din_dist.data.blocks import Block
from din_dist.schema import HistoryRule


class CutHistories(NamedTuple):
    """The behaviours of some users, and where the history of each of their events ends.

    The history of event e of user u is `item_ids[offsets[u] : ends[e]]`.
    """

    offsets: np.ndarray  # int64 [U + 1], where each user's behaviours begin
    item_ids: np.ndarray  # int32 [P], of each user in the order of time
    times: np.ndarray  # int64 [P], when each happened
    ends: np.ndarray  # int64 [E]


def cut_histories(block: Block, rule: HistoryRule, delay: int = 0) -> CutHistories:
    """Cuts the histories of whole users.

    Args:
        block: their events.
        rule: `BEFORE_TIME`: a history has the behaviours that are known before the time of the event's request.
            `BEFORE_EVENT`: it has all that stand before the event.
        delay: how long after its time a behaviour is known, in the unit of the timestamps.
    """
    positive = np.flatnonzero(block.labels == 1)
    before = np.concatenate([[0], np.cumsum(block.labels, dtype=np.int64)])
    offsets = before[block.offsets]
    if rule is HistoryRule.BEFORE_EVENT:
        return CutHistories(offsets, block.item_ids[positive], block.timestamps[positive], before[:-1])
    users = np.repeat(np.arange(len(block.offsets) - 1), np.diff(block.offsets))
    times = block.timestamps[positive]
    if block.label_times is not None:
        times = block.label_times[positive]
        order = np.lexsort((times, users[positive]))  # stable: equal times keep the order of the events
        positive, times = positive[order], times[order]
    moments = block.timestamps if block.request_times is None else block.request_times
    ends = _num_earlier(users, earlier_by(moments, delay), users[positive], times)
    return CutHistories(offsets, block.item_ids[positive], times, ends)


def earlier_by(times: np.ndarray, delay: int) -> np.ndarray:
    """Returns `times - delay`, but no time below the first of int64."""
    first = np.iinfo(np.int64).min
    return np.maximum(times, first + delay) - delay if delay else times


def _num_earlier(users: np.ndarray, moments: np.ndarray, owners: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Returns how many behaviours each moment has before it: of all earlier users, and of its own at earlier times.

    Args:
        users: int64 `[E]`, the user of each moment, ascending.
        moments: int64 `[E]`.
        owners: int64 `[P]`, the user of each behaviour, ascending.
        times: int64 `[P]`.
    """
    is_behaviour = np.repeat([False, True], [len(users), len(owners)])
    # Of equal times the moment comes first, so that it does not see the behaviour.
    order = np.lexsort((is_behaviour, np.concatenate([moments, times]), np.concatenate([users, owners])))
    found = np.empty(len(order), np.int64)
    found[order] = np.cumsum(is_behaviour[order])
    return found[: len(users)]


def begins_a_moment(offsets: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """Returns which events are the first of their user and time, bool `[E]`.

    Args:
        offsets: int64 `[U + 1]`, where each user's events begin.
        timestamps: int64 `[E]`, ascending for each user.
    """
    begins = np.ones(len(timestamps), bool)
    begins[1:] = timestamps[1:] != timestamps[:-1]
    begins[offsets[:-1]] = True
    return begins
