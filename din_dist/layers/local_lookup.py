"""Item ids to item vectors, from tables that this process holds whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from din_dist.schema import UNKNOWN_ID, TableSpec


class LocalLookup(keras.layers.Layer):
    """The embedding of an item and those of its features, side by side: H = the sum of the tables' widths.

    This is the interface by which models reach embeddings, whoever holds them: `call` and `width`.

    Args:
        tables: the item's own table first, then one for each of `item_features`, in its order.
        item_features: name -> int32 `[num_item_rows]`, the feature's id of each item.
        seed: of the initial values; every table gets its own.
    """

    def __init__(
        self, tables: Sequence[TableSpec], item_features: Mapping[str, np.ndarray], seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.specs = tuple(tables)
        self.item_features = {name: tf.constant(ids, tf.int32) for name, ids in item_features.items()}
        self.tables = [
            self.add_weight(
                shape=(spec.num_rows, spec.width),
                initializer=keras.initializers.GlorotUniform(seed + place),
                name=spec.name,
            )
            for place, spec in enumerate(self.specs)
        ]
        self.item_bias = self.add_weight(shape=(self.specs[0].num_rows, 1), initializer="zeros", name="item_bias")
        self.built = True

    @property
    def width(self) -> int:
        return sum(spec.width for spec in self.specs)

    def call(self, item_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Vectors `[U, H]` and biases `[U]` of `item_ids` `[U]`, none of which may be named twice.

        Nor is any row of a table gathered twice, so that the gradient of a table names each row once.
        """
        rows = [tf.gather(self.tables[0].value, item_ids)]
        for table, feature_of_item in zip(self.tables[1:], self.item_features.values(), strict=True):
            distinct, places = tf.unique(tf.gather(feature_of_item, item_ids))
            rows.append(tf.gather(tf.gather(table.value, distinct), places))
        return tf.concat(rows, axis=1), tf.squeeze(tf.gather(self.item_bias.value, item_ids), axis=1)

    def unknown(self, item_ids: tf.Tensor) -> tf.Tensor:
        """Bool `[tables, U]`: which of `item_ids` `[U]` have no known id in a table."""
        features = [tf.gather(feature_of_item, item_ids) for feature_of_item in self.item_features.values()]
        return tf.stack([item_ids, *features]) == UNKNOWN_ID
