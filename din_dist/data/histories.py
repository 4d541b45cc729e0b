"""Cuts histories: which behaviours each event may see. Behaviours are positive events, or have a log of their own.

Letters of shapes: U users, E events, P behaviours, S sessions.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

from din_dist.data.blocks import Block
from din_dist.schema import HistoryRule


class CutHistories(NamedTuple):
    """The behaviours of some users, and where the history of each of their events ends.

    The history of event e of user u is `item_ids[offsets[u] : ends[e]]`. If it is that of a session, the session takes
    the user's place.
    """

    offsets: np.ndarray  # int64 [U + 1], where each user's behaviours begin
    item_ids: np.ndarray  # int32 [P], of each user in the order of time
    times: np.ndarray  # int64 [P], when each happened
    ends: np.ndarray  # int64 [E]
    rows: np.ndarray  # int64 [P], the place of each among the block's events, or behaviours of a log of their own
    sessions: np.ndarray | None = None  # int64 [E], of each event, in the order of their first events; None without


class Chosen(enum.Enum):
    """The kinds of choices of behaviours."""

    ALL = enum.auto()  # positive events, or all behaviours of a log of their own
    SKIPPED = enum.auto()  # events that are not positive
    ACTION = enum.auto()  # those of all behaviours with one action
    TASK = enum.auto()  # events with one of several labels


class Choice(NamedTuple):
    """Which behaviours a history has."""

    chosen: Chosen = Chosen.ALL
    code: int = 0  # of the action from 1, or the task from 0


ALL = Choice()


def cut_histories(block: Block, rule: HistoryRule, delay: int = 0, choice: Choice = ALL) -> CutHistories:
    """Cuts the histories of whole users.

    Args:
        block: their events. If these have sessions, a history has behaviours of the event's session alone.
        rule: `BEFORE_TIME`: a history has the behaviours that are known before the time of the event's request.
            `BEFORE_EVENT`: it has all that stand before the event, of behaviours that are events.
        delay: how long after its time a behaviour is known, in the unit of the timestamps.
        choice: the behaviours.
    """
    if block.session_places is not None:
        return _cut_sessions(block, rule, delay, choice)
    users = np.repeat(np.arange(len(block.offsets) - 1), np.diff(block.offsets))
    moments = block.timestamps if block.request_times is None else block.request_times
    if block.behaviour_offsets is not None and choice.chosen in (Chosen.ALL, Chosen.ACTION):
        offsets, items, times, rows = _own_behaviours(block, choice)
        owners = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        ends = _num_earlier(users, earlier_by(moments, delay), owners, times)
        return CutHistories(offsets, items, times, ends, rows)
    is_chosen = _chosen_events(block, choice)
    positive = np.flatnonzero(is_chosen)
    before = np.concatenate([[0], np.cumsum(is_chosen, dtype=np.int64)])
    offsets = before[block.offsets]
    if rule is HistoryRule.BEFORE_EVENT:
        return CutHistories(offsets, block.item_ids[positive], block.timestamps[positive], before[:-1], positive)
    times = block.timestamps[positive]
    if block.label_times is not None:
        times = block.label_times[positive]
        order = np.lexsort((times, users[positive]))  # stable: equal times keep the order of the events
        positive, times = positive[order], times[order]
    ends = _num_earlier(users, earlier_by(moments, delay), users[positive], times)
    return CutHistories(offsets, block.item_ids[positive], times, ends, positive)


def _cut_sessions(block: Block, rule: HistoryRule, delay: int, choice: Choice) -> CutHistories:
    """Cuts histories as `cut_histories` does, session by session."""
    sessions = numbers_of_sessions(block)
    order = np.argsort(sessions, kind="stable")  # of each session in the order of the events
    counts = np.bincount(sessions)
    arrays = {name: values[order] for name, values in block.more.items() if name != "session_places"}
    by_session = Block(
        first_user=0,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        item_ids=block.item_ids[order],
        timestamps=block.timestamps[order],
        labels=block.labels[order],
        **arrays,
    )
    found = cut_histories(by_session, rule, delay, choice)
    ends = np.empty_like(found.ends)
    ends[order] = found.ends
    return found._replace(ends=ends, rows=order[found.rows], sessions=sessions)


def numbers_of_sessions(block: Block) -> np.ndarray:
    """Returns the session of each event, int64 `[E]`: from 0, in the order of their first events."""
    assert block.session_places is not None
    firsts = np.repeat(block.offsets[:-1], np.diff(block.offsets)) + block.session_places
    return (np.cumsum(firsts == np.arange(len(firsts))) - 1)[firsts]


def places_by_gap(offsets: np.ndarray, timestamps: np.ndarray, gap: int) -> np.ndarray:
    """Returns where among its user's events each event's session begins, int32 `[E]`: after a longer gap than `gap`.

    Args:
        offsets: int64 `[U + 1]`, where each user's events begin.
        timestamps: int64 `[E]`, ascending for each user.
        gap: in the unit of the timestamps.
    """
    begins = np.ones(len(timestamps), bool)
    begins[1:] = np.diff(timestamps) > gap
    begins[offsets[:-1]] = True
    firsts = np.maximum.accumulate(np.where(begins, np.arange(len(timestamps)), 0))
    return (firsts - np.repeat(offsets[:-1], np.diff(offsets))).astype(np.int32)


def _own_behaviours(block: Block, choice: Choice) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns offsets `[U + 1]`, items, times and places of behaviours that have a log of their own."""
    offsets, items, times = block.behaviour_offsets, block.behaviour_item_ids, block.behaviour_times
    assert offsets is not None
    assert items is not None
    assert times is not None
    if choice.chosen is Chosen.ALL:
        return offsets, items, times, np.arange(len(items))
    assert block.behaviour_actions is not None
    kept = block.behaviour_actions == choice.code
    return np.concatenate([[0], np.cumsum(kept)])[offsets], items[kept], times[kept], np.flatnonzero(kept)


def _chosen_events(block: Block, choice: Choice) -> np.ndarray:
    """Tells which events are behaviours, bool `[E]`."""
    match choice.chosen:
        case Chosen.SKIPPED:
            return block.labels == 0
        case Chosen.TASK:
            assert block.task_labels is not None
            return (block.task_labels >> choice.code & 1) == 1
        case Chosen.ACTION:
            assert block.actions is not None
            return (block.labels == 1) & (block.actions == choice.code)
    return block.labels == 1


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
