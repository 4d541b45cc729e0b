"""Extends prepared data by newer events, without a look at the files that it was made from.

Ids keep their numbers: new ones come after the old ones, whatever the order of the new files. Only the new files are
read, checked and sorted. The old arrays are copied, with each new event put into its place.

Letters of shapes: E old events, N new events, n old owners (users or items), m new owners, M owners of both.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from din_dist import schema
from din_dist.data.blocks import Block, Blocks, EventLog, ItemFeature, first_users_of_blocks
from din_dist.data.event_store import (
    ITEMS,
    USERS,
    EventStore,
    open_store,
    read_facts,
    reading_prepared,
    vocabulary_of,
)
from din_dist.data.feature_tables import rows_of_ids
from din_dist.data.raw_columns import RAW_DIR, TABLES, RawColumn, RawFeature
from din_dist.data.raw_features import open_raw, raw_ids, raw_vocabulary_path
from din_dist.errors import InputError
from din_dist.features.spec import FeatureConflict, Owner
from din_dist.features.times import unit_of
from din_dist.tables.values import ColumnValues, IdValues, ListValues, NumberValues, VectorValues
from din_dist.text import shown

_RULE = "--extend: newer files must have what the prepared data has"
_REMEDY = "Prepare both with the same columns and features, or prepare all files together"
_IDS_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Extension:
    """Names the prepared data that newer files extend.

    Attributes:
        source: the folder of prepared data, or one that has a single such folder below it (`--data_dir`).
    """

    source: str

    def find(self) -> Path:
        """Returns the folder of the prepared version.

        Raises:
            InputError: there is none, or several.
        """
        folder = Path(self.source)
        if (folder / schema.FACTS_FILE).is_file():
            return folder
        found = [path.parent for path in folder.glob(f"*/*/*/{schema.FACTS_FILE}")]
        found = [version for version in found if version.name[0] != "."]  # those wait to be replaced
        if len(found) != 1:
            what = f"{len(found)} of them below it" if found else "none"
            raise InputError(
                f"--extend: must be the folder of one prepared data set. Received: {self.source}, {what}. Give the "
                "folder that prepare_data printed at its end."
            )
        return found[0]

    def open(self) -> EventStore:
        """Opens the prepared data, with all features of items.

        Raises:
            InputError: it is missing, damaged, or has no packed arrays yet.
        """
        folder = self.find()
        return open_store(folder, list(read_facts(folder).item_features))


def facts_of_parent(store: EventStore) -> dict[str, Any]:
    """Returns what the facts of an extension say about the data that it extends.

    Returns:
        `folder`, `fingerprint` and `events`; `vocabularies`, which has `ids` and `digest` (see `digest_of`) of each.
        A vocabulary of `raw_features/` is named by its file.
    """
    found = {name: store.vocabulary(name) for name in (USERS, ITEMS, *map(vocabulary_of, store.facts.item_features))}
    for path in sorted((store.folder / RAW_DIR).glob("*.parquet")):
        with reading_prepared(path):
            found[f"{RAW_DIR}/{path.stem}"] = pq.read_table(path, columns=["id"]).column("id")
    return {
        "folder": str(store.folder),
        "fingerprint": store.facts.fingerprint,
        "events": store.facts.num_events,
        "vocabularies": {name: {"ids": len(ids), "digest": digest_of(ids)} for name, ids in found.items()},
    }


def digest_of(ids: pa.ChunkedArray | pa.Array) -> str:
    """Returns the digest of ids in their order.

    It covers, of every 2^20 ids, integers as 8 bytes each, or the lengths of texts, 8 bytes each, and then their bytes.
    """
    found = hashlib.blake2b(digest_size=16)
    for first in range(0, len(ids), _IDS_AT_ONCE):
        part = pa.chunked_array(ids[first : first + _IDS_AT_ONCE])
        if pa.types.is_integer(part.type):
            found.update(part.cast(pa.int64()).to_numpy().tobytes())
            continue
        texts = part.cast(pa.large_string())
        found.update(pc.binary_length(texts).to_numpy().astype(np.int64).tobytes())
        for chunk in texts.chunks:
            found.update(_bytes_of(chunk))
    return found.hexdigest()


def _bytes_of(texts: pa.Array) -> memoryview:
    _, offsets, data = texts.buffers()
    places = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return memoryview(data or b"")[places[0] : places[-1]]


def extended(old: EventStore, new: EventLog, conflict: FeatureConflict) -> EventLog:
    """Returns prepared events and newer ones as one log. Of events of one user and time the old ones come first.

    Requests and sessions of the newer files are never those of the prepared data.

    Args:
        old: prepared data, with all its features of items.
        new: the newer events.
        conflict: what counts if an owner has another value of a feature in the newer files.

    Raises:
        InputError: the two do not fit each other, or an owner has two values.
    """
    _require_alike(old, new)
    users = _unified(old.vocabulary(USERS).combine_chunks(), new.user_ids, "users")
    items = _unified(old.vocabulary(ITEMS).combine_chunks(), new.item_ids, "items")
    actions, code_of_action = _actions(old, new)
    places = _Places(old, _NewEvents.of(new, users, items, code_of_action), len(users.ids))
    owners = {Owner.USER: users, Owner.ITEM: items}
    features = {}
    for name, feature in new.item_features.items():
        before = IdValues(old.item_features[name], old.vocabulary(vocabulary_of(name)).combine_chunks())
        column = _OwnerColumn(name, Owner.ITEM, items, old.folder, conflict)
        found = column.joined(before, IdValues(feature.of_item, feature.ids))
        assert isinstance(found, IdValues)
        features[name] = ItemFeature(found.codes, found.ids)
    return dataclasses.replace(
        new,
        user_ids=users.ids,
        item_ids=items.ids,
        item_features=features,
        blocks=ExtendedBlocks(places),
        raw_features=tuple(_raw_feature(old, feature, places, owners, conflict) for feature in new.raw_features),
        actions=actions,
    )


def _require_alike(old: EventStore, new: EventLog) -> None:
    """Refuses newer files that lack what the prepared data has, or have more."""
    facts, more = old.facts, new.blocks[0].more
    for words, before, now in (
        ("labels", facts.has_labels, new.has_labels),
        ("labels to predict (--label_columns)", ",".join(facts.tasks), ",".join(new.tasks)),
        ("requests (--request_column)", facts.has_request_times, "request_times" in more),
        ("times of labels (--label_time_column)", facts.has_label_times, "label_times" in more),
        ("sessions (--session_column)", facts.has_sessions, "session_places" in more),
        ("weights (--weight_column)", facts.has_weights, "weights" in more),
        ("actions (--action_column)", bool(facts.actions), "actions" in more),
        ("features of items (--item_features)", _names(facts.item_features), _names(new.item_features)),
    ):
        if before != now:
            received = f"{_there(before)} in {old.folder}, and {_there(now)} in the newer files"
            raise InputError(f"{_RULE}, here {words}. Received: {received}. {_REMEDY}.")
    if facts.has_behaviours or new.behaviours:
        raise InputError(
            "--extend: prepared data with a log of behaviours cannot be extended, because behaviours of users without "
            "events were left out of it. Received: --behaviours_path. Prepare all files together."
        )
    if new.offers is not None:
        raise InputError(
            "--extend: prepared data with a table of offers cannot be extended, because only the rows of its events "
            "were kept. Received: --offers_path. Prepare all files together."
        )
    times = [block.timestamps for block in new.blocks]
    unit, before_unit = unit_of(float(np.median(np.concatenate(times)))), unit_of(facts.last_timestamp)
    if unit is not before_unit:
        raise InputError(
            f"{_RULE}, here times of one unit. Received: {before_unit} in {old.folder}, by their size, and {unit}. "
            "Convert the times of one of the two."
        )


def _names(names: Iterable[str]) -> str:
    return ",".join(sorted(names))


def _there(what: bool | str) -> str:
    return what if what and isinstance(what, str) else ("some" if what else "none")


class _Unified(NamedTuple):
    """The own ids of both: of users, of items, or of a feature.

    Attributes:
        ids: `[M]`, the old ones first, then the new ones in the order of the newer files.
        place: int64 `[m]`, the place of each of the newer files' in `ids`.
    """

    ids: pa.Array
    place: np.ndarray


def _unified(old: pa.Array, new: pa.Array, what: str) -> _Unified:
    if not len(new):
        return _Unified(old, np.zeros(0, np.int64))
    if not len(old):
        return _Unified(new, np.arange(len(new)))
    if pa.types.is_integer(old.type) and not pa.types.is_integer(new.type):
        raise InputError(
            f"--extend: ids must be of the type that they have in the prepared data, here integers of {what}. "
            f"Received: text such as {shown(new[0].as_py())}. Correct the newer files, or prepare all files together."
        )
    place = rows_of_ids(new, old)
    added = np.flatnonzero(place < 0)
    place[added] = len(old) + np.arange(len(added))
    return _Unified(pa.concat_arrays([old, new.take(pa.array(added)).cast(old.type)]), place)


def _actions(old: EventStore, new: EventLog) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the actions of both, and the code of each code of the newer files, uint8 `[1 + newer actions]`."""
    actions = tuple(dict.fromkeys([*old.facts.actions, *new.actions]))
    if len(actions) > schema.MOST_ACTIONS:
        raise InputError(
            f"--action_column: must have at most {schema.MOST_ACTIONS} different values. Received: {len(actions):,} "
            "with those of the data that --extend names. Correct the newer files."
        )
    code_of = {action: 1 + place for place, action in enumerate(actions)}
    return actions, np.array([0, *(code_of[action] for action in new.actions)], np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class _NewEvents:
    """The newer events, in the order of users of both, each user's in time order.

    Attributes:
        user_of: int64 `[N]`, the user of each.
        order: int64 `[N]`, the place of each among the newer events as their log has them.
        arrays: `[N]` each, by the names in `Block`.
    """

    user_of: np.ndarray
    order: np.ndarray
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, new: EventLog, users: _Unified, items: _Unified, code_of_action: np.ndarray) -> _NewEvents:
        blocks = list(new.blocks)
        counts = np.concatenate([np.diff(block.offsets) for block in blocks])
        user_of = np.repeat(users.place, counts)
        order = np.argsort(user_of, kind="stable")
        parts = [{**_always(block), **block.more} for block in blocks]
        arrays = {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}
        arrays["item_ids"] = (items.place[arrays["item_ids"] - 1] + 1).astype(np.int32)
        if "actions" in arrays:
            arrays["actions"] = code_of_action[arrays["actions"]]
        return cls(user_of[order], order, arrays)


