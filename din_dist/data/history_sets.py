"""Keeps several named histories, cut for `--histories`, in a folder beside the packed arrays.

PACKED/sets-KEY/
    0-ends.npy  0-item_ids.npy  0-offsets.npy  0-times.npy     of the first name, and so on
    1-keys.npy                                                 instead of the times, of a history with a feature
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from din_dist import progress
from din_dist.config import ALL_BEHAVIOURS, LONG, SKIPPED
from din_dist.data.array_writer import arrays_in_memory, publish_arrays
from din_dist.data.event_store import KEY_BITS, PACKED_DIR, EventStore, HistorySet, map_array
from din_dist.data.histories import ALL, Choice, Chosen, CutHistories, cut_histories
from din_dist.data.history_folders import blocks_of
from din_dist.errors import InputError
from din_dist.schema import DatasetFacts, NamedHistory

_DTYPES: dict[str, type] = {"ends": np.int64, "item_ids": np.int32, "offsets": np.int64}


def _dtypes_of(history: NamedHistory) -> dict[str, type]:
    """Returns the dtype of each array of a history by name; the last one has a value for each behaviour."""
    last = "keys" if history.feature else "times"
    return {**_DTYPES, last: np.int64}


def _all_dtypes(histories: Sequence[NamedHistory]) -> dict[str, type]:
    return {
        f"{place}-{name}": dtype
        for place, history in enumerate(histories)
        for name, dtype in _dtypes_of(history).items()
    }


def sets_folder(store: EventStore, histories: Sequence[NamedHistory]) -> Path:
    """Returns the folder of some histories. Their lengths are not kept there, so others need not be cut anew.

    Raises:
        InputError: the log does not tell of one of them.
    """
    choices = [choice_of(store.facts, history.name) for history in histories]
    features = [history.feature for history in histories]
    key = f"{store.facts.history_rule} {store.facts.history_delay} {choices} {features}"
    key += f" {store.facts.sessions}" if store.facts.sessions else ""
    return store.folder / PACKED_DIR / f"sets-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"


def choice_of(facts: DatasetFacts, name: str) -> Choice:
    """Returns which behaviours a named history has.

    Raises:
        InputError: the log does not tell.
    """
    if name in (ALL_BEHAVIOURS, LONG):
        return ALL
    if name == SKIPPED:
        if not facts.has_labels:
            raise InputError(
                f"--histories: {SKIPPED} is what was shown with a label of 0. Received: a log without labels. Drop it, "
                "or name --label_column."
            )
        return Choice(Chosen.SKIPPED)
    if name in facts.actions:
        return Choice(Chosen.ACTION, facts.actions.index(name) + 1)
    if name in facts.tasks:
        return Choice(Chosen.TASK, facts.tasks.index(name))
    known = ", ".join([*facts.actions, *facts.tasks, ALL_BEHAVIOURS, SKIPPED])
    raise InputError(f"--histories: must name actions of the log. Received: {name!r}. Choose among {known}.")


def write_sets(folder: Path, store: EventStore, histories: Sequence[NamedHistory]) -> None:
    """Publishes histories. The caller must hold a lock, so that they are made once.

    Raises:
        OSError: the folder cannot be written.
    """
    publish_arrays(folder, _all_dtypes(histories), _parts(store, histories))


def sets_in_memory(store: EventStore, histories: Sequence[NamedHistory]) -> EventStore:
    """Returns the store with histories, where nothing can be written."""
    return _with(store, histories, arrays_in_memory(_all_dtypes(histories), _parts(store, histories)))


def open_sets(folder: Path, store: EventStore, histories: Sequence[NamedHistory]) -> EventStore:
    """Returns the store with the histories in `folder`, mapped into memory.

    Raises:
        InputError: a file is missing or damaged.
    """
    arrays: dict[str, np.ndarray] = {}
    for place, history in enumerate(histories):
        dtypes = _dtypes_of(history)
        own = {name: np.asarray(map_array(folder / f"{place}-{name}.npy", store.files)) for name in dtypes}
        arrays |= {f"{place}-{name}": array for name, array in own.items()}
        *_, last = dtypes
        fits = len(own["ends"]) == store.facts.num_events and len(own["offsets"]) == _num_owners(store) + 1
        fits = fits and len(own["item_ids"]) == len(own[last]) == own["offsets"][-1]
        if not fits or any(array.dtype != dtypes[name] for name, array in own.items()):
            raise InputError(
                f"{folder}: must hold the histories of {store.facts.num_events:,} events. Received: arrays of another "
                "length or type. Delete this folder."
            )
    return _with(store, histories, arrays)


def _num_owners(store: EventStore) -> int:
    """Returns how many users, or sessions, have histories of their own."""
    return store.facts.num_users if store.sessions is None else len(store.history_offsets) - 1


def _with(store: EventStore, histories: Sequence[NamedHistory], arrays: dict[str, Any]) -> EventStore:
    sets = tuple(
        HistorySet(
            history.name,
            history.longest,
            feature=history.feature,
            **{name: arrays[f"{place}-{name}"] for name in _dtypes_of(history)},
        )
        for place, history in enumerate(histories)
    )
    return dataclasses.replace(store, facts=store.facts.with_sets(histories), sets=sets)


def _parts(store: EventStore, histories: Sequence[NamedHistory]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and values of the next part of each array, for some users at a time."""
    choices = [choice_of(store.facts, history.name) for history in histories]
    num_behaviours = [0] * len(choices)
    for place in range(len(choices)):
        yield f"{place}-offsets", np.zeros(1, np.int64)
    for block in blocks_of(store, store.facts.sessions):
        progress.note()
        for place, (history, choice) in enumerate(zip(histories, choices, strict=True)):
            found = cut_histories(block, store.facts.history_rule, store.facts.history_delay, choice)
            yield f"{place}-ends", num_behaviours[place] + found.ends
            yield f"{place}-offsets", num_behaviours[place] + found.offsets[1:]
            if history.feature:
                order, features = by_feature(found, store.item_features[history.feature])
                yield f"{place}-item_ids", found.item_ids[order]
                yield f"{place}-keys", (features << KEY_BITS) | (num_behaviours[place] + order)
            else:
                yield f"{place}-item_ids", found.item_ids
                yield f"{place}-times", found.times
            num_behaviours[place] += len(found.item_ids)


def by_feature(found: CutHistories, feature_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each user's behaviours in the order of their features, and these features: int64 `[P]` each.

    Args:
        found: the behaviours, of each user in the order of time, which equal features keep.
        feature_of: int32 `[num_items + 1]`.
    """
    users = np.repeat(np.arange(len(found.offsets) - 1), np.diff(found.offsets))
    features = feature_of[found.item_ids].astype(np.int64)
    order = np.lexsort((features, users))
    return order, features[order]
