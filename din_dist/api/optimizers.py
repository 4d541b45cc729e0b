"""Lazy Adam as an optimizer of Keras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from din_dist.api.arguments import check
from din_dist.distributed.row_transports import RowGradients
from din_dist.layers.packed import segment_sum
from din_dist.training.optimizers import LazyAdam
from din_dist.training.regularization import clip


@keras.saving.register_keras_serializable("din_dist", name="LazyAdam")
class KerasLazyAdam(keras.optimizers.Optimizer):
    """Adam that changes only the table rows which a batch reads, with the formula of the trainer's `LazyAdam`.

    `keras.optimizers.Adam` moves every row of an embedding table at every step, and decays its moments. Here a gradient
    by rows (`tf.IndexedSlices`, of `tf.gather` or an embedding layer) costs as much as its rows. A row that is not
    among them keeps its weights and moments to the bit. Decay rates and epsilon are those of Keras' Adam.

    Args:
        learning_rate: a number, or a schedule of Keras.
        global_clipnorm: the largest norm of all gradients together. None: gradients are not clipped.
        name: of the optimizer.

    Raises:
        InputError: another setting of Keras' optimizers is given. Most of them change every row.
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        global_clipnorm: float | None = None,
        name: str = "lazy_adam",
        **others: Any,
    ) -> None:
        unwanted = next((key for key, value in others.items() if value not in _NOTHING.get(key, (None,))), "")
        rule = "takes learning_rate, global_clipnorm and name"
        check(not unwanted, "LazyAdam", rule, unwanted, "Drop it, or use keras.optimizers.Adam.")
        fits = global_clipnorm is None or global_clipnorm > 0
        check(fits, "global_clipnorm", "must be above 0, or None", global_clipnorm, "For example 5.")
        super().__init__(learning_rate=learning_rate, name=name)
        self._largest_norm = global_clipnorm

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Makes the two moments of each variable."""
        if self.built:
            return
        super().build(variables)
        self._first, self._second = ([self.add_variable_from_reference(v, kind) for v in variables] for kind in _KINDS)

    def apply(
        self, grads: Sequence[Any], trainable_variables: Sequence[keras.Variable] | None = None
    ) -> tf.Variable | None:
        """Changes the variables by one update.

        Args:
            grads: a tensor, or `tf.IndexedSlices` whose rows may repeat, for each variable; None: it has no gradient.
            trainable_variables: the variables. None: those of `build`.
        """
        merged = [_merged(gradient) for gradient in grads]
        if self._largest_norm is not None:
            merged = _clipped(merged, self._largest_norm)
        return super().apply(merged, trainable_variables)

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        """Changes one variable and its moments.

        Args:
            gradient: float32, in the shape of the variable, or `tf.IndexedSlices` without repeated rows.
            variable: the weights.
            learning_rate: float32.
        """
        place = self._get_variable_index(variable)
        changing = [v.value if isinstance(v, keras.Variable) else v for v in (variable, *self._moments(place))]
        rate = LazyAdam.corrected(tf.cast(learning_rate, tf.float32), self.iterations.value + 1)
        if isinstance(gradient, tf.IndexedSlices):
            before = [tf.gather(each, gradient.indices) for each in changing]
            for each, rows in zip(changing, LazyAdam.update(gradient.values, rate, *before), strict=True):
                each.scatter_update(tf.IndexedSlices(rows, gradient.indices))
        else:
            before = [tf.convert_to_tensor(each) for each in changing]
            for each, values in zip(changing, LazyAdam.update(gradient, rate, *before), strict=True):
                each.assign(values)

    def _moments(self, place: int) -> tuple[keras.Variable, keras.Variable]:
        return self._first[place], self._second[place]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return {
            "name": config["name"],
            "learning_rate": config["learning_rate"],
            "global_clipnorm": self._largest_norm,
        }


_KINDS = tuple(LazyAdam.initial_state)
# The values by which Keras itself says that a setting is not used.
_NOTHING: dict[str, tuple[Any, ...]] = {"use_ema": (None, False)}


def _merged(gradient: Any) -> Any:
    """Returns a gradient in which no row stands twice."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    row_ids, index = tf.unique(gradient.indices)
    rows = segment_sum(gradient.values, index, tf.size(row_ids))
    return tf.IndexedSlices(rows, row_ids, gradient.dense_shape)


def _clipped(gradients: Sequence[Any], largest: float) -> list[Any]:
    """Returns gradients whose norm is at most `largest`, all of them taken together."""
    known = [gradient for gradient in gradients if gradient is not None]
    forms = [RowGradients(g.indices, g.values) if isinstance(g, tf.IndexedSlices) else g for g in known]
    clipped = iter(clip(forms, tf.linalg.global_norm(known), largest))
    return [None if gradient is None else _in_form_of(gradient, next(clipped)) for gradient in gradients]


def _in_form_of(gradient: Any, clipped: Any) -> Any:
    if not isinstance(clipped, RowGradients):
        return clipped
    return tf.IndexedSlices(clipped.rows, clipped.row_ids, gradient.dense_shape)
