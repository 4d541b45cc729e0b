"""Keeps histories that are cut otherwise than those of the packed arrays, in a folder beside them.

PACKED/histories-RULE-DELAY/  histories-RULE-DELAY-SESSIONS/
    history_ends.npy
    history_item_ids.npy  history_offsets.npy  history_times.npy     unless behaviours are all events in their order
    sessions.npy                                                     if histories are sessions
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from din_dist import progress, schema
from din_dist.config import DataConfig, HistoryEnds
from din_dist.data.array_writer import arrays_in_memory, publish_arrays
from din_dist.data.blocks import Block
from din_dist.data.event_store import PACKED_DIR, EventStore, map_array
from din_dist.data.histories import cut_histories, places_by_gap
from din_dist.data.walks import user_runs
from din_dist.errors import InputError
from din_dist.features.times import Delay, TimestampUnit, unit_of
from din_dist.schema import BY_COLUMN, DatasetFacts, HistoryRule

_DTYPES = {
    "history_ends": np.int64,
    "history_item_ids": np.int32,
    "history_offsets": np.int64,
    "history_times": np.int64,
    "sessions": np.int64,
}


def chosen_facts(facts: DatasetFacts, config: DataConfig) -> DatasetFacts:
    """Returns the facts of a data set with its histories cut as the settings say.

    Raises:
        InputError: a delay, requests or times of labels are given, but histories end before the event.
    """
    ends = config.history_ends
    rule = facts.present_rule if ends is HistoryEnds.AUTO else HistoryRule(ends)
    delay = Delay(config.history_delay).in_units(_unit_of(facts, config))
    if rule is HistoryRule.BEFORE_EVENT:
        for name, given in (("history_delay", delay), ("request_column", config.request_column)):
            if given:
                raise InputError(
                    f"--{name}: belongs to histories that end before the time of a request. Received: "
                    f"{getattr(config, name)!r}, for a log without labels, whose histories end before the event. Add "
                    "--history_ends=before_time, or drop it."
                )
    sessions = BY_COLUMN if config.session_column else ""
    if config.session_gap:
        sessions = str(Delay(config.session_gap).in_units(_unit_of(facts, config)))
    return facts.with_histories(rule, delay, sessions)


def _unit_of(facts: DatasetFacts, config: DataConfig) -> TimestampUnit:
    if config.timestamp_unit is not TimestampUnit.AUTO:
        return config.timestamp_unit
    return unit_of((facts.first_timestamp + facts.last_timestamp) / 2)


def histories_folder(store: EventStore, facts: DatasetFacts) -> Path:
    """Returns the folder of the histories that `facts` describe."""
    parts = ("histories", facts.history_rule, str(facts.history_delay), facts.sessions)
    return store.folder / PACKED_DIR / "-".join(filter(None, parts))


def write_histories(folder: Path, store: EventStore, facts: DatasetFacts) -> None:
    """Publishes the histories that `facts` describe. The caller must hold a lock, so that they are made once.

    Raises:
        OSError: the folder cannot be written.
    """
    publish_arrays(folder, _DTYPES, _parts(store, facts))


def histories_in_memory(store: EventStore, facts: DatasetFacts) -> EventStore:
    """Returns the store with the histories that `facts` describe, where nothing can be written."""
    return _with(store, facts, arrays_in_memory(_DTYPES, _parts(store, facts)))


def open_histories(folder: Path, store: EventStore, facts: DatasetFacts) -> EventStore:
    """Returns the store with the histories in `folder`, mapped into memory.

    Raises:
        InputError: a file is missing or damaged.
    """
    names = [*_DTYPES] if facts.keeps_behaviours else ["history_ends"]
    names = names if facts.sessions else [name for name in names if name != "sessions"]
    arrays = {name: np.asarray(map_array(folder / f"{name}.npy", store.files)) for name in names}
    num_owners = int(arrays["sessions"].max(initial=-1)) + 1 if facts.sessions else facts.num_users
    lengths = {"history_ends": facts.num_events, "sessions": facts.num_events, "history_offsets": num_owners + 1}
    wrong = [name for name, array in arrays.items() if array.dtype != _DTYPES[name]]
    wrong += [name for name, length in lengths.items() if name in arrays and len(arrays[name]) != length]
    if facts.keeps_behaviours and not wrong:
        num_behaviours = arrays["history_offsets"][-1]
        wrong += [name for name in ("history_item_ids", "history_times") if len(arrays[name]) != num_behaviours]
    if wrong:
        raise InputError(
            f"{folder}: must hold the histories of {facts.num_events:,} events. Received: {wrong[0]} of another length "
            "or type. Delete this folder."
        )
    return _with(store, facts, arrays)


def _with(store: EventStore, facts: DatasetFacts, arrays: dict[str, Any]) -> EventStore:
    facts = dataclasses.replace(facts, item_features=store.facts.item_features)
    return dataclasses.replace(store, facts=facts, **arrays)


def _parts(store: EventStore, facts: DatasetFacts) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and values of the next part of each array, for some users at a time."""
    if facts.keeps_behaviours:
        yield "history_offsets", np.zeros(1, np.int64)
    num_behaviours = num_sessions = 0
    for block in blocks_of(store, facts.sessions):
        progress.note()
        found = cut_histories(block, facts.history_rule, facts.history_delay)
        yield "history_ends", num_behaviours + found.ends
        if facts.keeps_behaviours:
            yield "history_offsets", num_behaviours + found.offsets[1:]
            yield "history_item_ids", found.item_ids
            yield "history_times", found.times
        if found.sessions is not None:
            yield "sessions", num_sessions + found.sessions
            num_sessions += len(found.offsets) - 1
        num_behaviours += len(found.item_ids)


