"""Begins a new job with what an older one has learned on other data.

Rows of tables are found by the log's own ids. Dense weights, batch statistics and the slots of the optimizer come along
as they are.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from din_dist import progress
from din_dist.config import Config, NewRows, decisive, list_text
from din_dist.data.event_store import ITEMS, EventStore, vocabulary_of
from din_dist.data.row_ids import NEW, ROWS_FILE, KeptRows, RowIds, read_rows, rows_before, write_rows
from din_dist.errors import InputError
from din_dist.features.encoding import Encoding
from din_dist.features.spec import TIME_KINDS, Kind
from din_dist.layers.feature_columns import FeatureColumns
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.schema import UNKNOWN_ID, feature_label
from din_dist.text import reason
from din_dist.training.checkpoint import SavedCheckpoint, latest_checkpoint
from din_dist.training.optimizers import Optimizer

ROWS_DIR = "rows"
# Settings of the model by which training alone differs: they leave weights and their meaning as they are.
_FREE = {"dropout", "softmax", "num_sampled", "sampler"}
_OPTIMIZER = ("optimizer", "adagrad_row_wise")
_ALONE = "or train without --warm_start_from"


class Parent(abc.ABC):
    """The job that a warm start begins from.

    Attributes:
        folder: as the user gave it.
        step: the update that gave its weights.
        digest: of its checkpoint or export.
        settings: as from `Config.to_json`.
        rows: what the rows of its tables stand for.
        slot_updates: how often its slots were updated; 0: it has none.
    """

    kind: ClassVar[str]

    folder: Path
    step: int
    digest: str
    settings: dict[str, Any]
    rows: KeptRows
    slot_updates: int

    @property
    def has_slots(self) -> bool:
        """True if the optimizer's slots can be read, too."""
        return self.slot_updates > 0

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Returns the value of a variable.

        Raises:
            InputError: it cannot be read.
        """

    def to_json(self) -> dict[str, Any]:
        """Returns what the checkpoints of the new job keep of it."""
        kept = {"path": str(self.folder), "kind": self.kind, "digest": self.digest}
        return {**kept, "step": self.step, "slot_updates": self.slot_updates}


class ParentJob(Parent):
    """A job in its `--output_dir`: the best checkpoint by validation, or the newest where there is no validation.

    Args:
        folder: of the job.

    Raises:
        InputError: there is no such job, or it cannot be read.
    """

    kind = "job"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        checkpoint = SavedCheckpoint.chosen(folder / "checkpoints")
        if checkpoint is None:
            what = "a folder without checkpoints" if folder.is_dir() else "no such folder"
            raise InputError(
                f"--warm_start_from: must be the --output_dir of a job, or an export. Received: {folder}, {what}. "
                "Name the folder of a job that has trained."
            )
        self._checkpoint, state = checkpoint, checkpoint.state
        self.step, self.slot_updates = state.step, state.slot_updates
        self.digest, self.settings = checkpoint.digest, checkpoint.settings
        again = "Start that job again by its own command, which writes it, or warm start from an export."
        self.rows = read_kept_rows(folder / ROWS_DIR, again)
        if self.rows.fingerprint != checkpoint.data_fingerprint:
            raise InputError(
                f"{folder / ROWS_DIR}: must tell of the rows of the job's tables. Received: those of other data. "
                f"{again}"
            )

    def read(self, name: str) -> np.ndarray:
        return self._checkpoint.read(name)


def read_kept_rows(folder: Path, again: str) -> KeptRows:
    """Returns what the rows of a parent's tables stand for.

    Args:
        folder: where it is kept.
        again: how it is written once more.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        return read_rows(folder)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder / ROWS_FILE}: must tell of the rows of tables. Received: no such file, as from earlier versions. "
            f"{again}"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: must be as it was saved. Received: {reason(error)}. {again}") from error


