"""What is added to the gradient of the global batch before the update: weight penalties and clipping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from din_dist.config import OptimizerConfig
from din_dist.distributed.gradients import Gradient, RowGradients


class Regularization:
    """Adds the penalties of `OptimizerConfig` to merged gradients, so that any number of workers adds the same.

    Args:
        row_counts: name of a table -> float32 `[num_rows]`, in how many training events each row occurs.
    """

    def __init__(self, config: OptimizerConfig, row_counts: Mapping[str, np.ndarray]) -> None:
        self._config = config
        self._is_table = set(row_counts)
        self._row_weights = {}
        if config.mini_batch_aware_l2:
            # Equation 8 of the paper: a row is penalised in each batch that it occurs in, so by 1/n_j each time.
            self._row_weights = {
                name: tf.constant(config.mini_batch_aware_l2 / np.maximum(counts, 1.0), tf.float32)
                for name, counts in row_counts.items()
            }

    def __call__(
        self, gradients: Sequence[Gradient], variables: Sequence[tf.Variable], names: Sequence[str]
    ) -> list[Gradient]:
        return [
            self._penalised(gradient, variable, name)
            for gradient, variable, name in zip(gradients, variables, names, strict=True)
        ]

    def _penalised(self, gradient: Gradient, variable: tf.Variable, name: str) -> Gradient:
        if isinstance(gradient, RowGradients) and name in self._is_table:
            if not (self._config.embedding_l2 or self._row_weights):
                return gradient
            weights = tf.fill([tf.size(gradient.row_ids)], self._config.embedding_l2)
            if self._row_weights:
                weights += tf.gather(self._row_weights[name], gradient.row_ids)
            penalty = weights[:, None] * tf.gather(variable, gradient.row_ids)
            return RowGradients(gradient.row_ids, gradient.rows + penalty)
        if self._config.l2 and name.endswith("kernel"):
            return gradient + self._config.l2 * variable
        return gradient


def global_norm(gradients: Sequence[Gradient]) -> tf.Tensor:
    """Euclidean norm of the whole gradient; rows that are not named are zero."""
    values = [g.rows if isinstance(g, RowGradients) else g for g in gradients]
    return tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(value)) for value in values]))


def clip(gradients: Sequence[Gradient], norm: tf.Tensor, largest: float) -> list[Gradient]:
    """Scales all of `gradients` down so that their global norm is at most `largest`."""
    scale = tf.minimum(1.0, largest / tf.maximum(norm, 1e-30))
    return [RowGradients(g.row_ids, g.rows * scale) if isinstance(g, RowGradients) else g * scale for g in gradients]
