"""Optimizers that touch only the embedding rows of the batch.

Keras' own update whole tables: Adam decays the moments of every row at every step, so that a step costs as much as the
vocabulary is long. Here a table's gradient is a `RowGradients` and its cost is that of its rows; a row that is not in
the batch keeps weights and state to the bit ("lazy").
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import tensorflow as tf

from din_dist.config import OptimizerConfig, OptimizerKind
from din_dist.distributed.gradients import Gradient, RowGradients


class Optimizer(abc.ABC):
    """Updates `variables`, each of which is always given a dense or always a row gradient.

    `state` holds, by name, everything that a checkpoint must keep.
    """

    def __init__(self, variables: Sequence[tf.Variable], names: Sequence[str]) -> None:
        self.variables = list(variables)
        self.names = list(names)
        self.state: dict[str, tf.Variable] = {}

    def apply(self, gradients: Sequence[Gradient], learning_rate: tf.Tensor, step: tf.Tensor) -> None:
        """One update; `step` counts from 1."""
        for name, variable, gradient in zip(self.names, self.variables, gradients, strict=True):
            if isinstance(gradient, RowGradients):
                self.update_rows(name, variable, gradient, learning_rate, step)
            else:
                self.update(name, variable, gradient, learning_rate, step)

    @abc.abstractmethod
    def update(
        self, name: str, variable: tf.Variable, gradient: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor
    ) -> None:
        """A dense variable."""

    @abc.abstractmethod
    def update_rows(
        self, name: str, variable: tf.Variable, gradient: RowGradients, learning_rate: tf.Tensor, step: tf.Tensor
    ) -> None:
        """Some rows of a table, each named once."""

    def _add_state(self, kind: str, initial: float, row_wise: Sequence[bool] | None = None) -> None:
        for place, (name, variable) in enumerate(zip(self.names, self.variables, strict=True)):
            shape = variable.shape[:1] if row_wise and row_wise[place] else variable.shape
            self.state[f"{name}/{kind}"] = tf.Variable(tf.fill(shape, initial), trainable=False)


class Sgd(Optimizer):
    """`w -= rate * g`."""

    def update(
        self, name: str, variable: tf.Variable, gradient: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor
    ) -> None:
        variable.assign_sub(learning_rate * gradient)

    def update_rows(
        self, name: str, variable: tf.Variable, gradient: RowGradients, learning_rate: tf.Tensor, step: tf.Tensor
    ) -> None:
        variable.scatter_sub(tf.IndexedSlices(learning_rate * gradient.rows, gradient.row_ids))


class Adagrad(Optimizer):
    """`a += g^2; w -= rate * g / (sqrt(a) + epsilon)` (Duchi et al. 2011).

    Args:
        row_wise: tables keep one accumulator a row, of the mean of g^2: 1/D of the memory.
        tables: the names of the variables that are tables.
    """

    INITIAL, EPSILON = 0.1, 1e-7  # as Keras

    def __init__(
        self, variables: Sequence[tf.Variable], names: Sequence[str], tables: Sequence[str] = (), row_wise: bool = False
    ) -> None:
        super().__init__(variables, names)
        self._row_wise = {name for name in names if row_wise and name in tables}
        self._add_state("accumulator", self.INITIAL, [name in self._row_wise for name in names])

    def update(
        self, name: str, variable: tf.Variable, gradient: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor
    ) -> None:
        accumulator = self.state[f"{name}/accumulator"]
        accumulator.assign_add(tf.square(gradient))
        variable.assign_sub(learning_rate * gradient / (tf.sqrt(accumulator) + self.EPSILON))

    def update_rows(
        self, name: str, variable: tf.Variable, gradient: RowGradients, learning_rate: tf.Tensor, step: tf.Tensor
    ) -> None:
        accumulator = self.state[f"{name}/accumulator"]
        squares = tf.square(gradient.rows)
        if name in self._row_wise:
            squares = tf.reduce_mean(squares, axis=1)
        sums = tf.gather(accumulator, gradient.row_ids) + squares
        accumulator.scatter_update(tf.IndexedSlices(sums, gradient.row_ids))
        if name in self._row_wise:
            sums = sums[:, None]
        change = learning_rate * gradient.rows / (tf.sqrt(sums) + self.EPSILON)
        variable.scatter_sub(tf.IndexedSlices(change, gradient.row_ids))


class LazyAdam(Optimizer):
    """Adam (Kingma, Ba 2015); rows that are not in the batch do not move and their moments do not decay."""

    BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7  # as Keras

    def __init__(self, variables: Sequence[tf.Variable], names: Sequence[str]) -> None:
        super().__init__(variables, names)
        self._add_state("first_moment", 0.0)
        self._add_state("second_moment", 0.0)

    def update(
        self, name: str, variable: tf.Variable, gradient: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor
    ) -> None:
        first, second = self.state[f"{name}/first_moment"], self.state[f"{name}/second_moment"]
        first.assign(self._first(first, gradient))
        second.assign(self._second(second, gradient))
        variable.assign_sub(self._change(first, second, learning_rate, step))

    def update_rows(
        self, name: str, variable: tf.Variable, gradient: RowGradients, learning_rate: tf.Tensor, step: tf.Tensor
    ) -> None:
        first, second = self.state[f"{name}/first_moment"], self.state[f"{name}/second_moment"]
        row_ids = gradient.row_ids
        first_rows = self._first(tf.gather(first, row_ids), gradient.rows)
        second_rows = self._second(tf.gather(second, row_ids), gradient.rows)
        first.scatter_update(tf.IndexedSlices(first_rows, row_ids))
        second.scatter_update(tf.IndexedSlices(second_rows, row_ids))
        variable.scatter_sub(tf.IndexedSlices(self._change(first_rows, second_rows, learning_rate, step), row_ids))

    def _first(self, moment: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        return self.BETA_1 * moment + (1.0 - self.BETA_1) * gradient

    def _second(self, moment: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        return self.BETA_2 * moment + (1.0 - self.BETA_2) * tf.square(gradient)

    def _change(self, first: tf.Tensor, second: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        updates = tf.cast(step, tf.float32)
        rate = learning_rate * tf.sqrt(1.0 - self.BETA_2**updates) / (1.0 - self.BETA_1**updates)
        return rate * first / (tf.sqrt(second) + self.EPSILON)


def make_optimizer(
    config: OptimizerConfig, variables: Sequence[tf.Variable], names: Sequence[str], tables: Sequence[str]
) -> Optimizer:
    match config.optimizer:
        case OptimizerKind.SGD:
            return Sgd(variables, names)
        case OptimizerKind.ADAGRAD:
            return Adagrad(variables, names, tables, config.adagrad_row_wise)
        case OptimizerKind.LAZY_ADAM:
            return LazyAdam(variables, names)
    raise ValueError(f"Unknown optimizer {config.optimizer!r}")
