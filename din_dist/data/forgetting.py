"""Leaves out items and users that are rare or long gone, so that vocabularies and tables do not grow for ever.

Their events are left out with them, as if the log had never had them. So their ids are unknown to whatever reads the
prepared data, and an id that comes back later is a new one.

Letters of shapes: U users, I items and E events before; U', I' and E' of them stay.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from din_dist import progress
from din_dist.config import FORGETTING
from din_dist.data.blocks import Block, Blocks, EventLog, ItemFeature, first_users_of_blocks
from din_dist.data.extension import digest_of
from din_dist.data.raw_columns import RawFeature
from din_dist.errors import InputError
from din_dist.features.spec import Owner
from din_dist.features.times import Delay, TimestampUnit, unit_of
from din_dist.tables.values import ColumnValues, IdValues, ListValues


@dataclasses.dataclass(frozen=True)
class Forgetting:
    """Decides what is forgotten. Events are counted before anything is left out.

    Attributes:
        min_item_events: an item with fewer events is forgotten; with `after_days` once its first event is that old.
        after_days: an item or a user whose last event is older than this, seen from the newest event, is forgotten; 0:
            none is.
        unit: of the timestamps; `AUTO`: by their size.
    """

    min_item_events: int = 0
    after_days: int = 0
    unit: TimestampUnit = TimestampUnit.AUTO

    @property
    def is_any(self) -> bool:
        """True if something can be forgotten."""
        return bool(self.min_item_events or self.after_days)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that decide; nothing if nothing can be forgotten."""
        fields: dict[str, Any] = {"min_item_events": self.min_item_events, "forget_after": self.after_days}
        if self.after_days and self.unit is not TimestampUnit.AUTO:
            fields["timestamp_unit"] = str(self.unit)
        return fields if self.is_any else {}

    def apply(self, log: EventLog, newer_than: int | None = None) -> EventLog:
        """Returns a log without what is forgotten, and with what `EventLog.forgotten` says of it. Ids keep their order.

        Args:
            log: all events, without a log of behaviours or a table of offers.
            newer_than: the last timestamp of the data that newer files have extended; None if there is none.

        Raises:
            InputError: no event is left.
        """
        tally = _Tally(log)
        items, users = self._kept(tally)
        kept = _Kept(log, tally, users, items, newer_than)
        if not kept.offsets[-1]:
            raise InputError(
                f"--min_item_events: must leave events. Received: {self.min_item_events}, and no item has more than "
                f"{tally.counts.max()} events. Give a smaller number."
            )
        features = {}
        for name, feature in log.item_features.items():
            used = _compact(IdValues(feature.of_item[kept.item_rows], feature.ids))
            assert isinstance(used, IdValues)
            features[name] = ItemFeature(used.codes, used.ids)
        return dataclasses.replace(
            log,
            user_ids=log.user_ids.take(pa.array(kept.users)),
            item_ids=log.item_ids.take(pa.array(kept.item_rows[1:] - 1)),
            item_features=features,
            blocks=_KeptBlocks(kept),
            raw_features=tuple(map(kept.raw_feature, log.raw_features)),
            forgotten=self.to_json() | kept.told(),
        )

    def _kept(self, tally: _Tally) -> tuple[np.ndarray, np.ndarray]:
        """Returns which items stay, bool `[I + 1]` with item 0, and which users, bool `[U]`."""
        begin = np.iinfo(np.int64).min
        if self.after_days:
            newest = int(tally.last_of_user.max())
            unit = unit_of(newest) if self.unit is TimestampUnit.AUTO else self.unit
            begin = newest - Delay(f"{self.after_days}d").in_units(unit)
        rare = tally.counts < self.min_item_events
        if self.after_days:  # an item may take as long to become frequent
            rare &= tally.first_of_item < begin
        items = (tally.last_of_item >= begin) & ~rare
        items[0] = True
        return items, tally.last_of_user >= begin


class _Tally:
    """Counts the events of items, and finds the first and the last of items and users.

    Args:
        log: to count.
    """

    def __init__(self, log: EventLog) -> None:
        num_users, num_items = len(log.user_ids), len(log.item_ids)
        lowest, highest = np.iinfo(np.int64).min, np.iinfo(np.int64).max
        self.counts = np.zeros(num_items + 1, np.int64)
        self.first_of_item = np.full(num_items + 1, highest)
        self.last_of_item = np.full(num_items + 1, lowest)
        self.last_of_user = np.full(num_users, lowest)
        self.first_users = np.empty(len(log.blocks), np.int64)  # of each block
        for index, block in enumerate(log.blocks):
            progress.note()
            self.first_users[index] = block.first_user
            self.counts += np.bincount(block.item_ids, minlength=num_items + 1)
            np.minimum.at(self.first_of_item, block.item_ids, block.timestamps)
            np.maximum.at(self.last_of_item, block.item_ids, block.timestamps)
            np.maximum.at(self.last_of_user, _users_of(block), block.timestamps)


def _users_of(block: Block) -> np.ndarray:
    """Returns the user of each event of a block, int64."""
    return block.first_user + np.repeat(np.arange(len(block.offsets) - 1), np.diff(block.offsets))


