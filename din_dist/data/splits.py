"""Cuts events into splits to train on, to validate and to test, by integers alone.

In every split the events of one user stand together in time order, so a split is one run of events a user. A *row* is
one event of a split. Without labels a row gives `1 + negatives_per_positive` examples; draw 0 is the event itself.

An event is held out if it is in validation, in test, or in `HISTORY`. All other events are the training part, a user's
first ones included: what preparation counts, it counts there.

Letters of shapes: U users, K users of a split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from din_dist.config import DataConfig, HistoryCut, Split
from din_dist.data.checksums import write_checksums
from din_dist.data.event_store import PACKED_DIR, USERS, EventStore, map_array
from din_dist.data.session_splits import cut_sessions
from din_dist.data.walks import parts, user_runs, windows
from din_dist.errors import InputError
from din_dist.files import published_folder

SPLITS = ("train", "validation", "test")
HISTORY = "history"  # events that are held out, but are no examples: they are in histories alone
_HELD_OUT = ("validation", "test", HISTORY)
_ARRAYS = ("users", "row_ends", "event_bases")
_SIDE_OF_TENTH = np.array([0] * 8 + [1, 2])  # places in `SPLITS`
_SALT = "split:"


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of one split, in which K users have at least one row.

    Row r belongs to the first k with `row_ends[k] > r`: user `users[k]`, event `event_bases[k] + r`.
    Example e is draw `e % draws_per_row` of row `e // draws_per_row`.
    Arrays are int32 where the numbers fit: 12 bytes a user.
    With `fixed`, all rows of a user have the history of the first one.
    """

    users: np.ndarray  # [K]
    row_ends: np.ndarray  # [K], ascending
    event_bases: np.ndarray  # [K]
    draws_per_row: int
    fixed: bool = False

    @property
    def num_rows(self) -> int:
        """The number of rows of all users."""
        return int(self.row_ends[-1]) if len(self.row_ends) else 0

    @property
    def num_examples(self) -> int:
        """The number of examples of all users."""
        return self.num_rows * self.draws_per_row

    def rows_per_user(self) -> np.ndarray:
        """Returns the number of rows of each user, int64 `[K]`."""
        return np.diff(self.row_ends.astype(np.int64), prepend=0)

    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first event of each user in the split, and the end of these events, int64 `[K]` each."""
        ends = self.row_ends.astype(np.int64) + self.event_bases
        return ends - self.rows_per_user(), ends

    def events(self, first_row: int = 0, end_row: int | None = None) -> np.ndarray:
        """Returns the events of rows `first_row` to `end_row` - 1, int64 `[end_row - first_row]`."""
        rows = np.arange(first_row, self.num_rows if end_row is None else end_row)
        return rows + self.event_bases[np.searchsorted(self.row_ends, rows, side="right")]

    def event_parts(self) -> Iterator[np.ndarray]:
        """Yields the events of all rows, in parts that fit into memory."""
        return (self.events(part.start, part.stop) for part in parts(self.num_rows))

    def user_of_example(self) -> np.ndarray:
        """Returns the user of each example, int64 `[num_examples]`."""
        return np.repeat(self.users.astype(np.int64), self.rows_per_user() * self.draws_per_row)

    def users_and_events(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the users and the events of some examples, int64 `[B]` each; draws have those of their row.

        Args:
            examples: int64 `[B]`, numbers of examples.
        """
        rows = examples // self.draws_per_row
        runs = np.searchsorted(self.row_ends, rows, side="right")
        return self.users[runs].astype(np.int64), rows + self.event_bases[runs].astype(np.int64)


def split_examples(store: EventStore, config: DataConfig) -> dict[str, Examples]:
    """Cuts the events of `store` into `SPLITS`; where others are held out, also into `HISTORY`.

    Without labels a user's first event is not an example, because nothing is known of the user yet. If histories are
    sessions, the first event of each session is none. The splits are kept
    beside the packed events and memory-mapped like them, so that a job's workers on one machine hold them once.

    Raises:
        InputError: no event is left to train on, a user has touched every item, or the kept splits are damaged.
    """
    if not store.facts.has_labels:
        _require_untouched_items(store)
    cut_times = _cut_times(store, config) if config.split is Split.TEMPORAL else ()
    folder = _kept_in("split", store, config, cut_times)
    if not folder.is_dir():
        runs = _cut(store, _Rules(store, config.split, cut_times, config.train_from))
        try:
            publish(folder, runs)
        except OSError:  # prepared data on a read-only disk: each process holds its own splits
            found = {name: _examples(store, config, name, arrays) for name, arrays in runs.items()}
            return _checked(store, found, config)
    mapped = {
        name: {array: map_array(folder / f"{name}-{array}.npy", store.files) for array in _ARRAYS}
        for name in (*SPLITS, *([HISTORY] if config.split is Split.USERS or _knows_sessions(store) else []))
    }
    _check_kept_cut(store, folder, mapped, bool(config.train_from))
    found = {name: _examples(store, config, name, arrays) for name, arrays in mapped.items()}
    return _checked(store, found, config)