def _always(block: Block) -> dict[str, np.ndarray]:
    return {"item_ids": block.item_ids, "timestamps": block.timestamps, "labels": block.labels}


class _Places:
    """Finds where old and new events stand among both.

    Args:
        old: the prepared data.
        new: the newer events.
        num_users: of both.
    """

    def __init__(self, old: EventStore, new: _NewEvents, num_users: int) -> None:
        self.old, self.new = old, new
        num_new_users = num_users - old.facts.num_users
        self.old_offsets = np.concatenate([old.user_offsets, np.full(num_new_users, old.user_offsets[-1])])
        self.new_offsets = np.concatenate([[0], np.cumsum(np.bincount(new.user_of, minlength=num_users))])
        self.offsets = (self.old_offsets + self.new_offsets).astype(np.int64)
        # Before which old event each new one stands, int64 [N], ascending; then its place among both.
        self.before = _first_later(old.timestamps, self.old_offsets, new.user_of, new.arrays["timestamps"])
        self.of_new = self.before + np.arange(len(self.before))

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The row of each event of both, int64 `[E + N]`, if all new rows in the order of their log follow the old."""
        found = np.empty(self.offsets[-1], np.int64)
        is_new = np.zeros(len(found), bool)
        is_new[self.of_new] = True
        found[self.of_new] = self.old_offsets[-1] + self.new.order
        found[~is_new] = np.arange(self.old_offsets[-1])
        return found

    def merged(self, name: str, first: int, end: int) -> np.ndarray:
        """Returns an array of events `first` to `end` - 1 of both."""
        low, high = np.searchsorted(self.of_new, (first, end))
        old, new = slice(first - low, end - high), slice(low, high)
        values = self.new.arrays[name][new]
        before = getattr(self.old, name)
        before = np.ones(old.stop - old.start, values.dtype) if before is None else before[old]
        if name == "session_places":
            before, values = self._moved(before, np.arange(old.start, old.stop)), self._moved_new(values, new)
        found = np.empty(end - first, values.dtype)
        is_new = np.zeros(end - first, bool)
        is_new[self.of_new[new] - first] = True
        found[is_new], found[~is_new] = values, before
        return found

    def _moved(self, places: np.ndarray, events: np.ndarray) -> np.ndarray:
        """Returns where among its user's events of both the first event of each old event's session stands."""
        users = np.searchsorted(self.old_offsets, events, side="right") - 1
        firsts = self.old_offsets[users] + places
        return places + np.searchsorted(self.before, firsts, side="right") - self.new_offsets[users]

    def _moved_new(self, places: np.ndarray, new: slice) -> np.ndarray:
        """Returns the same of new events."""
        users = self.new.user_of[new]
        return (self.of_new[self.new_offsets[users] + places] - self.offsets[users]).astype(places.dtype)


def _first_later(times: np.ndarray, offsets: np.ndarray, users: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Returns the first event of a user that is later than a moment, int64 `[N]`; the end of the user's if none is.

    Args:
        times: int64 `[E]`, ascending for each user.
        offsets: int64 `[U + 1]`, where each user's events begin.
        users: int64 `[N]`.
        moments: int64 `[N]`.
    """
    low, high = offsets[users].astype(np.int64), offsets[users + 1].astype(np.int64)
    while (open_ := np.flatnonzero(low < high)).size:
        middle = (low[open_] + high[open_]) // 2
        is_later = times[middle] > moments[open_]
        high[open_[is_later]] = middle[is_later]
        low[open_[~is_later]] = middle[~is_later] + 1
    return low


