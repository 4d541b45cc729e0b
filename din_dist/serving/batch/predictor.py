"""Scores tables of any size with an export, one batch of rows at a time.

Letters of shapes: R rows of a batch, C candidates of all its rows.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from din_dist.config import LogFormat
from din_dist.errors import InputError
from din_dist.features.spec import Owner
from din_dist.progress import at, each
from din_dist.serving.asked import Recommend
from din_dist.serving.batch.features import FeatureColumn, given_features
from din_dist.serving.batch.histories import Encoded, encode
from din_dist.serving.batch.parts import Part, PartsFolder, Plan
from din_dist.serving.bundle import Bundle
from din_dist.serving.own_values import part_of
from din_dist.serving.predictions import Predictions
from din_dist.tables.formats import shown_names
from din_dist.tables.ids import Field, Ids
from din_dist.tables.reader import TableReader, open_table
from din_dist.tables.writer import Added, write_results
from din_dist.telemetry.terminal import Terminal
from din_dist.text import duration

TOP_ITEMS, RECOMMENDED_ITEMS = "top_items", "recommended_items"
ROWS_PER_CALL = 256  # that items are recommended for
PAIRS_PER_CALL = 1 << 17  # (candidate, history position) pairs: few enough for the caches, enough for all cores
_CALL_COST = 8  # a candidate takes as long as this many pairs, in addition to those with its history
SHOW_SECONDS = 10.0

_Value = TypeVar("_Value")


class Stopped(Exception):
    """This process, or another process of the job, was asked to stop."""


class Histories(Protocol):
    """A source of the rows' histories."""

    num_unknown: int
    num_timed: int
    num_too_early: int

    def of(
        self,
        column: Ids,
        before: np.ndarray | None = None,
        names: Ids | None = None,
        features: Mapping[str, Any] | None = None,
    ) -> tuple[Encoded, np.ndarray]: ...

    def user_features(self, column: Ids, names: Collection[str]) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class RowColumns:
    """The columns to read from the rows, and those to add to them."""

    history: Field  # the history, or the id of the user who has one
    candidates: Field | None  # None: items are recommended
    top_k: int = 0  # 0: all candidates in their order
    list_separator: str = ""
    before: str = ""  # column of the time at which a user's history ends; empty: after the last event
    features: tuple[FeatureColumn, ...] = ()
    user_features: tuple[str, ...] = ()  # features of users that the source of histories gives
    predictions: Predictions = Predictions()  # the labels that the export predicts
    history_names: Field | None = None  # of each item's history, if there are several and the rows have them
    behaviour_features: tuple[FeatureColumn, ...] = ()  # of the behaviours, if the rows have them
    recommend: Recommend | None = None  # the request for items; None: candidates are scored
    integers: bool = False  # items have numbers as ids, if they are recommended
    finds_items: bool = False  # the model itself finds them, and gives no probabilities

    @property
    def items_are_integers(self) -> bool:
        """True if items have numbers as ids."""
        return self.candidates.integers if self.candidates else self.integers

    @property
    def read(self) -> list[str]:
        """The names of the columns to read."""
        names = [self.history.name, *([self.candidates.name] if self.candidates else [])]
        names += [self.before] if self.before else []
        names += [self.history_names.name] if self.history_names else []
        names += [name for feature in (*self.features, *self.behaviour_features) for name in feature.columns]
        return list(dict.fromkeys(names))

    @property
    def added(self) -> list[Added]:
        """The columns to add, without rows yet."""
        offsets = np.zeros(1, np.int64) if self.candidates is None or self.candidates.is_list else None
        names = [name for label in self.predictions.labels for name in (label.logit, label.probability)]
        if self.recommend and self.finds_items:
            names = [self.predictions.labels[0].logit]
        columns = [Added(name, pa.array([], pa.float32()), offsets) for name in names]
        if self.top_k or self.recommend:
            ids = pa.array([], pa.int64() if self.items_are_integers else pa.string())
            columns.insert(0, Added(RECOMMENDED_ITEMS if self.recommend else TOP_ITEMS, ids, offsets))
        return columns


@dataclasses.dataclass
class Counts:
    """The amount of work that this process has done."""

    rows: int = 0
    candidates: int = 0  # rows, where items are recommended
    parts: int = 0
    seconds: float = 0.0  # from the first batch to the last


