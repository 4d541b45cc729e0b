"""Prepared events in memory: flat arrays, mapped from files that the processes of one machine share.

Letters of shapes: U users, E events, T touched items, M ids that are asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist import mapped_files, progress, schema
from din_dist.data import checksums
from din_dist.data.array_writer import ArrayWriters
from din_dist.data.blocks import Block
from din_dist.data.histories import cut_histories
from din_dist.data.raw_columns import RawColumn, raw_vocabulary_path
from din_dist.errors import InputError
from din_dist.features.encoding import StoredFeature
from din_dist.features.spec import Owner
from din_dist.files import published_folder, read_record, write_text
from din_dist.schema import HistoryRule
from din_dist.text import parse_json, reason, shown

PACKED_DIR = "packed"
USERS = "users"  # names of vocabularies; see `vocabulary_of` for those of item features
ITEMS = "items"

_OVERWRITE = "launch/train.sh or prepare_data --overwrite_prepared"


class FileState(NamedTuple):
    """The state of a file, which differs between two files of one path and before and after a write."""

    device: int
    inode: int
    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Returns the present state of a file."""
        stat = path.stat()
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@dataclasses.dataclass(frozen=True, eq=False)
class HistorySet:
    """One of the named histories of an event.

    Attributes:
        name: of the history.
        longest: the most items; the newest are kept.
        item_ids: int32, the items of its behaviours, as of `EventStore.history_item_ids`; likewise the next.
        offsets: int64 `[U + 1]`; if histories are sessions, `[S + 1]`.
        ends: int64 `[E]`; None if it is the event's own index.
        times: int64, when each behaviour happened; None if the timestamps tell.
        feature: the feature of items that behaviours must share with the candidate; empty: none. With it, each user's
            behaviours stand in the order of `keys`.
        keys: int64, ascending for each user: the feature of the behaviour's item, shifted by `KEY_BITS`, and the place
            of the behaviour in the order of time. None without a feature.
        rows: int64, the row of each behaviour in features of behaviours; see `EventStore.features`. None: its place is.
    """

    name: str
    longest: int
    item_ids: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray | None
    times: np.ndarray | None = None
    feature: str = ""
    keys: np.ndarray | None = None
    rows: np.ndarray | None = None


KEY_BITS = 40  # of a place among all behaviours, in a key


