"""Looks up item vectors in tables, wherever their rows lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from din_dist.execution import INFERENCE, Mode, on_host
from din_dist.features.encoding import Encoding, StoredFeature
from din_dist.features.gathering import FeatureValues
from din_dist.layers.feature_columns import FeatureColumns, variable_name
from din_dist.layers.native.vectors import VectorColumns, concatenated
from din_dist.layers.table_holder import WHOLE, TableHolder
from din_dist.schema import UNKNOWN_ID, TableSpec

_ITEM, _ITEM_BIAS = "item", "item_bias"


@keras.saving.register_keras_serializable("din_dist")
class LocalLookup(keras.layers.Layer):
    """The embedding of an item, those of its features, and the columns of its declared features, concatenated.

    H is the sum of the tables' widths and of the columns. This is the interface by which models reach embeddings,
    whoever holds them: `call`, `parts` and `width`.

    Args:
        tables: the item's own table first, then one for each of `item_features`, in its order.
        item_features: name -> int32 `[num_item_rows]`, the feature's id of each item.
        seed: of the initial values; every table gets its own.
        row_of_item: int32 `[num_item_rows]`, the row of each item in its table: its own, or that of `UNKNOWN_ID`, which
            many share. Then -id means item `id` with its own id hidden: that row, and its features. None: their own.
        features: name -> a declared feature whose rows are items. None: there are none. Embeddings and projections
            that declare no width are as wide as the item's own table.
        num_biases: of each item, T: one for each task. 0: items have none.
        holder: makes the tables and reads their rows. Default: this process holds them whole.
    """

    def __init__(
        self,
        tables: Sequence[TableSpec],
        item_features: Mapping[str, np.ndarray],
        seed: int = 0,
        row_of_item: np.ndarray | None = None,
        features: Mapping[str, StoredFeature] | None = None,
        num_biases: int = 1,
        holder: TableHolder = WHOLE,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._seed, self._num_biases, self._holder = seed, num_biases, holder
        self.specs = tuple(tables)
        self.row_of_item = None if row_of_item is None else tf.constant(row_of_item, tf.int32)
        self.item_features = {name: tf.constant(ids, tf.int32) for name, ids in item_features.items()}
        names = [_ITEM, *(variable_name(feature) for feature in item_features)]
        self.tables = [
            holder.add_table(
                self, name, (spec.num_rows, spec.width), keras.initializers.GlorotUniform((seed + place) % 2**32)
            )
            for place, (spec, name) in enumerate(zip(self.specs, names, strict=True))
        ]
        self._biases = []
        if num_biases:
            self._biases.append(holder.add_table(self, _ITEM_BIAS, (self.specs[0].num_rows, num_biases), "zeros"))
        self._features = dict(features or {})
        self._values = {name: FeatureValues(stored) for name, stored in self._features.items()}
        self.columns: FeatureColumns | None = None
        if self._features:
            with keras.name_scope(self.name):
                first_seed = seed + len(self.specs)
                self.columns = columns_of(self._features, self.specs[0].width, first_seed, holder=holder)
        self.built = True

    @property
    def width(self) -> int:
        return sum(spec.width for spec in self.specs) + (self.columns.width if self.columns else 0)

    @property
    def has_biases(self) -> bool:
        """True if items have biases."""
        return bool(self._biases)

    @property
    def item_bias(self) -> keras.Variable:
        """The biases of the items `[num_rows, T]`."""
        (biases,) = self._biases
        return biases

    @property
    def embeddings(self) -> list[tuple[TableSpec, keras.Variable]]:
        """Each embedding table with its sizes."""
        own = [*zip(self.specs, self.tables, strict=True)]
        return own + ([*zip(self.columns.specs, self.columns.tables, strict=True)] if self.columns else [])

    @property
    def variables_by_rows(self) -> list[keras.Variable]:
        """The variables of which a batch reads some rows: the tables and the biases."""
        return [*(table for _, table in self.embeddings), *self._biases]

    def call(self, item_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the vectors `[U, H]` and biases, `[U]` or `[U, T]`, of distinct `item_ids`, int32 `[U]`.

        Biases are zeros if items have none. No row of a table is gathered twice, so the gradient of a table names each
        row once.
        """
        return self.rows(self.item_rows(item_ids), self.feature_ids(item_ids), self.feature_values(item_ids))

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

    def feature_of(self, name: str, item_ids: tf.Tensor) -> tf.Tensor:
        """Returns a feature's ids of each of `item_ids` `[U]`, int32 `[U]`."""
        with on_host():
            return tf.gather(self.item_features[name], tf.abs(item_ids))

    def feature_values(self, item_ids: tf.Tensor, mode: Mode = INFERENCE) -> dict[str, Any]:
        """Returns the values of the declared features of `item_ids` `[U]`, as `FeatureColumns.call` takes them."""
        items = item_ids if self.row_of_item is None else tf.abs(item_ids)
        execution = mode.execution if mode.kernels else None
        return {name: values.of(items, execution) for name, values in self._values.items()}

    def rows(
        self,
        item_rows: tf.Tensor,
        feature_ids: Sequence[tf.Tensor],
        feature_values: Mapping[str, Any] | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns what `call` returns, of items whose rows and feature ids are given.

        Args:
            item_rows: int32 `[U]`, rows of the item's table. The gradient names each row once if none stands twice here
                or if items share rows.
            feature_ids: int32 `[U]` each, in the order of the tables.
            feature_values: of the declared features, if there are any: name -> U values, as from `feature_values`.
        """
        parts, biases = self._parts(item_rows, feature_ids, feature_values or {}, INFERENCE)
        return concatenated(parts), biases

    def parts(self, item_ids: tf.Tensor, mode: Mode = INFERENCE) -> tuple[list[VectorColumns], tf.Tensor]:
        """Returns the parts of the vectors of `item_ids` `[U]`, and their biases `[U]`."""
        values = self.feature_values(item_ids, mode)
        return self._parts(self.item_rows(item_ids), self.feature_ids(item_ids), values, mode)

    def _parts(
        self,
        item_rows: tf.Tensor,
        feature_ids: Sequence[tf.Tensor],
        feature_values: Mapping[str, Any],
        mode: Mode,
    ) -> tuple[list[VectorColumns], tf.Tensor]:
        index_of = None
        if self.row_of_item is not None:
            with on_host():
                item_rows, index_of = tf.unique(item_rows)
        parts = [VectorColumns(self._holder.rows(self.tables[0], item_rows), index_of)]
        biases = self._holder.rows(self.item_bias, item_rows) if self._biases else tf.zeros([tf.size(item_rows), 1])
        if index_of is not None:
            biases = tf.gather(biases, index_of)
        for table, ids in zip(self.tables[1:], feature_ids, strict=True):
            with on_host():
                distinct, index = tf.unique(ids)
            parts.append(VectorColumns(self._holder.rows(table, distinct), index))
        if self.columns:
            parts += self.columns.parts(feature_values, mode)
        return parts, self.flat(biases)

    def flat(self, biases: tf.Tensor) -> tf.Tensor:
        """Returns rows of `item_bias` as models want them: `[U]` if there is one task, else `[U, T]`."""
        return tf.squeeze(biases, axis=1) if self._num_biases < 2 else biases

    @property
    def specs_of_ids(self) -> list[TableSpec]:
        """The tables of one id an item, in the order of `unknown`."""
        return [*self.specs, *(self.columns.specs_of_ids if self.columns else ())]

    def unknown(self, item_ids: tf.Tensor) -> tf.Tensor:
        """Returns which of `item_ids` have no known id in a table, bool `[tables, U]`. A hidden id is known.

        Tables of lists are not among them.
        """
        items = item_ids if self.row_of_item is None else tf.abs(item_ids)
        found = tf.stack([self.item_rows(items), *self.feature_ids(items)]) == UNKNOWN_ID
        if self.columns and (of_columns := self.columns.unknown(self.feature_values(items))):
            found = tf.concat([found, of_columns], axis=0)
        return found

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "tables": [dataclasses.asdict(spec) for spec in self.specs],
            "item_features": {name: ids.numpy().tolist() for name, ids in self.item_features.items()},
            "seed": self._seed,
            "num_biases": self._num_biases,
            "row_of_item": None if self.row_of_item is None else self.row_of_item.numpy().tolist(),
            "features": {name: _to_config(stored) for name, stored in self._features.items()},
        }

    @classmethod
    def from_config(cls, config: dict) -> LocalLookup:
        tables = [TableSpec(**spec) for spec in config["tables"]]
        features = {name: _from_config(stored) for name, stored in config["features"].items()}
        return cls(**config | {"tables": tables, "features": features})


def columns_of(
    features: Mapping[str, StoredFeature],
    default_width: int,
    seed: int,
    name: str = "features",
    holder: TableHolder = WHOLE,
) -> FeatureColumns:
    """Returns the columns of stored features; arguments as of `FeatureColumns`."""
    given = {name: getattr(stored, "start", None) for name, stored in features.items()}
    starts = {name: start for name, start in given.items() if start is not None}
    encodings = [stored.encoding for stored in features.values()]
    return FeatureColumns(encodings, default_width, seed, starts, holder, name=name)


def _to_config(stored: StoredFeature) -> dict[str, Any]:
    arrays = {"values": stored.values, "offsets": stored.offsets, "weights": stored.weights}
    return {
        "encoding": stored.encoding.to_json(),
        **{name: None if array is None else [str(array.dtype), array.tolist()] for name, array in arrays.items()},
    }


def _from_config(config: Mapping[str, Any]) -> StoredFeature:
    values, offsets, weights = (
        None if array is None else np.array(array[1], array[0])
        for array in (config["values"], config["offsets"], config["weights"])
    )
    return StoredFeature(Encoding.from_json(config["encoding"]), np.asarray(values), offsets, weights)
