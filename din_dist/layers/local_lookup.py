"""Looks up item vectors in tables that this process holds whole."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from din_dist.execution import on_host
from din_dist.layers.native.vectors import VectorColumns, concatenated
from din_dist.schema import UNKNOWN_ID, TableSpec

_ITEM, _ITEM_BIAS = "item", "item_bias"
_LONGEST_NAME = 150  # bytes: names of checkpoints' files have more in them


def _variable_name(feature: str) -> str:
    """Returns a name for a feature's table: the feature's, unless another variable has it or Keras refuses it."""
    if "/" in feature or feature in (_ITEM, _ITEM_BIAS) or len(feature.encode()) > _LONGEST_NAME:
        return f"feature.{hashlib.blake2b(feature.encode(), digest_size=16).hexdigest()}"
    return feature


@keras.saving.register_keras_serializable("din_dist")
class LocalLookup(keras.layers.Layer):
    """The embedding of an item and those of its features, concatenated: H is the sum of the tables' widths.

    This is the interface by which models reach embeddings, whoever holds them: `call`, `parts` and `width`.

    Args:
        tables: the item's own table first, then one for each of `item_features`, in its order.
        item_features: name -> int32 `[num_item_rows]`, the feature's id of each item.
        seed: of the initial values; every table gets its own.
        row_of_item: int32 `[num_item_rows]`, the row of each item in its table: its own, or that of `UNKNOWN_ID`, which
            many share. Then -id means item `id` with its own id hidden: that row, and its features. None: their own.
    """

    def __init__(
        self,
        tables: Sequence[TableSpec],
        item_features: Mapping[str, np.ndarray],
        seed: int = 0,
        row_of_item: np.ndarray | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._seed = seed
        self.specs = tuple(tables)
        self.row_of_item = None if row_of_item is None else tf.constant(row_of_item, tf.int32)
        self.item_features = {name: tf.constant(ids, tf.int32) for name, ids in item_features.items()}
        names = [_ITEM, *(_variable_name(feature) for feature in item_features)]
        self.tables = [
            self.add_weight(
                shape=(spec.num_rows, spec.width),
                initializer=keras.initializers.GlorotUniform((seed + place) % 2**32),
                name=name,
            )
            for place, (spec, name) in enumerate(zip(self.specs, names, strict=True))
        ]
        self.item_bias = self.add_weight(shape=(self.specs[0].num_rows, 1), initializer="zeros", name=_ITEM_BIAS)
        self.built = True

    @property
    def width(self) -> int:
        return sum(spec.width for spec in self.specs)

    def call(self, item_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the vectors `[U, H]` and biases `[U]` of distinct `item_ids`, int32 `[U]`.

        No row of a table is gathered twice, so the gradient of a table names each row once.
        """
        return self.rows(self.item_rows(item_ids), self.feature_ids(item_ids))

    def item_rows(self, item_ids: tf.Tensor) -> tf.Tensor:
        """Returns the row of each of `item_ids` `[U]` in the item's table."""
        if self.row_of_item is None:
            return item_ids
        with on_host():
            return tf.where(item_ids < 0, UNKNOWN_ID, tf.gather(self.row_of_item, tf.abs(item_ids)))

    def feature_ids(self, item_ids: tf.Tensor) -> list[tf.Tensor]:
        """Returns the features' ids of each of `item_ids` `[U]`, in the order of the tables."""
        with on_host():
            items = item_ids if self.row_of_item is None else tf.abs(item_ids)
            return [tf.gather(of_item, items) for of_item in self.item_features.values()]

    def rows(self, item_rows: tf.Tensor, feature_ids: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns what `call` returns, of items whose rows and feature ids are given.

        Args:
            item_rows: int32 `[U]`, rows of the item's table. The gradient names each row once if none stands twice here
                or if items share rows.
            feature_ids: int32 `[U]` each, in the order of the tables.
        """
        parts, biases = self._parts(item_rows, feature_ids)
        return concatenated(parts), biases

    def parts(self, item_ids: tf.Tensor) -> tuple[list[VectorColumns], tf.Tensor]:
        """Returns the parts of the vectors of `item_ids` `[U]`, and their biases `[U]`."""
        return self._parts(self.item_rows(item_ids), self.feature_ids(item_ids))

    def _parts(self, item_rows: tf.Tensor, feature_ids: Sequence[tf.Tensor]) -> tuple[list[VectorColumns], tf.Tensor]:
        index_of = None
        if self.row_of_item is not None:
            with on_host():
                item_rows, index_of = tf.unique(item_rows)
        parts = [VectorColumns(tf.gather(self.tables[0].value, item_rows), index_of)]
        biases = tf.gather(self.item_bias.value, item_rows)
        if index_of is not None:
            biases = tf.gather(biases, index_of)
        for table, ids in zip(self.tables[1:], feature_ids, strict=True):
            with on_host():
                distinct, index = tf.unique(ids)
            parts.append(VectorColumns(tf.gather(table.value, distinct), index))
        return parts, tf.squeeze(biases, axis=1)

    def unknown(self, item_ids: tf.Tensor) -> tf.Tensor:
        """Returns, bool `[tables, U]`, which of `item_ids` have no known id in a table. A hidden id is known."""
        items = item_ids if self.row_of_item is None else tf.abs(item_ids)
        return tf.stack([self.item_rows(items), *self.feature_ids(items)]) == UNKNOWN_ID

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "tables": [dataclasses.asdict(spec) for spec in self.specs],
            "item_features": {name: ids.numpy().tolist() for name, ids in self.item_features.items()},
            "seed": self._seed,
            "row_of_item": None if self.row_of_item is None else self.row_of_item.numpy().tolist(),
        }

    @classmethod
    def from_config(cls, config: dict) -> LocalLookup:
        return cls(**config | {"tables": [TableSpec(**spec) for spec in config["tables"]]})