@dataclasses.dataclass(frozen=True, eq=False)
class EventStore:
    """All events of a data set, user after user, each user's in time order.

    The arrays are memory-mapped copy-on-write and start at a multiple of 64 bytes. So nothing is read before it is
    used, processes share the pages, and TensorFlow takes the arrays without a copy.

    Attributes:
        facts: counts; only those item features that were asked for.
        folder: the prepared version's folder.
        user_offsets: int64 `[U + 1]`, where each user's events begin.
        item_ids: int32 `[E]`, dense ids from 1.
        timestamps: int64 `[E]`.
        labels: uint8 `[E]`, or None where the log has no labels.
        request_times: int64 `[E]`, the first time of each event's request; None where the log names no requests.
        label_times: int64 `[E]`, when each positive event came; None where the log does not say.
        weights: float32 `[E]`, by how much each event counts in training; None where all count alike.
        task_labels: uint8 `[E]`, bit t is the label of task t; None where there is one task, of `labels`.
        history_item_ids: int32, the items of the behaviours, in the order of their times: of the positive events, or
            of a log of behaviours. It is `item_ids` itself without either.
        history_offsets: int64 `[U + 1]`, where each user's behaviours begin; `user_offsets` itself without either. If
            histories are sessions, `[S + 1]`, where each session's begin: read session where users are named below.
        history_ends: int64 `[E]`, how many behaviours there are of all users before and of this user that are known
            before the event's request; None if it is the event's own index, as without either. Event e of user u has
            this history of at most n items:
            `history_item_ids[max(history_offsets[u], history_ends[e] - n) : history_ends[e]]`.
        history_times: int64, when each behaviour happened; None if the timestamps tell.
        sessions: int64 `[E]`, the session of each event, if histories are sessions: 0 to S - 1, in the order of their
            first events. None: a history has all that its user did before.
        session_places: int32 `[E]`, as of `schema.BLOCK_SESSION_PLACES`; None where the log names no sessions.
        touched_offsets: int64 `[U + 1]`, where the touched items of each user begin, those that can be candidates; None
            with labels.
        touched_gaps: int32 `[T]`: with a user's touched items sorted and each taken once as t_0 < t_1 < ...,
            `t_j - 1 - j`: the number of smaller ids the user never touched.
            Nondecreasing for each user. None with labels.
        item_features: name -> int32 `[num_items + 1]`, an item's dense id -> its feature's dense id; 0 for item 0.
        history_rows: int64, as of `HistorySet.rows`, of the history above.
        features: name -> a declared feature. Its rows are users, events, or items with item 0, by its owner. Those of
            behaviours are events, or the behaviours of a log of their own in its order.
        sets: several histories by name, where the model is to read those; empty if it reads the one above.
        actions: uint8 `[E]`, as of `schema.BLOCK_ACTIONS`; None where no column tells.
        history_actions: uint8, those of the behaviours of a log of their own; None where no column tells.
        files: the state of each file just before it was opened, so that every later change is noticed.
    """

    facts: schema.DatasetFacts
    folder: Path
    user_offsets: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray
    labels: np.ndarray | None
    history_item_ids: np.ndarray
    history_offsets: np.ndarray
    history_ends: np.ndarray | None
    touched_offsets: np.ndarray | None
    touched_gaps: np.ndarray | None
    item_features: Mapping[str, np.ndarray]
    request_times: np.ndarray | None = None
    label_times: np.ndarray | None = None
    history_times: np.ndarray | None = None
    weights: np.ndarray | None = None
    task_labels: np.ndarray | None = None
    actions: np.ndarray | None = None
    history_actions: np.ndarray | None = None
    sets: tuple[HistorySet, ...] = ()
    sessions: np.ndarray | None = None
    session_places: np.ndarray | None = None
    history_rows: np.ndarray | None = None
    features: Mapping[str, StoredFeature] = dataclasses.field(default_factory=dict)
    files: dict[Path, FileState] = dataclasses.field(default_factory=dict)

    def histories(self, max_history_length: int) -> tuple[HistorySet, ...]:
        """Returns the histories that a model reads: the named ones, or the one without a name."""
        one = (self.history_item_ids, self.history_offsets, self.history_ends, self.history_times)
        return self.sets or (HistorySet("", max_history_length, *one, rows=self.history_rows),)

    @property
    def whole_history(self) -> HistorySet:
        """All behaviours in the order of time, however long."""
        (whole,) = dataclasses.replace(self, sets=()).histories(np.iinfo(np.int64).max)
        return whole

    def histories_in_full(self, max_history_length: int) -> tuple[HistorySet, ...]:
        """Returns what is read where many candidates share the histories of a user.

        In the place of a history with a feature stands the whole one, of which each candidate gets its own.
        """
        every = self.histories(max_history_length)
        return tuple(self.whole_history if history.feature else history for history in every)

    def owners(self, users: np.ndarray, events: np.ndarray) -> np.ndarray:
        """Returns whose behaviours make the histories of some events, `[M]`: users, or sessions.

        Args:
            users: int64 `[M]`, of the events.
            events: int64 `[M]`.
        """
        return users if self.sessions is None else self.sessions[events]

    @property
    def begins_a_session(self) -> np.ndarray:
        """Tells which events are the first of their session, bool `[E]`, if histories are sessions."""
        assert self.sessions is not None
        found = np.ones(len(self.sessions), bool)
        found[1:] = self.sessions[1:] > np.maximum.accumulate(self.sessions[:-1])
        return found

    @property
    def behaviour_times(self) -> np.ndarray:
        """When what each row of features of behaviours tells of happened, int64."""
        if self.facts.has_behaviours:
            assert self.history_times is not None
            return self.history_times
        return self.timestamps if self.label_times is None else self.label_times

    @property
    def max_touched(self) -> int:
        """The largest number of different items that one user touched; 0 with labels."""
        return 0 if self.touched_offsets is None else int(np.diff(self.touched_offsets).max(initial=0))

    def labels_of(self, events: np.ndarray, task: int = 0) -> np.ndarray:
        """Returns the labels of some events, uint8 `[M]`: of a task, or of the only one.

        Args:
            events: int64 `[M]`, of a log with labels.
            task: from 0, in the order of `facts.tasks`.
        """
        if self.task_labels is not None:
            return self.task_labels[events] >> task & 1
        assert self.labels is not None
        return self.labels[events]

    def check_unchanged(self) -> None:
        """Compares the state of each file with that when it was opened. That takes one `stat` a file.

        Data that was prepared again counts as changed. The arrays that are mapped here are still the old ones, but a
        worker that joins later would train on the new.

        Raises:
            InputError: a file was removed, replaced, cut or written to.
        """
        changes = {path: what for path, opened in self.files.items() if (what := _change(path, opened))}
        if not changes:
            return
        rule = "prepared data must stay as it is while a job uses it. Received:"
        if len(changes) == len(self.files) and set(changes.values()) <= {_REMOVED, _REPLACED}:
            what = "was prepared anew" if self.folder.exists() else "was removed"
            raise InputError(
                f"{self.folder}: {rule} it {what} under the running job. Start the job again once it is there: on the "
                "same events it goes on from its last checkpoint."
            )
        path, what = next(iter(changes.items()))
        raise InputError(f"{path}: {rule} this file {what}. {_remedy(path)}, and start the job again.")

    def vocabulary(self, name: str) -> pa.ChunkedArray:
        """Reads the log's own ids of a vocabulary from the disk.

        Entry i belongs to dense id i + 1. Users are counted from 0, as in `user_offsets`: user u is entry u.

        Args:
            name: `USERS`, `ITEMS`, or `vocabulary_of` a feature.

        Raises:
            InputError: the file is missing or damaged.
        """
        with reading_prepared(vocabulary_path(self.folder, name)) as path:
            return pq.read_table(path, columns=["id"]).column("id")

    def feature_vocabulary(self, name: str) -> pa.Array:
        """Reads the own ids of a declared feature from the disk: entry i belongs to row i + 1 of its table.

        It is empty for a feature whose rows are hashes, bins or times, and for one without a table. The rows of trained
        vectors are users or items.

        Raises:
            InputError: the file is missing or damaged.
        """
        feature = self.features[name]
        spec = feature.encoding.spec
        if feature.start is not None:
            return self.vocabulary(USERS if spec.owner is Owner.USER else ITEMS).combine_chunks()
        column = RawColumn.of(spec)
        if feature.vocabulary is None or column is None:
            return pa.array([], pa.large_string())
        with reading_prepared(raw_vocabulary_path(self.folder, column)) as path:
            ids = pq.read_table(path, columns=["id"]).column("id")
            return ids.take(pa.array(feature.vocabulary)).combine_chunks()

    def own_ids(self, name: str, dense_ids: Sequence[int] | np.ndarray, unknown: str = "(unknown)") -> list[str]:
        """Returns the log's own ids of a vocabulary as text.

        Args:
            name: the vocabulary; see `vocabulary`.
            dense_ids: integers `[M]`.
            unknown: the text for the reserved id.
        """
        dense_ids = np.asarray(dense_ids)
        known = dense_ids != schema.UNKNOWN_ID
        found = iter(self.vocabulary(name).take(pa.array(dense_ids[known] - 1)).to_pylist())
        return [str(next(found)) if here else unknown for here in known]