class ExtendedBlocks(Blocks):
    """The blocks of prepared events and newer ones, each made when it is asked for."""

    def __init__(self, places: _Places) -> None:
        self._places = places
        self._first_users = first_users_of_blocks(places.offsets[:-1])

    def __len__(self) -> int:
        return len(self._first_users) - 1

    def __getitem__(self, index: int) -> Block:
        first, last = self._first_users[index], self._first_users[index + 1]
        offsets = self._places.offsets[first : last + 1]
        arrays = {
            name: self._places.merged(name, int(offsets[0]), int(offsets[-1])) for name in self._places.new.arrays
        }
        return Block(first_user=int(first), offsets=offsets - offsets[0], **arrays)


def _raw_feature(
    old: EventStore,
    new: RawFeature,
    places: _Places,
    owners: Mapping[Owner, _Unified],
    conflict: FeatureConflict,
) -> RawFeature:
    """Returns the values of a column of both."""
    column = new.column
    before = _open_raw(old, column)
    if column.owner in owners:
        joined = _OwnerColumn(column.column or column.path, column.owner, owners[column.owner], old.folder, conflict)
        values = joined.joined(before.values, new.values)
    else:
        values = _joined(before.values, new.values, column.column).take(places.rows)
    told: np.ndarray | None = None
    if before.told is not None or new.told is not None:
        num_old, num_new = places.old_offsets[-1], len(places.new.order)
        both = [np.ones(num_old, bool) if before.told is None else before.told]
        both.append(np.ones(num_new, bool) if new.told is None else new.told)
        told = np.concatenate(both)[places.rows]
    return RawFeature(column, values, told, new.extra)


