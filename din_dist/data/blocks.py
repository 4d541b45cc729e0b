"""A log of events on its way into records: grouped by user, in time order, cut into blocks of whole users."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

EVENTS_PER_BLOCK = 80_000  # about 1 MB: an event takes 13 bytes


@dataclasses.dataclass(frozen=True)
class Block:
    """Some whole users, one after the other, each one's events in time order: `offsets` `[U + 1]`, the rest `[E]`.

    Dtypes and meaning are those of the `BLOCK_*` names of `din_dist.schema`.
    """

    first_user: int
    offsets: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray
    labels: np.ndarray


class Blocks(abc.ABC):
    """All blocks of a log in the order of the users, each made when it is asked for."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Block: ...

    def __iter__(self) -> Iterator[Block]:
        return (self[index] for index in range(len(self)))


@dataclasses.dataclass(frozen=True)
class ItemFeature:
    """`of_item` int32 `[I + 1]`: an item's dense id -> the feature's dense id; `ids` `[F]`: the user's own ids."""

    of_item: np.ndarray
    ids: pa.Array

    @classmethod
    def from_values(cls, values: pa.Array) -> ItemFeature:
        """From each item's own value `[I]`, null where it has none; dense ids by first appearance."""
        encoded = values.dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy()
        return cls(np.concatenate([[0], codes + 1]).astype(np.int32), encoded.dictionary)


@dataclasses.dataclass(frozen=True)
class EventLog:
    """All that a builder writes: vocabularies in the order of the dense ids, item features, and blocks of events.

    `late_columns` begin after the first rows of a file, where earlier versions did not see them.
    """

    user_ids: pa.Array
    item_ids: pa.Array
    item_features: Mapping[str, ItemFeature]
    has_labels: bool
    blocks: Blocks
    late_columns: tuple[str, ...] = ()


class SortedBlocks(Blocks):
    """A log held in memory, cut into blocks of about `EVENTS_PER_BLOCK` events, whole users always."""

    def __init__(
        self,
        offsets: np.ndarray,
        item_ids: np.ndarray,
        timestamps: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        self._offsets, self._item_ids, self._timestamps, self._labels = offsets, item_ids, timestamps, labels
        block_of_user = offsets[:-1] // EVENTS_PER_BLOCK
        self._first_users = np.append(np.flatnonzero(np.diff(block_of_user, prepend=-1)), len(offsets) - 1)

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
        )


def group_by_user(
    users: np.ndarray, item_ids: np.ndarray, timestamps: np.ndarray, labels: np.ndarray | None, order: np.ndarray
) -> SortedBlocks:
    """Events `[E]` taken in `order` (which must bring each of the users, 0 to U - 1, together) as blocks."""
    counts = np.bincount(users)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    in_order = np.ones(len(order), np.uint8) if labels is None else labels[order]
    return SortedBlocks(offsets, item_ids[order], timestamps[order], in_order)
