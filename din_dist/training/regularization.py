"""Weight penalties and clipping of the global batch's gradient, before the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from din_dist.config import OptimizerConfig
from din_dist.distributed.gradients import Gradient
from din_dist.distributed.row_transports import RowGradients
from din_dist.execution import Execution
from din_dist.kernels import operations
from din_dist.training.optimizers import Values

# A table's gradient, what `Optimizer.values_of` it is, and a weight for each row of the table, if they differ.
_Penalised: TypeAlias = tuple[RowGradients, Values, tf.Tensor | None]
# Rows with their penalties, and sums of squares: of all gradients of rows, with penalties, and of whole ones.
_Added: TypeAlias = tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]


class Regularization:
    """Adds the penalties of `OptimizerConfig` to merged gradients, so that any number of workers adds the same.

    Args:
        row_counts: name of a table -> float32 `[num_rows]`, in how many training events each row occurs.
        execution: how the penalties are computed.
    """

    def __init__(
        self, config: OptimizerConfig, row_counts: Mapping[str, np.ndarray], execution: Execution | None = None
    ) -> None:
        self._config, self._execution = config, execution or Execution()
        self._tables = set(row_counts) if config.embedding_l2 or config.mini_batch_aware_l2 else set()
        self._row_weights = {}
        if config.mini_batch_aware_l2:
            # Equation 8 of the paper: a row is penalised in each batch that it occurs in, so by 1/n_j each time.
            self._row_weights = {
                name: tf.constant(config.mini_batch_aware_l2 / np.maximum(counts, 1.0), tf.float32)
                for name, counts in row_counts.items()
            }

    def __call__(
        self,
        gradients: Sequence[Gradient],
        values: Sequence[Values],
        names: Sequence[str],
        sum_of_parts: Callable[[tf.Tensor], tf.Tensor] = tf.identity,
    ) -> tuple[list[Gradient], tf.Tensor]:
        """Returns the gradients with penalties, and the Euclidean norm of all of them together.

        Args:
            values: `Optimizer.values_of` the gradients.
            names: the names of their variables.
            sum_of_parts: sums over the ranks a number that each computed from its own rows' gradients.
        """
        if self._config.l2:
            gradients = [
                gradient + self._config.l2 * value
                if name.endswith("/kernel") and not isinstance(gradient, RowGradients)
                else gradient
                for gradient, value, name in zip(gradients, values, names, strict=True)
            ]
        penalised = {
            place: (gradient, values[place], self._row_weights.get(names[place]))
            for place, gradient in enumerate(gradients)
            if isinstance(gradient, RowGradients) and names[place] in self._tables
        }
        # A rank has a part of the rows of tables that ranks share or deal out, and all touched rows of others.
        in_parts = {
            place: gradient.num_rows is not None
            for place, gradient in enumerate(gradients)
            if isinstance(gradient, RowGradients)
        }
        whole = [gradient for gradient in gradients if not isinstance(gradient, RowGradients)]
        replaced: dict[int, tf.Tensor] = {}
        squares = tf.constant(0.0)
        for is_part in sorted({*in_parts.values()}) or [False]:
            of_kind = {place: each for place, each in penalised.items() if in_parts[place] == is_part}
            rows = [
                gradients[place].rows for place, part in in_parts.items() if part == is_part and place not in of_kind
            ]
            added, of_rows, of_whole = self._add([*of_kind.values()], rows, whole)
            replaced |= zip(of_kind, added, strict=True)
            squares += (sum_of_parts(of_rows) if is_part else of_rows) + of_whole
            whole = []
        return [
            gradient._replace(rows=replaced[place]) if place in replaced else gradient
            for place, gradient in enumerate(gradients)
        ], tf.sqrt(squares)

    def _add(self, penalised: Sequence[_Penalised], rows: Sequence[tf.Tensor], whole: Sequence[tf.Tensor]) -> _Added:
        whole_tables = all(isinstance(values, tf.Variable) for _, values, _ in penalised)
        add = self._by_kernel if self._execution.kernels and whole_tables else self._by_operations
        return add(penalised, rows, whole)

    def _by_operations(
        self, penalised: Sequence[_Penalised], rows: Sequence[tf.Tensor], whole: Sequence[tf.Tensor]
    ) -> _Added:
        added = []
        for gradient, values, row_weights in penalised:
            weights = tf.fill([tf.size(gradient.row_ids)], self._config.embedding_l2)
            if row_weights is not None:
                weights += tf.gather(row_weights, gradient.row_ids)
            added.append(gradient.rows + weights[:, None] * values)
        return added, _sum_of_squares(*added, *rows), self._execution.fused(_sum_of_squares)(*whole)

    def _by_kernel(
        self, penalised: Sequence[_Penalised], rows: Sequence[tf.Tensor], whole: Sequence[tf.Tensor]
    ) -> _Added:
        gradients, tables, row_weights = [*zip(*penalised, strict=True)] or [()] * 3
        return operations.regularize(
            tf.constant(self._config.embedding_l2, tf.float32),
            [*(gradient.rows for gradient in gradients), *rows, *whole],
            tables,
            [gradient.row_ids for gradient in gradients],
            [tf.zeros([0]) if weights is None else weights for weights in row_weights],
            num_row_gradients=len(gradients) + len(rows),
        )


def _sum_of_squares(*values: tf.Tensor) -> tf.Tensor:
    return tf.add_n([tf.constant(0.0), *(tf.reduce_sum(tf.square(value)) for value in values)])


def clip(gradients: Sequence[Gradient], norm: tf.Tensor, largest: float) -> list[Gradient]:
    """Scales all of `gradients` down so that their global norm is at most `largest`."""
    scale = tf.minimum(1.0, largest / tf.maximum(norm, 1e-30))
    return [g._replace(rows=g.rows * scale) if isinstance(g, RowGradients) else g * scale for g in gradients]