def keep_rows(config: Config, model: BehaviourModel, store: EventStore) -> None:
    """Writes what the rows of a job's tables stand for beside its checkpoints, unless it is there.

    Raises:
        InputError: it cannot be written.
    """
    folder = Path(config.job.output_dir) / ROWS_DIR
    with progress.at(f"writing {folder}"):
        if latest_checkpoint(config):  # of this job, so its rows may be there
            with contextlib.suppress(OSError, ValueError):
                if read_rows(folder).fingerprint == store.facts.fingerprint:
                    return
        try:
            write_rows(folder, kept_rows(model, store))
        except OSError as error:
            raise InputError(
                f"--output_dir: must be a folder with room for the ids of the tables' rows. Received: {folder}, "
                f"{error.strerror or error}. Free some space, or name another folder."
            ) from error


def kept_rows(model: BehaviourModel, store: EventStore) -> KeptRows:
    """Returns what the rows of the tables of a model stand for."""
    lookup, facts = model.lookup, store.facts
    num_own = facts.num_items - facts.num_without_id
    rows = np.arange(1, num_own + 1) if lookup.row_of_item is None else lookup.row_of_item.numpy()[1 : num_own + 1]
    biases = (lookup.item_bias.path,) if lookup.has_biases else ()
    items = store.vocabulary(ITEMS).combine_chunks()[:num_own]
    tables = [RowIds("item", (lookup.tables[0].path, *biases), lookup.specs[0].num_rows, items, rows)]
    for name, table in zip(store.item_features, lookup.tables[1:], strict=True):
        ids = store.vocabulary(vocabulary_of(name)).combine_chunks()
        tables.append(RowIds(feature_label(name), (table.path,), table.shape[0], ids))
    for columns in _columns_of(model):
        for encoding, table in columns.embedded:
            tables.append(_rows_of(encoding, table.path, store))
    encodings = tuple(feature.encoding for feature in store.features.values())
    return KeptRows(tuple(tables), tuple(store.item_features), encodings, facts.fingerprint)


def _columns_of(model: BehaviourModel) -> list[FeatureColumns]:
    found = (model.lookup.columns, model.example_columns, model.side_columns)
    return [columns for columns in found if columns]


