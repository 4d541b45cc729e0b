"""Optimizers that touch only the embedding rows of the batch.

Keras' own update whole tables: Adam decays the moments of every row at every step, so that a step costs as much as the
vocabulary is long. Here a table's gradient is a `RowGradients` and its cost is that of its rows; a row that is not in
the batch keeps weights and state to the bit ("lazy").
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, TypeAlias, TypeVar

import numpy as np
import tensorflow as tf

from din_dist import kernels
from din_dist.config import OptimizerConfig, OptimizerKind
from din_dist.distributed.gradients import Gradient
from din_dist.distributed.row_transports import RowGradients
from din_dist.execution import Execution
from din_dist.kernels import operations

# The weights that a gradient belongs to. For a row gradient: those rows or, with our kernels, the whole table.
Values: TypeAlias = tf.Tensor | tf.Variable

_Each = TypeVar("_Each")

_MOST_SAMPLED_ROWS = 100_000  # for a median


class _Change(NamedTuple):
    """Changes a variable, or some rows of a table, and its slot variables."""

    gradient: tf.Tensor
    row_ids: tf.Tensor | None
    value: Values
    variables: list[tf.Variable]  # first that of `value`

    @property
    def is_element_wise(self) -> bool:
        """True if every slot variable has the shape of the weights."""
        return all(variable.shape == self.variables[0].shape for variable in self.variables)


class Optimizer(abc.ABC):
    """Updates `variables`, each of which is always given a dense or always a row gradient.

    `state` holds, by name, everything that a checkpoint must keep.

    Args:
        tables: the names of the variables that are tables: those are given row gradients.
        execution: how updates are computed. Our kernels write to the rows of tables where they are. A rule without a
            kernel uses TensorFlow's operations.
    """

    initial_state: ClassVar[Mapping[str, float]] = {}  # kind of slot variable -> its first values
    constants: ClassVar[Sequence[float]] = ()  # of our kernel's loop

    def __init__(
        self,
        variables: Sequence[tf.Variable],
        names: Sequence[str],
        tables: Sequence[str] = (),
        execution: Execution | None = None,
    ) -> None:
        self.variables = list(variables)
        self.names = list(names)
        self.tables = set(tables)
        self.execution = execution or Execution()
        self.state: dict[str, tf.Variable] = {
            f"{name}/{kind}": tf.Variable(tf.fill(self._state_shape(name, variable), initial), trainable=False)
            for kind, initial in self.initial_state.items()
            for name, variable in zip(names, variables, strict=True)
        }

    def _state_shape(self, name: str, variable: tf.Variable) -> tf.TensorShape:
        return variable.shape

    @property
    def slots(self) -> list[tuple[str, str, tf.Variable]]:
        """Each slot variable, with the name of its weights and its kind."""
        return [(name, kind, self.state[f"{name}/{kind}"]) for name in self.names for kind in self.initial_state]

    def slot_of_new_rows(self, kind: str, slots: np.ndarray) -> np.ndarray | None:
        """Returns the first value of a slot of rows that a table gets after some updates; None: that of all rows.

        Args:
            kind: of the slot variable.
            slots: `[R, ...]`, those of the rows that were there.
        """
        return None

    @property
    def changing_by_rows(self) -> list[tf.Variable]:
        """The tables and their slot variables, in the order of the result of `apply`."""
        return [
            changing
            for name, variable in zip(self.names, self.variables, strict=True)
            if name in self.tables
            for changing in (variable, *(self.state[f"{name}/{kind}"] for kind in self.initial_state))
        ]

    def values_of(self, gradients: Sequence[Gradient]) -> list[Values]:
        """Returns the weights that each gradient belongs to."""
        return [
            variable if self.updates_in_place and isinstance(gradient, RowGradients) else _read(variable, gradient)
            for variable, gradient in zip(self.variables, gradients, strict=True)
        ]

    def apply(
        self,
        gradients: Sequence[Gradient],
        values: Sequence[Values],
        learning_rate: tf.Tensor,
        step: tf.Tensor,
        keep: bool = False,
    ) -> list[RowGradients]:
        """Changes the variables by one update.

        Args:
            values: `values_of` the gradients.
            step: counts from 1.
            keep: returns, for each of `changing_by_rows`, the rows as they were before; else nothing.
        """
        rate = self._rate(learning_rate, step)
        whole, by_rows = [], []
        for name, variable, gradient, value in zip(self.names, self.variables, gradients, values, strict=True):
            variables = [variable, *(self.state[f"{name}/{kind}"] for kind in self.initial_state)]
            if isinstance(gradient, RowGradients):
                by_rows.append(_Change(gradient.rows, gradient.row_ids, value, variables))
            else:
                whole.append(_Change(gradient, None, value, variables))
        if whole:
            by_kernel = self._has_kernel(self._rule) and all(change.is_element_wise for change in whole)
            (self._update_by_kernel if by_kernel else self._update)(whole, rate)
        if not by_rows:
            return []
        before = (
            self._update_rows_by_kernel(by_rows, rate, keep)
            if self.updates_in_place
            else self._update_rows(by_rows, rate)
        )
        if not keep:
            return []
        row_ids = [change.row_ids for change in by_rows for _ in change.variables]
        return [RowGradients(ids, rows) for ids, rows in zip(row_ids, before, strict=True)]

    def _update(self, changes: Sequence[_Change], rate: tf.Tensor) -> None:
        slots = [list(values) for values in zip(*map(_before, changes), strict=True)]
        gradients = [change.gradient for change in changes]
        updated = self.execution.fused(_update_all)(self.update, rate, gradients, *slots)
        for change, after in zip(changes, zip(*updated, strict=True), strict=True):
            _assign(change, after)

    def _update_rows(self, changes: Sequence[_Change], rate: tf.Tensor) -> list[tf.Tensor]:
        """Returns the rows of each change and of its slots before the update."""
        before = [_before(change) for change in changes]
        for change, values in zip(changes, before, strict=True):
            _assign(change, self.update(change.gradient, rate, *values))
        return [rows for values in before for rows in values]

    def _update_by_kernel(self, changes: Sequence[_Change], rate: tf.Tensor) -> None:
        before, count = [_before(change) for change in changes], len(changes)
        rule, gradients = self._rule, [change.gradient for change in changes]
        updated = operations.update(rule, rate, self.constants, gradients, _by_kind(before))
        for place, change in enumerate(changes):
            after = updated[place::count]
            for new, variable in zip(after, change.variables, strict=True):
                new.set_shape(variable.shape)
            _assign(change, after)

    def _update_rows_by_kernel(self, changes: Sequence[_Change], rate: tf.Tensor, keep: bool) -> list[tf.Tensor]:
        """Returns what `_update_rows` returns if it is to be kept, otherwise nothing."""
        variables = _by_kind([change.variables for change in changes])
        rule, gradients = self._rule_of_rows, [change.gradient for change in changes]
        row_ids = [change.row_ids for change in changes]
        before = operations.update_rows(rule, rate, self.constants, gradients, row_ids, variables, keep)
        return [rows for place in range(len(changes)) for rows in before[place :: len(changes)]]

    @property
    def updates_in_place(self) -> bool:
        """True if a kernel writes to the rows of tables where they are, so that ranks may share the tables."""
        return self._has_kernel(self._rule_of_rows)

    def _has_kernel(self, rule: str) -> bool:
        return self.execution.kernels and kernels.has_rule(rule)

    @property
    def _rule(self) -> str:
        return type(self).__name__

    @property
    def _rule_of_rows(self) -> str:
        return self._rule

    @staticmethod
    @abc.abstractmethod
    def update(gradient: tf.Tensor, rate: tf.Tensor, value: tf.Tensor, *slots: tf.Tensor) -> list[tf.Tensor]:
        """Returns the new value of a variable or of rows of a table, then its slots in the order of `initial_state`."""

    def _rate(self, learning_rate: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return learning_rate


class Sgd(Optimizer):
    """`w -= rate * g`."""

    @staticmethod
    def update(gradient: tf.Tensor, rate: tf.Tensor, value: tf.Tensor, *slots: tf.Tensor) -> list[tf.Tensor]:
        return [value - rate * gradient]


class Adagrad(Optimizer):
    """`a += g^2; w -= rate * g / (sqrt(a) + epsilon)` (Duchi et al. 2011).

    Args:
        row_wise: tables keep one accumulator a row, of the mean of g^2: 1/D of the memory.
    """

    initial_state: ClassVar[Mapping[str, float]] = {"accumulator": 0.1}  # these two as Keras
    EPSILON = 1e-7
    constants = (EPSILON,)

    def __init__(
        self,
        variables: Sequence[tf.Variable],
        names: Sequence[str],
        tables: Sequence[str] = (),
        execution: Execution | None = None,
        row_wise: bool = False,
    ) -> None:
        self._rows_only = set(tables) if row_wise else set()
        super().__init__(variables, names, tables, execution)

    def _state_shape(self, name: str, variable: tf.Variable) -> tf.TensorShape:
        return variable.shape[:1] if name in self._rows_only else variable.shape

    @property
    def _rule_of_rows(self) -> str:
        return f"RowWise{self._rule}" if self._rows_only else self._rule

    @staticmethod
    def update(gradient: tf.Tensor, rate: tf.Tensor, value: tf.Tensor, *slots: tf.Tensor) -> list[tf.Tensor]:
        (accumulator,) = slots
        squares = tf.square(gradient)
        if accumulator.shape.rank < gradient.shape.rank:  # row-wise
            accumulator = accumulator + tf.reduce_mean(squares, axis=1)
            return [value - rate * gradient / (tf.sqrt(accumulator)[:, None] + Adagrad.EPSILON), accumulator]
        accumulator = accumulator + squares
        return [value - rate * gradient / (tf.sqrt(accumulator) + Adagrad.EPSILON), accumulator]


class LazyAdam(Optimizer):
    """Adam (Kingma, Ba 2015); rows that are not in the batch do not move and their moments do not decay.

    Both moments begin at 0, and the learning rate corrects that by the number of updates in all. A row that comes after
    some thousand updates would therefore move by (1 - b1) / sqrt(1 - b2) = 3.2 learning rates at first, and by more
    after. So its second moment begins as that of the table's median row.
    """

    initial_state: ClassVar[Mapping[str, float]] = {"first_moment": 0.0, "second_moment": 0.0}
    BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7  # as Keras
    constants = (BETA_1, 1.0 - BETA_1, BETA_2, 1.0 - BETA_2, EPSILON)

    @staticmethod
    def update(gradient: tf.Tensor, rate: tf.Tensor, value: tf.Tensor, *slots: tf.Tensor) -> list[tf.Tensor]:
        first, second = slots
        first = LazyAdam.BETA_1 * first + (1.0 - LazyAdam.BETA_1) * gradient
        second = LazyAdam.BETA_2 * second + (1.0 - LazyAdam.BETA_2) * tf.square(gradient)
        return [value - rate * first / (tf.sqrt(second) + LazyAdam.EPSILON), first, second]

    @classmethod
    def corrected(cls, learning_rate: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """Returns the learning rate of update `step`, counted from 1: both moments begin at 0."""
        updates = tf.cast(step, tf.float32)
        return learning_rate * tf.sqrt(1.0 - cls.BETA_2**updates) / (1.0 - cls.BETA_1**updates)

    def _rate(self, learning_rate: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return self.corrected(learning_rate, step)

    def slot_of_new_rows(self, kind: str, slots: np.ndarray) -> np.ndarray | None:
        if kind != "second_moment":
            return None
        updated = np.flatnonzero(slots.any(axis=1))
        # Not the mean: rows of popular ids, whose gradients are sums over many examples, would be most of it.
        sample = updated[:: 1 + len(updated) // _MOST_SAMPLED_ROWS]
        return np.median(slots[sample], axis=0).astype(slots.dtype) if len(sample) else None


OPTIMIZERS: dict[str, type[Optimizer]] = {
    OptimizerKind.SGD: Sgd,
    OptimizerKind.ADAGRAD: Adagrad,
    OptimizerKind.LAZY_ADAM: LazyAdam,
}


def make_optimizer(
    config: OptimizerConfig,
    variables: Sequence[tf.Variable],
    names: Sequence[str],
    tables: Sequence[str],
    execution: Execution,
) -> Optimizer:
    """Returns the optimizer of `OPTIMIZERS` that `config` names; arguments as of `Optimizer`."""
    own = {"row_wise": config.adagrad_row_wise} if config.optimizer == OptimizerKind.ADAGRAD else {}
    return OPTIMIZERS[config.optimizer](variables, names, tables, execution, **own)


def _read(variable: tf.Variable, gradient: Gradient) -> tf.Tensor:
    return tf.gather(variable, gradient.row_ids) if isinstance(gradient, RowGradients) else variable.value()


def _before(change: _Change) -> list[tf.Tensor]:
    """Returns the values and their slots."""
    _, *slots = change.variables
    ids = change.row_ids
    return [change.value, *(each.value() if ids is None else tf.gather(each, ids) for each in slots)]


def _by_kind(of_changes: Sequence[Sequence[_Each]]) -> list[_Each]:
    """Groups by kind: the values of all changes first, then all slots of the first kind, and so on."""
    return [each for of_kind in zip(*of_changes, strict=True) for each in of_kind]


def _assign(change: _Change, after: Sequence[tf.Tensor]) -> None:
    for variable, new in zip(change.variables, after, strict=True):
        if change.row_ids is None:
            variable.assign(new)
        else:  # not `scatter_sub`, which takes four times as long as writing what was just read
            variable.scatter_update(tf.IndexedSlices(new, change.row_ids))


def _update_all(
    update: Callable[..., list[tf.Tensor]], rate: tf.Tensor, gradients: list[tf.Tensor], *slots: list[tf.Tensor]
) -> list[list[tf.Tensor]]:
    """Returns the new `slots` (the values first) of every variable, by `update`."""
    updated = [update(gradient, rate, *own) for gradient, *own in zip(gradients, *slots, strict=True)]
    return [list(values) for values in zip(*updated, strict=True)]