class Predictor:
    """Scores the parts of a plan until none is missing.

    Args:
        bundle: the opened export.
        histories: the source of the rows' histories.
        columns: to read and to add.
        folder: for the results.
        stop_requested: called between batches; true: stop.
        log_format: of the progress lines.
    """

    def __init__(
        self,
        bundle: Bundle,
        histories: Histories,
        columns: RowColumns,
        folder: PartsFolder,
        stop_requested: Callable[[], bool] = lambda: False,
        log_format: LogFormat = LogFormat.TEXT,
    ) -> None:
        self._bundle, self._histories, self._columns, self._folder = bundle, histories, columns, folder
        self._stop_requested, self._log_format = stop_requested, log_format
        self._predictions = columns.predictions
        self.counts = Counts()

    def run(self, plan: Plan, rank: int = 0, world_size: int = 1) -> None:
        """Scores the missing parts that no other process has claimed.

        Raises:
            Stopped: this process or another one was asked to stop.
            InputError: the input breaks a rule, or the folder cannot be written.
        """
        unit = "candidates" if self._columns.candidates else "rows"
        progress = RowProgress(plan, self._folder, self._log_format, world_size, silent=rank > 0, unit=unit)
        started = time.perf_counter()
        tables: dict[str, TableReader] = {}
        try:
            for part in self._folder.share(plan, rank, world_size):
                if self._folder.has(part):
                    continue
                with self._folder.claimed(part) as mine:
                    if mine:
                        path = str(part.path)
                        table = tables.get(path) or open_table(part.path, self._columns.list_separator)
                        tables = {path: table}  # one file is open at a time
                        self._write(table, part, plan.files[path].rows_per_batch, progress)
                        self.counts.parts += 1
        except BaseException:
            self._folder.stop_all()  # before the others begin more parts
            raise
        finally:
            self.counts.seconds = time.perf_counter() - started
            progress.close()

    def _write(self, table: TableReader, part: Part, rows_per_batch: int, progress: RowProgress) -> None:
        path = self._folder.folder / part.name
        with at(f"writing {path}"), self._folder.published(part) as stream:
            results = self._results(table, part, rows_per_batch, progress)
            write_results(part.path, stream, results, self._columns.added)

    def _results(
        self, table: TableReader, part: Part, rows_per_batch: int, progress: RowProgress
    ) -> Iterator[tuple[pa.Table, list[Added]]]:
        """Yields the part's rows with the columns to add."""
        for rows, scores in each(ahead(self._read(table, part, rows_per_batch)), f"reading {part.path}"):
            yield rows, self._answer(scores)
            self.counts.rows += len(rows)
            self.counts.candidates += len(scores.candidates.values if scores.candidates else scores.lengths)
            progress.show(self.counts)
            if self._stop_requested() or self._folder.is_stopping():
                raise Stopped

    def _read(self, table: TableReader, part: Part, rows_per_batch: int) -> Iterator[tuple[pa.Table, _Batch]]:
        first_row = part.first_row
        of_candidates, names = self._columns.candidates, self._columns.history_names
        fields = [self._columns.history, *([names] if names else []), *([of_candidates] if of_candidates else [])]
        for rows in table.read(part.first_row, part.num_rows, rows_per_batch):
            history, *others = table.ids(rows, first_row, fields)
            names_of_rows = others[0] if names else None
            candidates = others[-1] if of_candidates else None
            before = table.times(rows, first_row, self._columns.before) if self._columns.before else None
            of_behaviours: Mapping[str, Any] = {}
            if self._columns.behaviour_features and history.offsets is not None:
                counts = np.diff(history.offsets)
                found = given_features(table, rows, first_row, self._columns.behaviour_features, counts)
                of_behaviours = found[Owner.HISTORY]
            items, lengths = self._histories.of(history, before, names_of_rows, of_behaviours)
            counts = np.zeros(len(rows), np.int64) if candidates is None else candidates.counts
            given = given_features(table, rows, first_row, self._columns.features, counts)
            given["user"] |= self._histories.user_features(history, self._columns.user_features)
            yield rows, _Batch(items, lengths, candidates, given)
            first_row += len(rows)

    def _answer(self, batch: _Batch) -> list[Added]:
        if batch.candidates is None:
            return self._recommended(batch)
        logits = self._logits(batch, batch.candidates)
        ids, offsets = batch.candidates.values, batch.candidates.offsets
        columns = []
        if self._columns.top_k and offsets is not None:
            best, offsets = top_indices(self._predictions.ranking(logits), offsets, self._columns.top_k)
            logits = logits[best]
            columns.append(Added(TOP_ITEMS, ids.take(pa.array(best)), offsets))
        for label, own in self._predictions.columns(logits):
            probabilities = label.calibrator.probabilities(own)
            columns += [Added(label.logit, pa.array(own), offsets)]
            columns += [Added(label.probability, pa.array(probabilities), offsets)]
        return columns

    def _recommended(self, batch: _Batch) -> list[Added]:
        """Returns the items that are recommended for each row of a batch, some rows at a time."""
        asked, num_rows = self._columns.recommend, len(batch.lengths)
        assert asked is not None
        positions = np.concatenate([[0], np.cumsum(batch.lengths)])
        parts: dict[str, list[np.ndarray]] = {}
        for first in range(0, num_rows, ROWS_PER_CALL):
            end = min(first + ROWS_PER_CALL, num_rows)
            given = {
                owner: {name: part_of(values, first, end) for name, values in batch.features[owner].items()}
                for owner in ("user", "context")
            }
            history = batch.items.part(positions[first], positions[end])
            found = self._bundle.recommend(history, batch.lengths[first:end], asked, **given)
            counts = found.pop("counts")
            parts.setdefault("counts", []).append(counts)
            for name, values in found.items():
                real = np.arange(values.shape[1]) < counts[:, None]
                parts.setdefault(name, []).append(values[real])
        columns = {name: np.concatenate(own) for name, own in parts.items()}
        if not np.isfinite(columns[self._predictions.labels[0].logits]).all():
            raise FloatingPointError("the model gives a logit that is not finite. Export a checkpoint that does not.")
        offsets = np.concatenate([[0], np.cumsum(columns["counts"])])
        integers = self._columns.items_are_integers
        ids = pa.array(columns["item_ids"], pa.int64() if integers else pa.binary())
        added = [Added(RECOMMENDED_ITEMS, ids if integers else ids.cast(pa.string()), offsets)]
        for label in self._predictions.labels:
            for output, name in ((label.logits, label.logit), (label.probability, label.probability)):
                if output in columns:
                    added.append(Added(name, pa.array(columns[output], pa.float32()), offsets))
        return added

    def _logits(self, batch: _Batch, candidates: Ids) -> np.ndarray:
        """Returns the logits of all candidates of a batch, float32 `[C]` or by task `[C, T]`."""
        counts, encoded = candidates.counts, encode(candidates.values)
        positions = np.concatenate([[0], np.cumsum(batch.lengths)])
        found = []
        for call in calls(batch.lengths, counts, PAIRS_PER_CALL):
            found.append(
                self._bundle.rank_histories(
                    batch.items.part(positions[call.first_row], positions[call.end_row]),
                    batch.lengths[call.first_row : call.end_row],
                    encoded.part(call.first_candidate, call.end_candidate),
                    call.counts,
                    **_features_of(batch.features, call),
                )
            )
        tasks = self._predictions.tasks
        logits = np.concatenate([np.zeros((0, len(tasks)) if tasks else 0, np.float32), *found])
        if not np.isfinite(logits).all():
            raise FloatingPointError("the model gives a logit that is not finite. Export a checkpoint that does not.")
        return logits


