"""The place where the rows of embedding tables lie: behind this interface lookups do not know which rank has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

# Takes shape and dtype of a variable, and returns its first values; or the name of a Keras initializer.
FirstValues = Callable[..., Any] | str


class TableHolder:
    """Makes tables and reads their rows. This one holds every table whole."""

    def add_table(
        self, layer: keras.layers.Layer, name: str, shape: tuple[int, int], first: FirstValues
    ) -> keras.Variable:
        """Returns a new table of `layer`.

        Args:
            layer: gets the variable, under `name`.
            name: of the variable.
            shape: rows and width of the whole table.
            first: makes the first values of the whole table.
        """
        return layer.add_weight(shape=shape, initializer=first, name=name)

    def rows(self, table: keras.Variable, row_ids: tf.Tensor) -> tf.Tensor:
        """Returns rows of a table, float32 `[R, D]`.

        Args:
            table: from `add_table`.
            row_ids: int32 `[R]`, rows of the whole table. If none stands twice, the gradient names each row once.
        """
        return tf.gather(table.value, row_ids)


WHOLE = TableHolder()