def _open_raw(old: EventStore, column: RawColumn) -> RawFeature:
    try:
        found = open_raw(old.folder, column, old.files)
    except InputError as error:
        if isinstance(error.__cause__, (KeyError, FileNotFoundError)):
            raise InputError(
                f"{_RULE}, here the feature of {column.column or column.path} (--features). Received: none in "
                f"{old.folder / RAW_DIR}. {_REMEDY}."
            ) from error
        raise
    if raw_vocabulary_path(old.folder, column).exists() and isinstance(found.values, (IdValues, ListValues)):
        ids = raw_ids(old.folder, column).combine_chunks()
        return dataclasses.replace(found, values=dataclasses.replace(found.values, ids=ids))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _OwnerColumn:
    """Joins the values of a feature of users or items.

    Attributes:
        name: of the column.
        owner: whose it is.
        owners: these.
        folder: of the prepared data, for the texts of errors.
        conflict: what counts if both have a value.
    """

    name: str
    owner: Owner
    owners: _Unified
    folder: Path
    conflict: FeatureConflict

    def joined(self, old: ColumnValues, new: ColumnValues) -> ColumnValues:
        """Returns the values of all owners.

        Args:
            old: of the n old ones, those of items with one for item 0; likewise the next.
            new: of the m of the newer files.

        Raises:
            InputError: an owner has two values, and none of them counts.
        """
        both, base = _joined(old, new, self.name), int(self.owner is Owner.ITEM)
        given = both.given
        rows = np.full(base + len(self.owners.ids), -1, np.int64)
        rows[: len(old)] = np.where(given[: len(old)], np.arange(len(old)), -1)
        told = np.flatnonzero(given[len(old) + base :])
        targets, row_of_told = base + self.owners.place[told], len(old) + base + told
        repeated = np.flatnonzero(rows[targets] >= 0)
        if self.conflict is FeatureConflict.ERROR:
            differs = both.differ(rows[targets[repeated]], row_of_told[repeated])
            if differs.any():
                raise self._two_values(both, rows, targets, row_of_told, int(repeated[np.argmax(differs)]))
        counts = rows[targets] < 0 if self.conflict is not FeatureConflict.LAST else np.ones(len(targets), bool)
        rows[targets[counts]] = row_of_told[counts]
        return both.take(rows)

    def _two_values(
        self, both: ColumnValues, rows: np.ndarray, targets: np.ndarray, row_of_told: np.ndarray, place: int
    ) -> InputError:
        target = int(targets[place])
        own_id = self.owners.ids[target - int(self.owner is Owner.ITEM)].as_py()
        return InputError(
            f"--extend: a feature of {TABLES[self.owner]} has one value for each, here {self.name}. Received: "
            f"{self.owner} {own_id!r} with {both.shown(int(rows[target]))} in {self.folder}, and with "
            f"{both.shown(int(row_of_told[place]))} in the newer files. Correct the files, or give "
            "--item_feature_conflict=first or last."
        )