def vocabulary_of(feature: str) -> str:
    """Returns the name of an item feature's vocabulary: the feature's own, unless that is `USERS` or `ITEMS`."""
    return schema.feature_label(feature) if feature in (USERS, ITEMS) else feature


def vocabulary_path(folder: Path, name: str) -> Path:
    """Returns the file of a vocabulary."""
    return folder / schema.VOCABULARY_DIR / f"{quote(name, safe='')}.parquet"


def item_feature_path(folder: Path, name: str) -> Path:
    """Returns the file of an item feature."""
    return folder / schema.ITEM_FEATURES_DIR / f"{quote(name, safe='')}.npy"


def read_facts(folder: Path) -> schema.DatasetFacts:
    """Reads the facts about the prepared version in `folder`.

    Raises:
        InputError: the file is missing or damaged.
    """
    with reading_prepared(folder / schema.FACTS_FILE) as path:
        fields = parse_json(read_record(path))
        if not isinstance(fields, dict):
            raise ValueError(f"it holds {shown(fields)}")
        return schema.DatasetFacts.from_json(fields)


def write_facts(folder: Path, facts: schema.DatasetFacts) -> None:
    """Publishes the facts about the prepared version in `folder`."""
    write_text(folder / schema.FACTS_FILE, json.dumps(facts.to_json(), indent=2))


def is_packed(folder: Path, facts: schema.DatasetFacts) -> bool:
    """Tells whether `folder` has packed arrays, with histories that are cut by the present rule."""
    return (folder / PACKED_DIR).is_dir() and facts.history_rule is facts.present_rule