@dataclasses.dataclass(frozen=True)
class _Batch:
    items: Encoded  # item ids of all histories, concatenated
    lengths: np.ndarray  # int64 [R]
    candidates: Ids | None  # None: items are recommended
    # Owner -> name -> R values of users and contexts, C of candidates, as `Bundle.rank_histories` takes them.
    features: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Call:
    """The candidates that one call of the model scores. The first and the last row may be split between calls."""

    first_row: int
    end_row: int
    first_candidate: int
    end_candidate: int
    counts: np.ndarray  # int64, the candidates of each of the rows in this call


def _features_of(features: Mapping[str, Mapping[str, Any]], call: Call) -> dict[str, dict[str, Any]]:
    """Returns the features of the rows and candidates of a call, by owner; owners without any are left out."""
    bounds = dict.fromkeys(features, (call.first_row, call.end_row))
    bounds["candidate"] = (call.first_candidate, call.end_candidate)
    return {
        owner: {name: part_of(values, *bounds[owner]) for name, values in own.items()}
        for owner, own in features.items()
        if own
    }


def calls(lengths: np.ndarray, counts: np.ndarray, most_pairs: int) -> Iterator[Call]:
    """Divides a batch into calls of about the same size, each of at least one candidate.

    Args:
        lengths: int64 `[R]`, the length of each history.
        counts: int64 `[R]`, the number of each row's candidates.
        most_pairs: the most (candidate, history position) pairs in a call with more than one candidate.
    """
    row_of = np.repeat(np.arange(len(counts)), counts)
    each = lengths[row_of] + _CALL_COST
    costs, largest = np.cumsum(each), int(each.max(initial=0))
    ends = np.cumsum(counts)
    first, done = 0, 0
    while first < len(row_of):
        left = int(costs[-1]) - done
        share = min(most_pairs, left // -(-left // most_pairs) + largest)  # few calls of about the same size
        end = max(first + 1, int(np.searchsorted(costs, done + share, side="right")))
        low, high = int(row_of[first]), int(row_of[end - 1]) + 1
        taken = counts[low:high].copy()
        taken[0] = min(ends[low], end) - first
        if high - low > 1:
            taken[-1] = end - ends[high - 2]
        yield Call(low, high, first, end, taken)
        first, done = end, int(costs[end - 1])


def top_indices(logits: np.ndarray, offsets: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of each row's `most` highest logits, best first, and the rows' offsets among them.

    Ties keep the order of the candidates.

    Args:
        logits: float32 `[C]`.
        offsets: int64 `[R + 1]`, where each row's candidates start.
        most: the most candidates to keep of a row.
    """
    counts = np.diff(offsets)
    row_of = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-logits, row_of))
    kept = np.arange(len(logits)) - np.repeat(offsets[:-1], counts) < most
    return order[kept], np.concatenate([[0], np.cumsum(np.minimum(counts, most))])


def ahead(values: Iterator[_Value]) -> Iterator[_Value]:
    """Yields the values of an iterator; a thread makes the next one while this one is used."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)
    end = object()
    stop = threading.Event()

    def work() -> None:
        last: object = end
        try:
            for value in values:
                ready.put(value)
                if stop.is_set():
                    return
        except BaseException as error:
            last = error
        ready.put(last)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (value := ready.get()) is not end:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        while thread.is_alive():  # it may wait for room in the queue
            try:
                ready.get(timeout=0.01)
            except queue.Empty:
                continue


class RowProgress:
    """Shows on the chief how many rows are done.

    It shows the larger of two counts: rows in published parts, and rows published at the start plus the chief's own.
    """

    def __init__(
        self,
        plan: Plan,
        folder: PartsFolder,
        log_format: LogFormat,
        world_size: int,
        *,
        silent: bool,
        unit: str = "candidates",
    ) -> None:
        self._plan, self._folder, self._silent, self._unit = plan, folder, silent, unit
        self._whose = " by this worker" if world_size > 1 else ""
        self._terminal = Terminal(log_format, plan.num_rows, silent=silent, unit="row")
        self._started = self._shown = time.perf_counter()
        self._before = self._published()
        self._at = self._before
        self._terminal.go_to(self._at)

    def _published(self) -> int:
        if self._silent:
            return 0
        missing = sum(part.num_rows for part in self._folder.missing(self._plan))
        return self._plan.num_rows - missing

    def show(self, counts: Counts) -> None:
        if self._silent:
            return
        now = time.perf_counter()
        at = max(self._at, self._before + counts.rows)
        if now - self._shown >= (1.0 if self._terminal.has_bar else SHOW_SECONDS):
            at = max(at, self._published())
            self._shown = now
            seconds = now - self._started
            rate = counts.candidates / seconds
            left = (self._plan.num_rows - at) * seconds / max(1, at - self._before)
            found = f"{rate:,.0f} {self._unit}/s{self._whose}"
            line = f"row {at:,} of {self._plan.num_rows:,}: {found}, {duration(left)} left"
            self._terminal.show(found, line, row=at, **{f"{self._unit}_per_second": rate})
        self._terminal.advance(at - self._at)
        self._at = at

    def close(self) -> None:
        self._terminal.close()


def check_columns(plan: Plan, columns: RowColumns) -> None:
    """Checks the columns of all files.

    Raises:
        InputError: a file lacks a column that is to be read, or has one that is to be added.
    """
    for path, survey in plan.files.items():
        present = survey.columns
        for name in columns.read:
            if present.count(name) != 1 and present:
                what = "occurs more than once" if name in present else "is missing"
                raise InputError(
                    f"{path}: column {name!r} {what}. Received: {shown_names(present)} Correct the file, or "
                    "name your column (--history_column, --history_names_column, --user_column, --item_column, "
                    "--candidates_column, --before_column)."
                )
        for column in columns.added:
            if column.name in present:
                raise InputError(
                    f"{path}: column {column.name!r} is to be added. Received: a table that has one. Rename or drop it."
                )