class _Kept:
    """Finds what stays of a log.

    Args:
        log: the whole log.
        tally: of it.
        users: bool `[U]`, which are not forgotten. Those whose items are all forgotten are left out as well.
        items: bool `[I + 1]`, likewise.
        newer_than: as of `Forgetting.apply`.
    """

    def __init__(
        self, log: EventLog, tally: _Tally, users: np.ndarray, items: np.ndarray, newer_than: int | None
    ) -> None:
        self.log, self.first_users = log, tally.first_users
        self._user_stays, self._item_stays = users, items
        self.item_rows = np.flatnonzero(items)  # the old dense id of each new one
        self._new_item = np.where(items, np.cumsum(items) - 1, 0).astype(np.int32)
        counts = np.zeros(len(users), np.int64)
        self._num_events = self._num_newer = 0  # that are left out
        for block in log.blocks:
            progress.note()
            stays, of_users = self.stays(block), _users_of(block)
            counts += np.bincount(of_users[stays], minlength=len(counts))
            self._num_events += int(np.count_nonzero(~stays))
            if newer_than is not None:
                self._num_newer += int(np.count_nonzero(block.timestamps[~stays] > newer_than))
        self._extends = newer_than is not None
        self.users = np.flatnonzero(counts)  # the old number of each user that stays
        self.offsets = np.concatenate([[0], np.cumsum(counts[self.users])])

    def stays(self, block: Block) -> np.ndarray:
        """Tells which events of a block stay, bool."""
        return self._item_stays[block.item_ids] & self._user_stays[_users_of(block)]

    def told(self) -> dict[str, Any]:
        """Returns counts and digests for the facts; see `schema.DatasetFacts.forgotten`."""
        users = np.ones(len(self.log.user_ids), bool)
        users[self.users] = False
        gone = {
            "users": self.log.user_ids.take(pa.array(np.flatnonzero(users))),
            "items": self.log.item_ids.take(pa.array(np.flatnonzero(~self._item_stays[1:]))),
        }
        counts = {name: {"ids": len(ids), "digest": digest_of(ids)} for name, ids in gone.items()}
        newer = {"newer_events": self._num_newer} if self._extends else {}
        return {"events": self._num_events, **newer, **counts}

    @functools.cached_property
    def events(self) -> np.ndarray:
        """The old place of each event that stays, int64 `[E']`."""
        return np.flatnonzero(np.concatenate([self.stays(block) for block in self.log.blocks]))

    def raw_feature(self, feature: RawFeature) -> RawFeature:
        """Returns the values of a column that stay."""
        rows = {Owner.USER: lambda: self.users, Owner.ITEM: lambda: self.item_rows}
        of_rows = rows.get(feature.column.owner, lambda: self.events)()
        told = None if feature.told is None else feature.told[self.events]
        return dataclasses.replace(feature, values=_compact(feature.values.take(of_rows)), told=told)

    def part(self, block: Block) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the old user of each event of a block that stays, and their arrays by the names in `Block`."""
        stays = self.stays(block)
        arrays = {"item_ids": block.item_ids, "timestamps": block.timestamps, "labels": block.labels, **block.more}
        arrays = {name: values[stays] for name, values in arrays.items()}
        arrays["item_ids"] = self._new_item[arrays["item_ids"]]
        if block.session_places is not None:
            arrays["session_places"] = _moved_sessions(block, stays)
        return _users_of(block)[stays], arrays


def _moved_sessions(block: Block, stays: np.ndarray) -> np.ndarray:
    """Returns where among its user's events that stay the first one of each one's session stands, int32."""
    assert block.session_places is not None
    begins = block.offsets[_users_of(block) - block.first_user]  # of each event's user
    before = np.concatenate([[0], np.cumsum(stays)])
    rank = before[:-1] - before[begins]  # among the user's events that stay
    sessions, rank = (begins + block.session_places)[stays], rank[stays]
    firsts = np.zeros(len(stays), np.int64)
    firsts[sessions[::-1]] = rank[::-1]  # the last assignment, that of the first event, stays
    return firsts[sessions].astype(np.int32)


class _KeptBlocks(Blocks):
    """The blocks of what stays, each made when it is asked for."""

    def __init__(self, kept: _Kept) -> None:
        self._kept = kept
        self._first_users = first_users_of_blocks(kept.offsets[:-1])
        self._part = functools.lru_cache(maxsize=1)(lambda index: kept.part(kept.log.blocks[index]))

    def __len__(self) -> int:
        return len(self._first_users) - 1

    def __getitem__(self, index: int) -> Block:
        kept, (first, end) = self._kept, self._first_users[index : index + 2]
        lowest, highest = kept.users[first], kept.users[end - 1]
        low, high = np.searchsorted(kept.first_users, (lowest, highest), side="right") - 1
        parts: dict[str, list[np.ndarray]] = {}
        for source in range(low, high + 1):
            of_users, arrays = self._part(source)
            here = slice(*np.searchsorted(of_users, (lowest, highest + 1)))
            for name, values in arrays.items():
                parts.setdefault(name, []).append(values[here])
        offsets = kept.offsets[first : end + 1]
        arrays = {name: np.concatenate(values) for name, values in parts.items()}
        return Block(first_user=int(first), offsets=offsets - offsets[0], **arrays)


def _compact(values: ColumnValues) -> ColumnValues:
    """Returns values without the ids that no row has."""
    if not isinstance(values, (IdValues, ListValues)):
        return values
    used = np.zeros(len(values.ids) + 1, bool)
    used[values.codes] = True
    used[0] = False
    code_of = np.where(used, np.cumsum(used), 0).astype(np.int32)
    ids = values.ids.take(pa.array(np.flatnonzero(used) - 1))
    return dataclasses.replace(values, codes=code_of[values.codes], ids=ids)


def shown_forgotten(told: Mapping[str, Any]) -> str:
    """Returns a line about what was forgotten, from the facts."""
    rule = " ".join(f"--{name}={told[name]}" for name in FORGETTING if told[name])
    counts = ", ".join(f"{told[name]['ids']:,} {name}" for name in ("items", "users"))
    return f"forgotten ({rule}): {counts}, with {told['events']:,} events"
