"""A log of events, grouped by user, in time order, and cut into blocks of whole users. So it becomes records.

Letters of shapes: U users, E events, I items, F values of a feature.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from din_dist import schema
from din_dist.data.raw_columns import RawFeature, TableCounts
from din_dist.features.offers import Offers

EVENTS_PER_BLOCK = 80_000  # about 1 MB: an event takes 13 bytes


@dataclasses.dataclass(frozen=True)
class Block:
    """The events of some successive users, each user's in time order.

    The `BLOCK_*` names of `din_dist.schema` give the dtype, the shape and the meaning of each. None stands for an
    absent one.
    """

    first_user: int
    offsets: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray
    labels: np.ndarray
    request_times: np.ndarray | None = None
    label_times: np.ndarray | None = None
    session_places: np.ndarray | None = None
    weights: np.ndarray | None = None
    task_labels: np.ndarray | None = None
    actions: np.ndarray | None = None
    behaviour_offsets: np.ndarray | None = None
    behaviour_item_ids: np.ndarray | None = None
    behaviour_times: np.ndarray | None = None
    behaviour_actions: np.ndarray | None = None

    @property
    def more(self) -> dict[str, np.ndarray]:
        """The arrays `[E]` beside those that every block has, by name."""
        names = ("request_times", "label_times", "session_places", "weights", "task_labels", "actions")
        return {name: values for name in names if (values := getattr(self, name)) is not None}


@dataclasses.dataclass(frozen=True)
class Behaviours:
    """P behaviours of a log of their own, user after user, each user's in time order.

    Attributes:
        offsets: int64 `[U + 1]`, where each user's behaviours begin.
        item_ids: int32 `[P]`, dense ids.
        times: int64 `[P]`.
        actions: uint8 `[P]`, as of `schema.BLOCK_BEHAVIOUR_ACTIONS`; None without.
    """

    offsets: np.ndarray
    item_ids: np.ndarray
    times: np.ndarray
    actions: np.ndarray | None = None


class Blocks(abc.ABC):
    """The blocks of a log in the order of the users, each made when it is asked for."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Block: ...

    def __iter__(self) -> Iterator[Block]:
        return (self[index] for index in range(len(self)))


@dataclasses.dataclass(frozen=True)
class ItemFeature:
    """A feature of the items.

    Attributes:
        of_item: int32 `[I + 1]`, the feature's dense id of each item's dense id.
        ids: integers or strings `[F]`, the log's own ids of the feature.
    """

    of_item: np.ndarray
    ids: pa.Array

    @classmethod
    def from_values(cls, values: pa.Array) -> ItemFeature:
        """Makes a feature from each item's own value `[I]`, null if it has none. Dense ids follow first appearance."""
        encoded = values.dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy()
        return cls(np.concatenate([[0], codes + 1]).astype(np.int32), encoded.dictionary)


@dataclasses.dataclass(frozen=True)
class BehaviourCounts:
    """How a log of behaviours fits the events.

    Attributes:
        kept: behaviours of users who have events.
        only_behaviours: items that behaviours have and no event.
        without_id: those of them that stand for behaviours without an item's id. Their dense ids come last.
    """

    kept: int
    only_behaviours: int
    without_id: int = 0


@dataclasses.dataclass(frozen=True)
class EventLog:
    """Everything that a builder writes.

    Attributes:
        user_ids: the log's own ids of users, in the order of the dense ids.
        item_ids: the log's own ids of items, in the order of the dense ids.
        item_features: each feature, by its name.
        has_labels: the log has a column of labels.
        blocks: the events.
        late_columns: columns that begin after the first rows of a file, where earlier versions did not see them.
        raw_features: what declared features are made from.
        tables: how the tables of items, users and offers fit the events.
        offers: which row of a table of offers an item has; None without such a table.
        tasks: the labels to predict, if there are several.
        behaviours: how the log of behaviours fits the events; None without one.
        actions: what behaviours were, in the order of their codes from 1.
        extends: as of `schema.DatasetFacts`; likewise the next.
        forgotten: what was left out.
    """

    user_ids: pa.Array
    item_ids: pa.Array
    item_features: Mapping[str, ItemFeature]
    has_labels: bool
    blocks: Blocks
    late_columns: tuple[str, ...] = ()
    raw_features: tuple[RawFeature, ...] = ()
    tables: Mapping[str, TableCounts] = dataclasses.field(default_factory=dict)
    offers: Offers | None = None
    tasks: tuple[str, ...] = ()
    behaviours: BehaviourCounts | None = None
    actions: tuple[str, ...] = ()
    extends: Mapping[str, Any] | None = None
    forgotten: Mapping[str, Any] | None = None