def pack(folder: Path, facts: schema.DatasetFacts, blocks: Iterable[Block]) -> None:
    """Publishes the packed arrays of the prepared version in `folder`, and holds one block in memory at a time.

    The caller must hold a lock, because two processes would write to the same files.

    Args:
        folder: the folder of the prepared version.
        facts: the facts about it.
        blocks: all its blocks, in the order of the users.

    Raises:
        InputError: the blocks do not fit the facts.
    """
    with published_folder(folder / PACKED_DIR, aside=folder / f"{PACKED_DIR}.incomplete") as aside:
        _write_arrays(aside, facts, blocks)
        checksums.write_checksums(aside)
    if facts.history_rule is not facts.present_rule:
        write_facts(folder, facts.by_present_rule())


def open_store(folder: Path, features: Sequence[str]) -> EventStore:
    """Maps the packed arrays in `folder` into memory, with the named item features.

    Raises:
        InputError: a file is missing or cut off, does not fit the others, or was changed meanwhile.
    """
    with progress.at(f"reading data in {folder}"):
        return _open_store(folder, features)


def _open_store(folder: Path, features: Sequence[str]) -> EventStore:
    files: dict[Path, FileState] = {}  # before each is read; compared when all are, because they must belong together
    with reading_prepared(folder / schema.FACTS_FILE) as path:
        files[path] = FileState.of(path)
    facts = read_facts(folder)
    facts = dataclasses.replace(facts, item_features={name: facts.item_features[name] for name in features})
    _check_vocabularies(folder, facts, files)
    num_events, load = facts.num_events, _Loader(folder, facts.num_users, files)
    user_offsets = load.offsets("user_offsets", num_events)
    item_ids = load.packed("item_ids", np.int32, num_events)
    labels = history_ends = history_times = touched_offsets = touched_gaps = None
    request_times = load.packed("request_times", np.int64, num_events) if facts.has_request_times else None
    label_times = load.packed("label_times", np.int64, num_events) if facts.has_label_times else None
    session_places = load.packed("session_places", np.int32, num_events) if facts.has_sessions else None
    history_offsets, history_item_ids = user_offsets, item_ids
    if facts.has_labels:
        labels = load.packed("labels", np.uint8, num_events)
    else:
        touched_offsets = load.offsets("touched_offsets", None)
        touched_gaps = load.packed("touched_gaps", np.int32, int(touched_offsets[-1]))
    if facts.selects_behaviours:
        history_ends = load.packed("history_ends", np.int64, num_events)
        history_offsets = load.offsets("history_offsets", None)
        history_item_ids = load.packed("history_item_ids", np.int32, int(history_offsets[-1]))
        if _keeps_times(facts):
            history_times = load.packed("history_times", np.int64, int(history_offsets[-1]))
    store = EventStore(
        facts=facts,
        folder=folder,
        user_offsets=user_offsets,
        item_ids=item_ids,
        timestamps=load.packed("timestamps", np.int64, num_events),
        labels=labels,
        history_item_ids=history_item_ids,
        history_offsets=history_offsets,
        history_ends=history_ends,
        touched_offsets=touched_offsets,
        touched_gaps=touched_gaps,
        request_times=request_times,
        label_times=label_times,
        session_places=session_places,
        history_times=history_times,
        weights=load.packed("weights", np.float32, num_events) if facts.has_weights else None,
        task_labels=load.packed("task_labels", np.uint8, num_events) if facts.tasks else None,
        actions=load.packed("actions", np.uint8, num_events) if facts.actions and not facts.has_behaviours else None,
        history_actions=(
            load.packed("history_actions", np.uint8, len(history_item_ids))
            if facts.actions and facts.has_behaviours
            else None
        ),
        item_features={name: load.item_feature(name, facts.num_items + 1) for name in facts.item_features},
        files=files,
    )
    store.check_unchanged()
    return store


def _check_vocabularies(folder: Path, facts: schema.DatasetFacts, files: dict[Path, FileState]) -> None:
    """Checks the files of the ids' names, which nothing reads before a job's end: that is too late to miss them."""
    sizes = {USERS: facts.num_users, ITEMS: facts.num_items}
    sizes |= {vocabulary_of(name): num_ids for name, num_ids in facts.item_features.items()}
    for name, num_ids in sizes.items():
        with reading_prepared(vocabulary_path(folder, name)) as path:
            files[path] = FileState.of(path)
            checksums.check(path)
            num_found = pq.read_metadata(path).num_rows
        if num_found != num_ids:
            raise InputError(f"{path}: must hold {num_ids} ids. Received: {num_found}. {_remedy(path)}.")