def _rows_of(encoding: Encoding, variable: str, store: EventStore) -> RowIds:
    spec = encoding.spec
    rows = RowIds(feature_label(spec.name), (variable,), encoding.num_rows, given=spec.trained)
    if spec.kind is Kind.NUMBER:
        return dataclasses.replace(rows, bounds=encoding.bounds)
    if spec.rows or spec.kind in TIME_KINDS:
        return rows
    return dataclasses.replace(rows, ids=store.feature_vocabulary(spec.name))


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Gives the variables of a new job their first values.

    Attributes:
        config: the settings of the new job.
        model: the model, with the values of a new job.
        optimizer: its slots.
        store: the new data.
        open_parent: opens what `--warm_start_from` names.
    """

    config: Config
    model: BehaviourModel
    optimizer: Optimizer
    store: EventStore
    open_parent: Callable[[Path], Parent]

    def begin(self) -> tuple[dict[str, Any], str]:
        """Reads the parent. Returns what checkpoints keep of it, and a line about it.

        Raises:
            InputError: it cannot be read, or its model or optimizer is another one.
        """
        folder = Path(self.config.job.warm_start_from)
        with progress.at(f"reading {folder}"):
            parent, now = self.open_parent(folder), kept_rows(self.model, self.store)
            _require_same_model(parent, self.config, now)
            return parent.to_json(), self._take_over(parent, now)

    def _take_over(self, parent: Parent, now: KeptRows) -> str:
        """Reads all variables of the parent; returns a line about them."""
        tables, words = _tables_before(parent, now)
        _take_weights(parent, self.model, tables, at_random=self.config.job.new_rows is NewRows.RANDOM)
        for name, kind, slot in self.optimizer.slots if parent.has_slots else ():
            old_values, (_, rows) = parent.read(f"{name}/{kind}"), tables.get(name, (None, None))
            new = None if rows is None else self.optimizer.slot_of_new_rows(kind, old_values)
            _assign(slot, old_values, parent, f"{name}/{kind}", rows, new)
        slots = "slots come along" if parent.has_slots else "slots begin anew, because it has none"
        slots = slots if self.optimizer.initial_state else "the optimizer has no slots"
        numbers = _moved_numbers(parent.rows.encodings, now.encodings)
        origin = f"warm start from {parent.folder}, step {parent.step} (digest {parent.digest[:16]})"
        return f"{origin}: {'; '.join([*words, slots, *numbers])}"


def take_weights(parent: Parent, config: Config, model: BehaviourModel, store: EventStore) -> str:
    """Gives a model the weights that a job has learned on other data, to be evaluated; returns a line about them.

    Ids that the job has not seen are scored as its row for unknown ids scores them, as its export would.

    Args:
        parent: the job.
        config: its settings, with the other data.
        model: made for the other data; its weights are replaced.
        store: the other data.

    Raises:
        InputError: the parent cannot be read, or the other data makes another model of its settings.
    """
    with progress.at(f"reading {parent.folder}"):
        now = kept_rows(model, store)
        _require_same_model(parent, config, now)
        tables, words = _tables_before(parent, now)
        _take_weights(parent, model, tables, at_random=False)
        numbers = _moved_numbers(parent.rows.encodings, now.encodings)
        return f"weights of {parent.folder}, step {parent.step}: {'; '.join([*words, *numbers])}"


# By the name of a variable: what its rows stand for, and which row of the parent each was; see `rows_before`.
_TablesBefore = Mapping[str, tuple[RowIds, np.ndarray]]


def _tables_before(parent: Parent, now: KeptRows) -> tuple[_TablesBefore, list[str]]:
    """Finds the rows of all tables in the parent; returns them, and words about each table."""
    old_tables = {table.variables: table for table in parent.rows.tables}
    words: list[str] = []
    tables: dict[str, tuple[RowIds, np.ndarray]] = {}
    for table in now.tables:
        old = old_tables.get(table.variables)
        if old is None:
            raise _other_variable(parent, table.name, "no such table")
        found = _rows_before(old, table, parent)
        tables |= dict.fromkeys(table.variables, (table, found))
        words.append(_counted(old, table, found))
    return tables, words


def _take_weights(parent: Parent, model: BehaviourModel, tables: _TablesBefore, at_random: bool) -> None:
    """Gives each weight the value of the parent; new rows begin at random, or as row 0."""
    for weight in [*model.trainable_weights, *model.non_trainable_weights]:
        old_values, (own, rows) = parent.read(weight.path), tables.get(weight.path, (None, None))
        new = None if own is None or own.given or at_random else old_values[UNKNOWN_ID]
        _assign(weight.value, old_values, parent, weight.path, rows, new)


def taken_over(first: np.ndarray, old: np.ndarray, rows: np.ndarray, new: np.ndarray | None) -> np.ndarray:
    """Returns the rows of a table, or of a slot of it: those that were there before, and new ones.

    Args:
        first: `[R, ...]`, as in a job that begins at random.
        old: `[R', ...]`, of the parent.
        rows: int64 `[R]`, which row of `old` each was; see `rows_before`.
        new: `[...]`, the value of each new row; None: that of `first`.
    """
    found, known = np.array(first), rows != NEW
    found[known] = old[rows[known]]
    if new is not None:
        found[~known] = new
    return found


def _assign(
    variable: tf.Variable,
    old: np.ndarray,
    parent: Parent,
    name: str,
    rows: np.ndarray | None = None,
    new: np.ndarray | None = None,
) -> None:
    """Gives a variable the value that it had before, by rows if they are given; see `taken_over`."""
    shape, axis = tuple(variable.shape), 0 if rows is None else 1
    has_rows = rows is None or int(rows.max()) < len(old)
    if not has_rows or old.shape[axis:] != shape[axis:] or old.dtype != variable.dtype.as_numpy_dtype:
        raise _other_variable(parent, name, f"{old.dtype}{list(old.shape)} for {list(shape)}")
    variable.assign(old if rows is None else taken_over(variable.numpy(), old, rows, new))
    progress.note()


def _rows_before(old: RowIds, table: RowIds, parent: Parent) -> np.ndarray:
    try:
        return rows_before(old, table)
    except ValueError as error:
        raise InputError(
            f"--warm_start_from: rows are found by the log's own ids, of one type. Received: {error} as ids of "
            f"{table.name}, here and in {parent.folder}. Write them in the log as before, {_ALONE}."
        ) from error


def _other_variable(parent: Parent, name: str, what: str) -> InputError:
    return InputError(
        f"--warm_start_from: the model must have the variables of this job. Received: {parent.folder}, {what} as "
        f"{name}. Name a job of the same settings, {_ALONE}."
    )


def _counted(old: RowIds, table: RowIds, rows: np.ndarray) -> str:
    """Says how many rows of a table are kept, new and dropped; row 0 is not counted."""
    kept = int(np.count_nonzero(rows[1:] != NEW))
    if table.ids is None or old.ids is None:
        return f"{table.name} {kept:,} rows kept"
    return f"{table.name} {kept:,} rows kept, {len(table.ids) - kept:,} new, {len(old.ids) - kept:,} dropped"


def _moved_numbers(before: Sequence[Encoding], now: Sequence[Encoding]) -> list[str]:
    """Says which numbers are encoded otherwise than in the parent, because they are other numbers in the new log."""
    words = []
    for old, new in zip(before, now, strict=True):
        name = new.spec.name
        if old.bounds != new.bounds:
            words.append(f"{name} has other bounds, and each bin begins as the one that it overlaps most")
        elif (old.mean, old.deviation) != (new.mean, new.deviation):
            means, deviations = f"{old.mean:.4g} to {new.mean:.4g}", f"{old.deviation:.4g} to {new.deviation:.4g}"
            words.append(f"{name} is standardized anew (mean {means}, standard deviation {deviations})")
    return words


def _require_same_model(parent: Parent, config: Config, now: KeptRows) -> None:
    """Checks that the parent has the model of this job and, if its slots come along, the optimizer.

    Raises:
        InputError: the first difference.
    """
    before, current = decisive(parent.settings), decisive(config.to_json())
    _require_equal(parent, "item_features", parent.rows.item_features, now.item_features)
    _require_same_features(parent, now)
    for settings in (before, current):
        widths = settings["embedding_dim"]
        settings["embedding_dim"] = widths * (1 + len(now.item_features)) if len(widths) == 1 else widths
        settings |= {name: _without_lengths(settings[name]) for name in ("histories", "long_history")}
    names = [field.name for field in dataclasses.fields(config.model) if field.name not in _FREE]
    names += ["label_columns", "histories", "long_history"]
    if any(encoding.spec.kind in TIME_KINDS for encoding in now.encodings):
        names += ["timezone", "timestamp_unit"]
    for name in names:
        _require_equal(parent, name, before[name], current[name])
    for name in _OPTIMIZER if parent.has_slots else ():
        _require_equal(parent, name, before[name], current[name], "start from its export, whose slots begin anew,")


def _require_same_features(parent: Parent, now: KeptRows) -> None:
    """Checks that declared features are those of the parent, in its order, and encoded in its way.

    Raises:
        InputError: the first difference.
    """
    olds = parent.rows.encodings
    before, current = ([each.spec.name for each in side] for side in (olds, now.encodings))
    _require_equal(parent, "features", before, current)
    for old, new in zip(olds, now.encodings, strict=True):
        for side in ("owner", "kind", "width", "encode", "rows", "pool", "trained"):
            values = [f"{new.spec.name} with {side} = {getattr(each.spec, side)}" for each in (old, new)]
            _require_equal(parent, "features", *values)
        values = [f"{new.spec.name}, vectors of {each.dimension} numbers" for each in (old, new)]
        _require_equal(parent, "features", *values)


def _require_equal(parent: Parent, name: str, before: Any, now: Any, otherwise: str = "") -> None:
    if before != now:
        given, wanted = (
            (list_text(value) if isinstance(value, (list, tuple)) else str(value)) or "none" for value in (now, before)
        )
        raise InputError(
            f"--{name}: a warm start goes on with the parent's. Received: {given}, and {parent.folder} has {wanted}. "
            f"Give the same, {otherwise}{' ' if otherwise else ''}{_ALONE}."
        )


def _without_lengths(value: Any) -> Any:
    """Returns the names of histories of the form NAME:LENGTH, whose lengths are no part of a model."""
    return value.rpartition(":")[0] if isinstance(value, str) else [text.rpartition(":")[0] for text in value]
