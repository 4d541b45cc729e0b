"""Optimizers that touch only the embedding rows of the batch.

Keras' own update whole tables: Adam decays the moments of every row at every step, so that a step costs as much as the
vocabulary is long. Here a table's gradient is a `RowGradients` and its cost is that of its rows; a row that is not in
the batch keeps weights and state to the bit ("lazy").
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import tensorflow as tf

from din_dist.config import OptimizerConfig, OptimizerKind
from din_dist.distributed.gradients import Gradient, RowGradients
from din_dist.layers import kernels
from din_dist.layers.fused import fused

RULES = ("Sgd", "Adagrad", "LazyAdam")  # in the order of `kRules` in kernels/rows.cc


class _Change(NamedTuple):
    """Of a variable, or of some rows of a table, and of what is held for them."""

    gradient: tf.Tensor
    row_ids: tf.Tensor | None
    variables: list[tf.Variable]
    before: list[tf.Tensor]

    @property
    def is_element_wise(self) -> bool:
        """Whether there is as much of each that is held as of the gradient."""
        return all(values.shape.rank == self.gradient.shape.rank for values in self.before)


class Optimizer(abc.ABC):
    """Updates `variables`, each of which is always given a dense or always a row gradient.

    `state` holds, by name, everything that a checkpoint must keep.

    Args:
        tables: the names of the variables that are tables: those are given row gradients.
        compiled: runs the update of the dense variables as one kernel, through XLA.
        native: runs all that it can as one kernel of our own, on CPUs.
    """

    initial_state: ClassVar[Mapping[str, float]] = {}  # kind of what is held for each variable -> its first values
    constants: ClassVar[Sequence[float]] = ()  # of our kernel's loop

    def __init__(
        self,
        variables: Sequence[tf.Variable],
        names: Sequence[str],
        tables: Sequence[str] = (),
        compiled: bool = False,
        native: bool = False,
    ) -> None:
        self.variables = list(variables)
        self.names = list(names)
        self.tables = set(tables)
        self.compiled, self.native = compiled, native
        self.state: dict[str, tf.Variable] = {
            f"{name}/{kind}": tf.Variable(tf.fill(self._state_shape(name, variable), initial), trainable=False)
            for kind, initial in self.initial_state.items()
            for name, variable in zip(names, variables, strict=True)
        }

    def _state_shape(self, name: str, variable: tf.Variable) -> tf.TensorShape:
        return variable.shape

    @property
    def changing_by_rows(self) -> list[tf.Variable]:
        """Tables and what is held for them, in the order of `apply`'s result."""
        return [
            changing
            for name, variable in zip(self.names, self.variables, strict=True)
            if name in self.tables
            for changing in (variable, *(self.state[f"{name}/{kind}"] for kind in self.initial_state))
        ]

    def values_of(self, gradients: Sequence[Gradient]) -> list[tf.Tensor]:
        """The weights that each gradient belongs to: of rows, those rows."""
        return [_read(variable, gradient) for variable, gradient in zip(self.variables, gradients, strict=True)]

    def apply(
        self, gradients: Sequence[Gradient], values: Sequence[tf.Tensor], learning_rate: tf.Tensor, step: tf.Tensor
    ) -> list[RowGradients]:
        """One update. Returns, for each of `changing_by_rows`, the rows as they were before.

        Args:
            values: `values_of` the gradients.
            step: counts from 1.
        """
        rate = self._rate(learning_rate, step)
        changes = []
        for name, variable, gradient, value in zip(self.names, self.variables, gradients, values, strict=True):
            held = [self.state[f"{name}/{kind}"] for kind in self.initial_state]
            before = [value, *(_read(each, gradient) for each in held)]
            row_ids, rows = gradient if isinstance(gradient, RowGradients) else (None, gradient)
            changes.append(_Change(rows, row_ids, [variable, *held], before))
        for change, after in zip(changes, self._after(changes, rate), strict=True):
            for variable, new in zip(change.variables, after, strict=True):
                if change.row_ids is None:
                    variable.assign(new)
                else:  # not `scatter_sub`, which takes four times as long as writing what was just read
                    variable.scatter_update(tf.IndexedSlices(new, change.row_ids))
        by_rows = [change for change in changes if change.row_ids is not None]
        return [RowGradients(change.row_ids, rows) for change in by_rows for rows in change.before]

    def _after(self, changes: Sequence[_Change], rate: tf.Tensor) -> list[list[tf.Tensor]]:
        """What each change makes of its `before`."""
        if self.native and all(change.is_element_wise for change in changes):
            return self._after_by_kernel(changes, rate)
        dense = [change for change in changes if change.row_ids is None]
        held = [list(values) for values in zip(*(change.before for change in dense), strict=True)]
        gradients = [change.gradient for change in dense]
        updated = _update_all(self.update, rate, gradients, *held, compiled=self.compiled) if dense else []
        of_dense = iter(zip(*updated, strict=True))
        return [
            list(next(of_dense)) if change.row_ids is None else self.update(change.gradient, rate, *change.before)
            for change in changes
        ]

    def _after_by_kernel(self, changes: Sequence[_Change], rate: tf.Tensor) -> list[list[tf.Tensor]]:
        count, num_held = len(changes), len(self.initial_state)
        updated = kernels.library().din_dist_update(
            rate,
            tf.constant(self.constants, tf.float32, [len(self.constants)]),
            [change.gradient for change in changes],
            [change.before[held] for held in range(1 + num_held) for change in changes],
            rule=RULES.index(type(self).__name__),
            num_threads=kernels.num_threads(),
        )
        after = [[updated[held * count + place] for held in range(1 + num_held)] for place in range(count)]
        for change, values in zip(changes, after, strict=True):
            for old, new in zip(change.before, values, strict=True):
                new.set_shape(old.shape)
        return after

    @staticmethod
    @abc.abstractmethod
    def update(gradient: tf.Tensor, rate: tf.Tensor, value: tf.Tensor, *held: tf.Tensor) -> list[tf.Tensor]:
        """The new value, then what is held for it, as in `initial_state`; of a variable or of rows of a table."""

    def _rate(self, learning_rate: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return learning_rate


class Sgd(Optimizer):
    """`w -= rate * g`."""

    @staticmethod
    def update(gradient: tf.Tensor, rate: tf.Tensor, value: tf.Tensor, *held: tf.Tensor) -> list[tf.Tensor]:
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
        row_wise: bool = False,
        compiled: bool = False,
        native: bool = False,
    ) -> None:
        self._rows_only = set(tables) if row_wise else set()
        super().__init__(variables, names, tables, compiled, native)

    def _state_shape(self, name: str, variable: tf.Variable) -> tf.TensorShape:
        return variable.shape[:1] if name in self._rows_only else variable.shape

    @staticmethod
    def update(gradient: tf.Tensor, rate: tf.Tensor, value: tf.Tensor, *held: tf.Tensor) -> list[tf.Tensor]:
        (accumulator,) = held
        squares = tf.square(gradient)
        if accumulator.shape.rank < gradient.shape.rank:  # row-wise
            accumulator = accumulator + tf.reduce_mean(squares, axis=1)
            return [value - rate * gradient / (tf.sqrt(accumulator)[:, None] + Adagrad.EPSILON), accumulator]
        accumulator = accumulator + squares
        return [value - rate * gradient / (tf.sqrt(accumulator) + Adagrad.EPSILON), accumulator]