def kept_in(name: str, store: EventStore, config: DataConfig) -> Path:
    """Returns the folder beside the packed events for arrays that follow from them and the splits alone."""
    return _kept_in(name, store, config, _cut_times(store, config) if config.split is Split.TEMPORAL else ())


def _kept_in(name: str, store: EventStore, config: DataConfig, cut_times: Sequence[int]) -> Path:
    sessions = [f"sessions-{store.facts.sessions}"] if store.facts.sessions else []
    train_from = [f"from-{config.train_from}"] if config.train_from else []
    return store.folder / PACKED_DIR / "-".join([name, config.split, *map(str, cut_times), *train_from, *sessions])


class _Rules:
    """The rules of a split.

    Args:
        store: the events.
        split: the kind of the split.
        cut_times: when validation and test begin, if time divides them.
        train_from: before it are no training examples; 0: there may be.
    """

    def __init__(self, store: EventStore, split: Split, cut_times: Sequence[int], train_from: int = 0) -> None:
        self.split = split
        self._store, self._cut_times, self._train_from = store, cut_times, train_from
        self._side_of = _sides(store) if split is Split.USERS else np.zeros(store.facts.num_users, np.int64)

    def bounds(self, offsets: np.ndarray, can_be: np.ndarray | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns the first and the end of each user's run in each split, int64 `[U]` each, among some events.

        Args:
            offsets: int64 `[U + 1]`, where each user's begin among them.
            can_be: int64, the events, all of which can be examples. None: all there are, of which a user's first one is
                no example without labels.
        """
        found = self._bounds(offsets, can_be)
        if self._train_from:
            low, high = found["train"]
            times = self._store.timestamps if can_be is None else self._store.timestamps[can_be]
            late = offsets[:-1] + _num_before(offsets, times, self._train_from)
            found["train"] = np.clip(late, low, high), high
        return found

    def _bounds(self, offsets: np.ndarray, can_be: np.ndarray | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        begins, ends = offsets[:-1], offsets[1:]
        firsts = begins
        if can_be is None and not self._store.facts.selects_behaviours:
            firsts = np.minimum(begins + 1, ends)
        match self.split:
            case Split.LEAVE_ONE_OUT:
                validation_from = test_from = np.maximum(firsts, ends - 1)
            case Split.LEAVE_TWO_OUT:
                test_from = np.maximum(firsts, ends - 1)
                validation_from = np.maximum(firsts, ends - 2)
            case Split.TEMPORAL:
                times = self._store.timestamps if can_be is None else self._store.timestamps[can_be]
                validation_from, test_from = (
                    np.maximum(firsts, begins + _num_before(offsets, times, time)) for time in self._cut_times
                )
            case Split.USERS:
                late = _late(self._store.user_offsets[:-1], self._store.user_offsets[1:])
                cuts = np.maximum(firsts, late if can_be is None else np.searchsorted(can_be, late))
                lows = {name: firsts if name == "train" else cuts for name in SPLITS}
                return {
                    name: (lows[name], np.where(self._side_of == side, ends, lows[name]))
                    for side, name in enumerate(SPLITS)
                }
        return {
            "train": (firsts, validation_from),
            "validation": (validation_from, test_from),
            "test": (test_from, ends),
        }

    def held_from(self) -> np.ndarray | None:
        """Returns the first event of each user that is held out, int64 `[U]`; None: the first example held out is."""
        offsets = self._store.user_offsets
        if self.split is Split.USERS:
            return np.where(self._side_of == 0, offsets[1:], offsets[:-1])
        if self.split is Split.TEMPORAL:
            return offsets[:-1] + _num_before(offsets, self._store.timestamps, self._cut_times[0])
        return None


def _cut(store: EventStore, rules: _Rules) -> dict[str, dict[str, np.ndarray]]:
    """Returns the arrays of the `Examples` of each split, by its name and theirs."""
    if _knows_sessions(store):
        found = cut_sessions(store, rules.held_from(), rules.bounds)
        return {name: _named(store, arrays) for name, arrays in found.items()}
    bounds = rules.bounds(store.user_offsets)
    held_from = rules.held_from()
    if rules.split is Split.USERS and held_from is not None:
        ends = bounds["validation"][0]  # where the examples of each user begin who does not train
        bounds[HISTORY] = held_from, np.maximum(held_from, ends)
    return {name: _runs(store, *each) for name, each in bounds.items()}


def _knows_sessions(store: EventStore) -> bool:
    """Tells whether the first event of each session, and not only that of each user, is no example."""
    return store.sessions is not None and not store.facts.selects_behaviours


def _sides(store: EventStore) -> np.ndarray:
    """Returns the place in `SPLITS` of each user's split, int64 `[U]`: by a hash of the user's own id."""
    from din_dist.data.hashing import rows_of_ids  # here, because it imports TensorFlow

    return _SIDE_OF_TENTH[rows_of_ids(store.vocabulary(USERS), len(_SIDE_OF_TENTH), _SALT) - 1]


def held_out(splits: Mapping[str, Examples]) -> Iterator[np.ndarray]:
    """Yields the events that are held out, int64, in parts that fit into memory."""
    for name in _HELD_OUT:
        if name in splits:
            yield from splits[name].event_parts()


def item_counts(store: EventStore, splits: Mapping[str, Examples]) -> np.ndarray:
    """Returns how many positive events of each item are not held out: int64 `[num_items + 1]`."""
    counts = np.zeros(store.facts.num_items + 1, np.int64)
    for part in parts(store.facts.num_events):
        weights = None if store.labels is None else store.labels[part]
        counts += np.bincount(store.item_ids[part], weights, len(counts)).astype(np.int64)
    for events in held_out(splits):
        weights = None if store.labels is None else store.labels[events]
        counts -= np.bincount(store.item_ids[events], weights, len(counts)).astype(np.int64)
    return counts


def behaviour_counts(store: EventStore, train: Examples) -> np.ndarray:
    """Returns how many behaviours of a log of their own each item has in the histories of training, of any length.

    Returns:
        int64 `[num_items + 1]`; zeros if behaviours are events.
    """
    counts = np.zeros(store.facts.num_items + 1, np.int64)
    if store.facts.has_behaviours:
        for places in _places_in_training(store, train):
            counts += np.bincount(store.history_item_ids[places], minlength=len(counts))
    return counts


def trained_behaviours(store: EventStore, train: Examples) -> np.ndarray:
    """Tells which behaviours of a log of their own are in the histories of training, of any length: bool `[P]`."""
    found = np.zeros(len(store.history_item_ids), bool)
    for places in _places_in_training(store, train):
        found[places] = True
    return found


def _places_in_training(store: EventStore, train: Examples) -> Iterator[np.ndarray]:
    """Yields the places of behaviours in the histories of training, some users at a time."""
    assert store.history_ends is not None
    firsts, ends = train.runs()
    starts = store.history_offsets[train.users]
    lengths = store.history_ends[firsts if train.fixed else ends - 1] - starts
    for first, end in user_runs(np.cumsum(lengths)):
        yield windows(starts[first:end], lengths[first:end])


def _runs(store: EventStore, low: np.ndarray, high: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the arrays of `Examples` `[K]`.

    Args:
        store: the events.
        low: int64 `[U]`, the first event of each user's run.
        high: int64 `[U]`, its end.
    """
    counts = high - low
    users = np.flatnonzero(counts)
    row_ends = np.cumsum(counts[users])
    return _named(store, (users, row_ends, low[users] - (row_ends - counts[users])))


def _named(store: EventStore, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays by the names of `_ARRAYS`, in the smallest type."""
    dtype = np.int32 if max(store.facts.num_events, store.facts.num_users) < 2**31 else np.int64
    return {name: array.astype(dtype) for name, array in zip(_ARRAYS, arrays, strict=True)}


def _examples(store: EventStore, config: DataConfig, name: str, arrays: Mapping[str, np.ndarray]) -> Examples:
    negatives = config.negatives_per_positive if name == "train" else config.evaluation_negatives_per_positive
    one_draw = store.facts.has_labels or name == HISTORY
    users, row_ends, event_bases = (arrays[array] for array in _ARRAYS)
    return Examples(users, row_ends, event_bases, draws_per_row=1 if one_draw else 1 + negatives)


def _checked(store: EventStore, splits: dict[str, Examples], config: DataConfig) -> dict[str, Examples]:
    if not splits["train"].num_rows:
        raise InputError(
            f"--split={config.split}: there must be events to train on. Received: none, and "
            f"{splits['validation'].num_rows} to validate and {splits['test'].num_rows} to test. Use users with more "
            f"events, {'an earlier --train_from, ' if config.train_from else ''}or another split."
        )
    if config.history_cut is HistoryCut.FIXED:
        splits["train"] = _late_part(store, splits["train"])
    return splits


def _late(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns where the last fifth of the events of each user begins, int64 `[U]`."""
    return begins + (ends - begins) * 4 // 5


def _late_part(store: EventStore, train: Examples) -> Examples:
    """Returns the examples of training whose history is that before the first of them.

    They are all but the first 80 % of each user's events in training, the user's first one included.
    """
    begins = store.user_offsets[train.users]
    firsts, ends = train.runs()
    low = np.maximum(firsts, _late(begins, ends))
    row_ends = np.cumsum(ends - low)
    bases = ends - row_ends
    dtype = train.row_ends.dtype
    return Examples(train.users, row_ends.astype(dtype), bases.astype(dtype), train.draws_per_row, fixed=True)


def publish(folder: Path, runs: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Publishes a folder with one file NAME-ARRAY.npy for each array of `runs`.

    If another process was faster, with the same content, its files stay: somebody may have opened them.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        with published_folder(folder, replace=False) as aside:
            for name, arrays in runs.items():
                for array, values in arrays.items():
                    np.save(aside / f"{name}-{array}.npy", values)
            write_checksums(aside)
    except OSError:
        if not folder.is_dir():
            raise


def _check_kept_cut(
    store: EventStore, folder: Path, mapped: Mapping[str, Mapping[str, np.ndarray]], may_begin_late: bool
) -> None:
    """Refuses kept splits in which an event is missing: one that can be an example, or one that is held out.

    If training may begin late, early events can be missing.
    """
    whole = all(len({len(array) for array in arrays.values()}) == 1 for arrays in mapped.values())
    found = sum(int(arrays["row_ends"][-1]) for arrays in mapped.values() if len(arrays["row_ends"]))
    least = most = store.facts.num_events
    if _knows_sessions(store):
        least -= len(store.history_offsets) - 1  # firsts of sessions, of which those held out are in `HISTORY`
    elif not store.facts.selects_behaviours:
        with_events = int(np.count_nonzero(np.diff(store.user_offsets)))
        held_out = len(mapped[HISTORY]["users"]) if HISTORY in mapped else 0  # whose first events are in `HISTORY`
        least = most = most - (with_events - held_out)
    least = 0 if may_begin_late else least
    if not whole or not least <= found <= most:
        raise InputError(
            f"{folder}: the splits must hold {least if least == most else f'{least} to {most}'} events. "
            f"Received: {found if whole else 'arrays of different lengths'}. Delete this folder."
        )


def _cut_times(store: EventStore, config: DataConfig) -> tuple[int, int]:
    stride = max(1, store.facts.num_events // 10_000_000)  # a sample is enough, the same one every time
    default_validation, default_test = np.quantile(store.timestamps[::stride], [0.8, 0.9], method="higher")
    validation_time = config.validation_from or int(default_validation)
    test_time = config.test_from or int(default_test)
    if validation_time > test_time:
        raise InputError(
            f"--validation_from: must not be later than --test_from. Received: {validation_time} and {test_time}. "
            "Give both."
        )
    return validation_time, test_time


def _num_before(offsets: np.ndarray, times: np.ndarray, time: int) -> np.ndarray:
    """Returns how many events each user has before `time`, int64 `[U]`.

    Args:
        offsets: int64 `[U + 1]`, where each user's events begin.
        times: int64, those of all events.
        time: the moment.
    """
    found = np.zeros(len(offsets) - 1, np.int64)
    for first, end in user_runs(offsets[1:]):
        own = offsets[first : end + 1]
        before = np.zeros(own[-1] - own[0] + 1, np.int64)
        np.cumsum(times[own[0] : own[-1]] < time, out=before[1:])
        found[first:end] = np.diff(before[own - own[0]])
    return found


def _require_untouched_items(store: EventStore) -> None:
    if store.touched_offsets is not None and store.max_touched >= store.facts.num_candidates:
        user = store.vocabulary(USERS)[int(np.diff(store.touched_offsets).argmax())]
        raise InputError(
            f"Negatives are items that a user never touched. Received: user {user.as_py()!r}, who touched all "
            f"{store.facts.num_candidates} items. Remove that user, or give the log a label column."
        )