def first_users_of_blocks(begins: np.ndarray) -> np.ndarray:
    """Returns the first user of each block, and at last U, for blocks of about `EVENTS_PER_BLOCK` events.

    Args:
        begins: int64 `[U]`, where each user's events begin.
    """
    return np.append(np.flatnonzero(np.diff(begins // EVENTS_PER_BLOCK, prepend=-1)), len(begins))


class SortedBlocks(Blocks):
    """The blocks of a log in memory: whole users, with about `EVENTS_PER_BLOCK` events a block.

    Args:
        offsets: int64 `[U + 1]`, where each user's events begin.
        item_ids: int32 `[E]`.
        timestamps: int64 `[E]`.
        labels: uint8 `[E]`.
        more: `[E]` each, what else a log has of its events, by the names in `Block`.
        behaviours: of a log of their own, of the same users.
    """

    def __init__(
        self,
        offsets: np.ndarray,
        item_ids: np.ndarray,
        timestamps: np.ndarray,
        labels: np.ndarray,
        more: Mapping[str, np.ndarray] = MappingProxyType({}),
        behaviours: Behaviours | None = None,
    ) -> None:
        self._offsets, self._item_ids, self._timestamps, self._labels = offsets, item_ids, timestamps, labels
        self._more, self._behaviours = more, behaviours
        begins = offsets[:-1] if behaviours is None else offsets[:-1] + behaviours.offsets[:-1]
        self._first_users = first_users_of_blocks(begins)

    def __len__(self) -> int:
        return len(self._first_users) - 1

    def __getitem__(self, index: int) -> Block:
        first, last = self._first_users[index], self._first_users[index + 1]
        offsets = self._offsets[first : last + 1]
        events = slice(offsets[0], offsets[-1])
        return Block(
            first_user=int(first),
            offsets=offsets - offsets[0],
            item_ids=self._item_ids[events],
            timestamps=self._timestamps[events],
            labels=self._labels[events],
            **{name: values[events] for name, values in self._more.items()},
            **self._own_behaviours(int(first), int(last)),
        )

    def _own_behaviours(self, first: int, end: int) -> dict[str, np.ndarray]:
        """Returns the behaviours of users `first` to `end` - 1, by the names in `Block`."""
        if self._behaviours is None:
            return {}
        offsets = self._behaviours.offsets[first : end + 1]
        own = slice(offsets[0], offsets[-1])
        actions = self._behaviours.actions
        return {
            schema.BLOCK_BEHAVIOUR_OFFSETS: offsets - offsets[0],
            schema.BLOCK_BEHAVIOUR_ITEM_IDS: self._behaviours.item_ids[own],
            schema.BLOCK_BEHAVIOUR_TIMES: self._behaviours.times[own],
            **({} if actions is None else {schema.BLOCK_BEHAVIOUR_ACTIONS: actions[own]}),
        }


def group_by_user(
    users: np.ndarray,
    item_ids: np.ndarray,
    timestamps: np.ndarray,
    labels: np.ndarray | None,
    order: np.ndarray,
    more: Mapping[str, np.ndarray] = MappingProxyType({}),
    behaviours: Behaviours | None = None,
) -> SortedBlocks:
    """Returns events as blocks.

    Args:
        users: `[E]`, each event's user, 0 to U - 1.
        item_ids: int32 `[E]`.
        timestamps: int64 `[E]`.
        labels: uint8 `[E]`; None: every event is a positive.
        order: `[E]`, the order of the events, which must bring those of each user together, users ascending.
        more: `[E]` each, as of `SortedBlocks`.
        behaviours: as of `SortedBlocks`.
    """
    counts = np.bincount(users)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    in_order = np.ones(len(order), np.uint8) if labels is None else labels[order]
    in_order_too = {name: values[order] for name, values in more.items()}
    return SortedBlocks(offsets, item_ids[order], timestamps[order], in_order, in_order_too, behaviours)