class LazyAdam(Optimizer):
    """Adam (Kingma, Ba 2015); rows that are not in the batch do not move and their moments do not decay."""

    initial_state: ClassVar[Mapping[str, float]] = {"first_moment": 0.0, "second_moment": 0.0}
    BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7  # as Keras
    constants = (BETA_1, 1.0 - BETA_1, BETA_2, 1.0 - BETA_2, EPSILON)

    @staticmethod
    def update(gradient: tf.Tensor, rate: tf.Tensor, value: tf.Tensor, *held: tf.Tensor) -> list[tf.Tensor]:
        first, second = held
        first = LazyAdam.BETA_1 * first + (1.0 - LazyAdam.BETA_1) * gradient
        second = LazyAdam.BETA_2 * second + (1.0 - LazyAdam.BETA_2) * tf.square(gradient)
        return [value - rate * first / (tf.sqrt(second) + LazyAdam.EPSILON), first, second]

    def _rate(self, learning_rate: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        updates = tf.cast(step, tf.float32)
        return learning_rate * tf.sqrt(1.0 - self.BETA_2**updates) / (1.0 - self.BETA_1**updates)


def make_optimizer(
    config: OptimizerConfig,
    variables: Sequence[tf.Variable],
    names: Sequence[str],
    tables: Sequence[str],
    compiled: bool = False,
    native: bool = False,
) -> Optimizer:
    match config.optimizer:
        case OptimizerKind.SGD:
            return Sgd(variables, names, tables, compiled, native)
        case OptimizerKind.ADAGRAD:
            return Adagrad(variables, names, tables, config.adagrad_row_wise, compiled, native)
        case OptimizerKind.LAZY_ADAM:
            return LazyAdam(variables, names, tables, compiled, native)
    raise ValueError(f"Unknown optimizer {config.optimizer!r}")


def _read(variable: tf.Variable, gradient: Gradient) -> tf.Tensor:
    return tf.gather(variable, gradient.row_ids) if isinstance(gradient, RowGradients) else variable.value()


@fused
def _update_all(
    update: Callable[..., list[tf.Tensor]], rate: tf.Tensor, gradients: list[tf.Tensor], *held: list[tf.Tensor]
) -> list[list[tf.Tensor]]:
    """For each of `held` (the values first), what `update` makes of it, of every variable."""
    updated = [update(gradient, rate, *own) for gradient, *own in zip(gradients, *held, strict=True)]
    return [list(values) for values in zip(*updated, strict=True)]
