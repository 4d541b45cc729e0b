"""Finds the items that training sees. The model knows other items by their features alone, and never draws them as
training negatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from din_dist.config import DataConfig, UnknownItem, require
from din_dist.data.event_store import USERS, EventStore, map_array
from din_dist.data.splits import Examples, behaviour_counts, kept_in, publish
from din_dist.data.walks import user_runs, windows
from din_dist.errors import InputError
from din_dist.schema import UNKNOWN_ID, DatasetFacts

_NAME = "trained"
_OCCUR, _OFFSETS, _GAPS = "occur", "touched_offsets", "touched_gaps"


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedItems:
    """The items that occur in training. Those K that can be candidates are numbered 1 to K in the order of their ids.

    Attributes:
        num_candidates: the items that can be candidates, whose ids come first.
        occur: bool `[num_items + 1]`, True for an item that occurs.
        touched_offsets: int64 `[U + 1]`, where each user's touched items begin among these K; None with labels, where
            no negatives are drawn.
        touched_gaps: int32 `[T]`, as in `EventStore`, but by the numbers of these K items; None with labels.
    """

    num_candidates: int
    occur: np.ndarray
    touched_offsets: np.ndarray | None
    touched_gaps: np.ndarray | None

    @property
    def row_of_item(self) -> np.ndarray:
        """The row of each item in the table of items, int32 `[num_items + 1]`; the reserved row for items not seen."""
        return np.where(self.occur, np.arange(len(self.occur)), UNKNOWN_ID).astype(np.int32)

    @property
    def ids(self) -> np.ndarray:
        """The item of each number, int32 `[K + 1]`; `UNKNOWN_ID` for number 0."""
        candidates = np.flatnonzero(self.occur[: self.num_candidates + 1])
        return np.concatenate([[UNKNOWN_ID], candidates]).astype(np.int32)

    @property
    def max_touched(self) -> int:
        """The largest number of different items among these that one user touched; 0 with labels."""
        return 0 if self.touched_offsets is None else int(np.diff(self.touched_offsets).max(initial=0))


def trained_items(store: EventStore, config: DataConfig, splits: Mapping[str, Examples]) -> TrainedItems | None:
    """Returns the items that occur in training, or None if all items have rows of their own.

    All have with `--unknown_item=untrained`. The arrays are kept beside the packed events and memory-mapped, like the
    splits, so that a job's workers on one machine hold them once.

    Raises:
        InputError: items have no features, a user has touched all trained items, or the kept arrays are damaged.
    """
    if config.unknown_item is UnknownItem.UNTRAINED:
        return None
    require(
        bool(store.item_features),
        "needs features that tell of an item",
        "unknown_item",
        str(config.unknown_item),
        "Name their columns in --item_features, or drop it.",
    )
    folder = kept_in(_NAME, store, config)
    if not folder.is_dir():
        arrays = {_OCCUR: occurring_items(store, splits["train"])}
        if not store.facts.has_labels:
            arrays[_OFFSETS], arrays[_GAPS] = _touched_among(store, arrays[_OCCUR])
        try:
            publish(folder, {_NAME: arrays})
        except OSError:  # prepared data on a read-only disk: each process holds its own arrays
            return _checked(store, splits, arrays)
    names = (_OCCUR,) if store.facts.has_labels else (_OCCUR, _OFFSETS, _GAPS)
    mapped = {name: map_array(folder / f"{_NAME}-{name}.npy", store.files) for name in names}
    _check_kept(store, folder, mapped)
    return _checked(store, splits, mapped)


def _checked(store: EventStore, splits: Mapping[str, Examples], arrays: Mapping[str, np.ndarray]) -> TrainedItems:
    found = TrainedItems(store.facts.num_candidates, arrays[_OCCUR], arrays.get(_OFFSETS), arrays.get(_GAPS))
    if found.touched_offsets is not None:
        users = splits["train"].users
        num_touched, num_trained = np.diff(found.touched_offsets)[users], len(found.ids) - 1
        if num_touched.max() >= num_trained:
            user = store.vocabulary(USERS)[int(users[num_touched.argmax()])]
            raise InputError(
                "Negatives of training are items that it sees and that the user never touched. Received: user "
                f"{user.as_py()!r}, who touched all {num_trained} items of the training events. Remove that user, or "
                "drop --unknown_item=features."
            )
    return found


def _check_kept(store: EventStore, folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    lengths = {_OCCUR: store.facts.num_items + 1, _OFFSETS: store.facts.num_users + 1}
    whole = all(len(arrays[name]) == length for name, length in lengths.items() if name in arrays)
    if not whole or (_GAPS in arrays and len(arrays[_GAPS]) != arrays[_OFFSETS][-1]):
        raise InputError(
            f"{folder}: the arrays must be those of {store.facts.num_items} items and {store.facts.num_users} users. "
            f"Received: lengths {', '.join(str(len(array)) for array in arrays.values())}. Delete this folder."
        )


def row_of_item(facts: DatasetFacts, trained: TrainedItems | None) -> np.ndarray | None:
    """Returns the row of each item in the table of items, int32 `[num_items + 1]`; None if each has its own.

    Args:
        facts: about the data.
        trained: as from `trained_items`.
    """
    if trained:
        return trained.row_of_item
    if not facts.num_without_id:
        return None
    rows = np.arange(facts.num_items + 1, dtype=np.int32)
    rows[-facts.num_without_id :] = UNKNOWN_ID
    return rows


def occurring_items(store: EventStore, train: Examples) -> np.ndarray:
    """Returns bool `[num_items + 1]`: True for the items of training examples and of their histories."""
    found = np.zeros(store.facts.num_items + 1, bool)
    if store.sessions is None:
        begins = store.user_offsets[train.users]  # all earlier events of a user are history
        _, ends = train.runs()
        for first, end in user_runs(np.cumsum(ends - begins)):
            found[store.item_ids[windows(begins[first:end], (ends - begins)[first:end])]] = True
    else:
        for events in train.event_parts():
            found[store.item_ids[events]] = True
            if not store.facts.has_labels:  # the first event of a session is no example, but in its history
                found[store.history_item_ids[store.history_offsets[store.sessions[events]]]] = True
    found |= behaviour_counts(store, train) > 0
    found[store.facts.num_items + 1 - store.facts.num_without_id :] = False  # known by their features alone
    return found


def _touched_among(store: EventStore, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `touched_offsets` and `touched_gaps` of some items alone, by their numbers among these.

    Args:
        store: the events.
        kept: bool `[num_items + 1]`, True for the items that count.
    """
    offsets, gaps = store.touched_offsets, store.touched_gaps
    assert offsets is not None
    assert gaps is not None
    if kept[1 : store.facts.num_candidates + 1].all():
        return offsets, gaps
    number_of = np.cumsum(kept)
    new_counts, new_gaps = [np.zeros(1, np.int64)], []
    for first, end in user_runs(offsets[1:]):
        counts = np.diff(offsets[first : end + 1])
        user_of, rank = np.repeat(np.arange(end - first), counts), _ranks(counts)
        items = gaps[offsets[first] : offsets[end]] + 1 + rank
        here = kept[items]
        counts = np.bincount(user_of[here], minlength=end - first)
        new_counts.append(counts)
        new_gaps.append((number_of[items[here]] - 1 - _ranks(counts)).astype(np.int32))
    return np.cumsum(np.concatenate(new_counts)), np.concatenate(new_gaps)


def _ranks(counts: np.ndarray) -> np.ndarray:
    """Returns 0, 1, ... for each of successive runs, int64 `[sum of counts]`."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