class _Loader:
    """Maps the arrays of a prepared version, and checks their types and lengths.

    Args:
        folder: the folder of the prepared version.
        num_users: the number of users there.
        files: the state of each file, which is noted here.
    """

    def __init__(self, folder: Path, num_users: int, files: dict[Path, FileState]) -> None:
        self._folder, self._num_users, self._files = folder, num_users, files

    def packed(self, name: str, dtype: type, length: int | None) -> np.ndarray:
        """Returns a packed array of `length` values; None: of any number."""
        return self._load(self._packed_path(name), dtype, length)

    def offsets(self, name: str, end: int | None) -> np.ndarray:
        """Returns the offsets of users, int64 `[U + 1]`, the last of which is `end`; None: any number."""
        offsets = self.packed(name, np.int64, self._num_users + 1)
        if end not in (None, offsets[-1]):
            path = self._packed_path(name)
            raise InputError(f"{path}: must end with {end}. Received: {offsets[-1]}. {_remedy(path)}.")
        return offsets

    def item_feature(self, name: str, length: int) -> np.ndarray:
        """Returns an item feature, int32 `[length]`."""
        return self._load(item_feature_path(self._folder, name), np.int32, length)

    def _packed_path(self, name: str) -> Path:
        return self._folder / PACKED_DIR / f"{name}.npy"

    def _load(self, path: Path, dtype: type, length: int | None) -> np.ndarray:
        mapped = map_array(path, self._files)
        if mapped.dtype != dtype or mapped.ndim != 1 or length not in (None, len(mapped)):
            raise InputError(
                f"{path}: must hold {length} values of {np.dtype(dtype)}. "
                f"Received: {mapped.shape} of {mapped.dtype}. {_remedy(path)}."
            )
        return np.asarray(mapped)


def map_array(path: Path, files: dict[Path, FileState]) -> np.ndarray:
    """Maps a .npy file into memory, and notes its state in `files`.

    Raises:
        InputError: the file is missing or damaged.
    """
    with reading_prepared(path):
        files[path] = FileState.of(path)
        checksums.check(path)
        mapped = np.load(path, mmap_mode="c", allow_pickle=False)
        if (end := mapped.offset + mapped.nbytes) != files[path].num_bytes:
            raise ValueError(f"its values end at byte {end} of {files[path].num_bytes}")
    mapped_files.watch(mapped, path, f"Look after its disk. {_remedy(path)}, and start the command again")
    return mapped


@contextlib.contextmanager
def packing(folder: Path, facts: schema.DatasetFacts) -> Iterator[Callable[[Block], None]]:
    """Yields what writes the packed arrays of one block after the other, of some successive users of a data set.

    Offsets begin with 0, as if these users were all.

    Args:
        folder: of the arrays.
        facts: the facts about the data set.
    """
    with ArrayWriters(folder, _DTYPES) as writers:
        yield _PackedArrays(writers, facts).append


def _write_arrays(folder: Path, facts: schema.DatasetFacts, blocks: Iterable[Block]) -> None:
    num_users = num_events = 0
    with packing(folder, facts) as pack:
        for block in blocks:
            progress.note()
            if block.first_user != num_users:
                raise InputError(
                    f"{folder.parent}: records must hold all users in order. Received: user {block.first_user} where "
                    f"user {num_users} must stand. Give {_OVERWRITE}."
                )
            pack(block)
            num_users += len(block.offsets) - 1
            num_events += len(block.item_ids)
    if (num_users, num_events) != (facts.num_users, facts.num_events):
        raise InputError(
            f"{folder.parent}: records must hold {facts.num_users} users and {facts.num_events} events. "
            f"Received: {num_users} and {num_events}. Give {_OVERWRITE}."
        )


_DTYPES = {  # of the arrays that are not int64
    **dict.fromkeys(("item_ids", "history_item_ids", "touched_gaps", "session_places"), np.int32),
    **dict.fromkeys(("labels", "task_labels", "actions", "history_actions"), np.uint8),
    "weights": np.float32,
}


def _keeps_times(facts: schema.DatasetFacts) -> bool:
    """Tells whether the timestamps do not tell when each behaviour happened, or which events come before a moment."""
    return facts.has_request_times or facts.has_label_times or facts.has_behaviours