def blocks_of(store: EventStore, sessions: str) -> Iterator[Block]:
    """Yields what histories are cut from, for some users at a time.

    Args:
        store: the events.
        sessions: as of `DatasetFacts`.
    """
    offsets = store.user_offsets
    for first, end in user_runs(offsets[1:]):
        events = slice(int(offsets[first]), int(offsets[end]))
        labels = np.ones(events.stop - events.start, np.uint8) if store.labels is None else store.labels[events]
        places = None
        if sessions == BY_COLUMN:
            assert store.session_places is not None
            places = store.session_places[events]
        elif sessions:
            places = places_by_gap(offsets[first : end + 1] - events.start, store.timestamps[events], int(sessions))
        yield Block(
            first_user=first,
            offsets=offsets[first : end + 1] - offsets[first],
            item_ids=store.item_ids[events],
            timestamps=store.timestamps[events],
            labels=labels,
            request_times=None if store.request_times is None else store.request_times[events],
            label_times=None if store.label_times is None else store.label_times[events],
            task_labels=None if store.task_labels is None else store.task_labels[events],
            actions=None if store.actions is None else store.actions[events],
            session_places=places,
            **_own_behaviours(store, first, end),
        )


def _own_behaviours(store: EventStore, first: int, end: int) -> dict[str, np.ndarray]:
    """Returns the behaviours of a log of their own, of users `first` to `end` - 1, by the names in `Block`."""
    if not store.facts.has_behaviours or store.history_times is None:
        return {}
    offsets = store.history_offsets[first : end + 1]
    own = slice(int(offsets[0]), int(offsets[-1]))
    return {
        schema.BLOCK_BEHAVIOUR_OFFSETS: offsets - offsets[0],
        schema.BLOCK_BEHAVIOUR_ITEM_IDS: store.history_item_ids[own],
        schema.BLOCK_BEHAVIOUR_TIMES: store.history_times[own],
        **({} if store.history_actions is None else {schema.BLOCK_BEHAVIOUR_ACTIONS: store.history_actions[own]}),
    }