def _joined(old: ColumnValues, new: ColumnValues, name: str) -> ColumnValues:
    """Returns old values and then newer ones, with one vocabulary."""
    match old, new:
        case IdValues(), IdValues():
            ids, place = _unified(old.ids, new.ids, name)
            codes = np.append(0, place + 1).astype(np.int32)[new.codes]
            return IdValues(np.concatenate([old.codes, codes]), ids)
        case NumberValues(), NumberValues():
            return NumberValues(np.concatenate([old.numbers, new.numbers]))
        case ListValues(), ListValues():
            ids, place = _unified(old.ids, new.ids, name)
            weights = None
            if old.weights is not None and new.weights is not None:
                weights = np.concatenate([old.weights, new.weights])
            codes = (place + 1).astype(np.int32)[new.codes - 1]
            offsets = np.concatenate([old.offsets, old.offsets[-1] + new.offsets[1:]])
            return ListValues(np.concatenate([old.codes, codes]), offsets, ids, weights)
        case VectorValues(), VectorValues():
            sizes = {values.vectors.shape[1] for values in (old, new)} - {0}
            if len(sizes) > 1:
                raise InputError(
                    f"{_RULE}, here vectors of one length in {name}. Received: {old.vectors.shape[1]} and "
                    f"{new.vectors.shape[1]} numbers. Correct the newer files."
                )
            size = max(sizes, default=0)
            return VectorValues(np.concatenate([_sized(values.vectors, size) for values in (old, new)]))
    raise TypeError(type(old), type(new))


def _sized(vectors: np.ndarray, size: int) -> np.ndarray:
    return vectors if vectors.shape[1] == size else np.full((len(vectors), size), np.nan, np.float16)