class _PackedArrays:
    """Writes the packed arrays of a data set, block by block.

    Args:
        writers: of the files.
        facts: the facts about the data set.
    """

    def __init__(self, writers: ArrayWriters, facts: schema.DatasetFacts) -> None:
        self._write, self._facts = writers.append, facts
        self._num_events = self._num_behaviours = self._num_touched = 0
        self._write("user_offsets", np.zeros(1, np.int64))
        if facts.selects_behaviours:
            self._write("history_offsets", np.zeros(1, np.int64))
        if not facts.has_labels:
            self._write("touched_offsets", np.zeros(1, np.int64))

    def append(self, block: Block) -> None:
        """Writes the arrays of the next users."""
        self._write("user_offsets", self._num_events + block.offsets[1:])
        self._write("item_ids", block.item_ids)
        self._write("timestamps", block.timestamps)
        for name, values in block.more.items():
            self._write(name, values)
        if self._facts.has_labels:
            self._write("labels", block.labels)
        else:
            runs = [(block.offsets, block.item_ids)]
            if block.behaviour_offsets is not None and block.behaviour_item_ids is not None:
                runs.append((block.behaviour_offsets, block.behaviour_item_ids))
            offsets, gaps = touched_gaps(runs, self._facts.num_candidates)
            self._write("touched_offsets", self._num_touched + offsets[1:])
            self._write("touched_gaps", gaps)
            self._num_touched += len(gaps)
        if self._facts.selects_behaviours:
            of_users = dataclasses.replace(block, session_places=None)  # those of sessions lie beside the packed arrays
            found = cut_histories(of_users, HistoryRule.BEFORE_TIME)
            self._write("history_offsets", self._num_behaviours + found.offsets[1:])
            self._write("history_item_ids", found.item_ids)
            self._write("history_ends", self._num_behaviours + found.ends)
            if _keeps_times(self._facts):
                self._write("history_times", found.times)
            if block.behaviour_actions is not None:
                self._write("history_actions", block.behaviour_actions)
            self._num_behaviours += len(found.item_ids)
        self._num_events += len(block.item_ids)


def touched_gaps(runs: Iterable[tuple[np.ndarray, np.ndarray]], num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the offsets `[U + 1]` and gaps `[T]` of users' touched items, which `EventStore` describes.

    Args:
        runs: offsets int64 `[U + 1]` and items int32 each, what every user touched: events, or behaviours.
        num_items: the number of items to draw from; those behind are left out.
    """
    pairs = []
    for offsets, item_ids in runs:
        num_users = len(offsets) - 1
        users = np.repeat(np.arange(num_users), np.diff(offsets))
        kept = item_ids <= num_items
        pairs.append(users[kept] * (num_items + 1) + item_ids[kept])
    together = np.sort(np.concatenate(pairs))  # `np.unique` takes 80 times as long for it, because it hashes
    is_first = np.ones(len(together), bool)
    np.not_equal(together[1:], together[:-1], out=is_first[1:])
    touched_users, touched_items = np.divmod(together[is_first], num_items + 1)
    offsets = np.searchsorted(touched_users, np.arange(num_users + 1))
    ranks = np.arange(len(touched_items)) - offsets[touched_users]
    return offsets, touched_items - 1 - ranks


_REMOVED, _REPLACED = "was removed", "was replaced by another"


def _change(path: Path, opened: FileState) -> str | None:
    """Returns how a file has changed since it was opened, or None."""
    try:
        now = FileState.of(path)
    except (FileNotFoundError, NotADirectoryError):
        return _REMOVED
    except OSError as error:
        return f"cannot be reached any more ({error.strerror})"
    if now == opened:
        return None
    if (now.device, now.inode) != (opened.device, opened.inode):
        return _REPLACED
    if now.num_bytes < opened.num_bytes:
        return f"was cut from {opened.num_bytes} to {now.num_bytes} bytes"
    return "was written to"


def _remedy(path: Path) -> str:
    """Returns how a user repairs a damaged file."""
    for folder in path.parents:
        if folder.name == PACKED_DIR:
            return f"Delete {folder}, or give {_OVERWRITE}"
    return f"Give {_OVERWRITE}"


@contextlib.contextmanager
def reading_prepared(path: Path) -> Iterator[Path]:
    """Turns every error about a file of prepared data into an `InputError`."""
    try:
        yield path
    except (OSError, ValueError, TypeError, EOFError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}). {_remedy(path)}.") from error
