"""Keeps the row of each behaviour in features of behaviours, where it is another than its place.

PACKED/rows-KEY/
    0.npy      int64, of the first named history, and so on; -1 for a behaviour that has no row
    all.npy    of all behaviours
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from din_dist import progress
from din_dist.data.array_writer import arrays_in_memory, publish_arrays
from din_dist.data.event_store import PACKED_DIR, EventStore, HistorySet, map_array
from din_dist.data.histories import ALL, Choice, Chosen, CutHistories, cut_histories
from din_dist.data.history_folders import blocks_of
from din_dist.data.history_sets import by_feature, choice_of
from din_dist.errors import InputError

_DTYPES: dict[str, type] = {}  # all are int64
_ALL = "all"


def rows_folder(store: EventStore) -> Path | None:
    """Returns the folder of the rows of a store's histories. None: each behaviour's place is its row."""
    if not store.sets and (store.facts.has_behaviours or not store.facts.keeps_behaviours):
        return None
    return store.folder / PACKED_DIR / f"rows-{store.facts.fingerprint[:16]}"


def write_rows(folder: Path, store: EventStore) -> None:
    """Publishes the rows of a store's histories. The caller must hold a lock, so that they are made once.

    Raises:
        OSError: the folder cannot be written.
    """
    publish_arrays(folder, _DTYPES, _parts(store))


def rows_in_memory(store: EventStore) -> EventStore:
    """Returns the store with the rows of its histories, where nothing can be written."""
    return _with(store, arrays_in_memory(_DTYPES, _parts(store)))


def open_rows(folder: Path, store: EventStore) -> EventStore:
    """Returns the store with the rows in `folder`, mapped into memory.

    Raises:
        InputError: a file is missing or damaged.
    """
    arrays = {}
    for place, history in _histories(store).items():
        array = np.asarray(map_array(folder / f"{place}.npy", store.files))
        if array.dtype != np.int64 or len(array) != len(history.item_ids):
            raise InputError(
                f"{folder}: must hold the rows of {len(history.item_ids):,} behaviours. Received: {len(array):,} of "
                f"{array.dtype}. Delete this folder."
            )
        arrays[place] = array
    return _with(store, arrays)


def _with(store: EventStore, arrays: dict[str, Any]) -> EventStore:
    store = dataclasses.replace(store, history_rows=arrays.get(_ALL))
    sets = tuple(dataclasses.replace(history, rows=arrays[str(place)]) for place, history in enumerate(store.sets))
    return dataclasses.replace(store, sets=sets)


def _histories(store: EventStore) -> dict[str, HistorySet]:
    """Returns the histories by the names of their files: the named ones, and that of all behaviours if it is read."""
    found = {str(place): history for place, history in enumerate(store.sets)}
    is_read = not store.sets or any(history.feature for history in store.sets)
    return found | ({_ALL: store.whole_history} if is_read else {})


def _parts(store: EventStore) -> Iterator[tuple[str, np.ndarray]]:
    """Yields place and values of the next part of the rows of each history, for some users at a time."""
    facts, histories = store.facts, _histories(store)
    choices = {place: choice_of(facts, history.name) if history.name else ALL for place, history in histories.items()}
    for place in choices:
        yield place, np.zeros(0, np.int64)
    for block in blocks_of(store, store.facts.sessions):
        progress.note()
        for place, choice in choices.items():
            history = histories[place]
            found = cut_histories(block, facts.history_rule, facts.history_delay, choice)
            rows = _rows(store, block.first_user, choice, found)
            if history.feature:
                order, _ = by_feature(found, store.item_features[history.feature])
                rows = rows[order]
            yield place, rows


def _rows(store: EventStore, first_user: int, choice: Choice, found: CutHistories) -> np.ndarray:
    """Returns the rows of the behaviours that were found from a user on; -1 for events beside behaviours' own log."""
    if not store.facts.has_behaviours:
        return int(store.user_offsets[first_user]) + found.rows
    if choice.chosen in (Chosen.ALL, Chosen.ACTION):
        return int(store.history_offsets[first_user]) + found.rows
    return np.full(len(found.rows), -1, np.int64)
