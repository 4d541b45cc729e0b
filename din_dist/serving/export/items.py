"""Looks items up by the log's own ids inside a SavedModel.

Letters of shapes, in addition to those of `schema`: M items of a request, U distinct ones among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import tensorflow as tf

from din_dist.features.spec import Kind, Owner
from din_dist.layers.local_lookup import LocalLookup
from din_dist.serving.export.columns import ExportedColumns, is_plain
from din_dist.serving.export.features import MISSING, CategoryEncoder, Declared, ItemValues
from din_dist.serving.export.vocabulary import IdTable


class Items(NamedTuple):
    """The items of a request, each distinct one looked up once."""

    vectors: tf.Tensor  # [U, H]
    biases: tf.Tensor  # [U], or [U, T] of T tasks
    index: tf.Tensor  # int32 [M], the index of each of the request's items among the distinct ones
    features: Mapping[str, tf.Tensor]  # name -> int32 [U], the ids of each item feature


class ItemLookup:
    """The lookup of a trained model, by own ids.

    Args:
        lookup: of the trained model.
        item_ids: the log's ids of all items, in the order of the dense ids.
        feature_ids: name of an item feature -> the ids of its values, in the order of the dense ids.
        declared: the declared features of items by name.
        folder: for the files of the vocabularies, which are needed until the SavedModel is written.
    """

    def __init__(
        self,
        lookup: LocalLookup,
        item_ids: pa.ChunkedArray,
        feature_ids: Mapping[str, pa.ChunkedArray],
        declared: Mapping[str, Declared],
        folder: Path,
    ) -> None:
        self._lookup = lookup
        self.ids = IdTable(item_ids, folder / "item_ids.txt")
        self._features = {
            name: IdTable(ids, folder / f"feature_{number}.txt")
            for number, (name, ids) in enumerate(feature_ids.items())
        }
        self._tables = [_named_to_save(table.value) for table in lookup.tables]
        # Variables, because constants would be part of the graph, which is limited to 2 GB.
        self._feature_of_item = [_variable(lookup.item_features[name]) for name in feature_ids]
        self._row_of_item = None if lookup.row_of_item is None else _variable(lookup.row_of_item)
        items = {
            name: feature for name, feature in declared.items() if feature.stored.encoding.spec.owner is Owner.ITEM
        }
        self._values = {name: ItemValues(feature.stored) for name, feature in items.items()}
        self._columns = ExportedColumns(lookup.columns) if lookup.columns else None
        self._categories = {
            name: CategoryEncoder(feature, folder / f"item_{number}.txt")
            for number, (name, feature) in enumerate(items.items())
            if feature.stored.encoding.spec.kind is Kind.CATEGORY
        }

    @property
    def given_types(self) -> dict[str, tf.DType]:
        """Features whose values may be given for new items, in the order of `find`, with the types of their values."""
        found = {name: table.dtype for name, table in self._features.items()}
        return found | {name: encoder.specs[""].dtype for name, encoder in self._categories.items()}

    @property
    def weights_apart(self) -> set[int]:
        """The ids of Keras' variables that `resources` holds, some of them as copies."""
        columns = self._lookup.columns.weights if self._lookup.columns else []
        return {id(weight) for weight in [*self._lookup.tables, *columns]}

    @property
    def resources(self) -> list:
        """The variables and tables that a SavedModel must track."""
        columns = self._columns.variables if self._columns else []
        variables = [*self._tables, *columns, *self._feature_of_item]
        if self._row_of_item is not None:
            variables.append(self._row_of_item)
        return [
            *variables,
            *[self.ids, *self._features.values(), *self._values.values(), *self._categories.values()],
        ]

    def find(self, ids: tf.Tensor, given: Sequence[tf.Tensor]) -> Items:
        """Looks items up by their ids alone, or also by given features.

        Args:
            ids: `[M]`, the log's own.
            given: the value of each of `given_types`, `[M]` each, or nothing.
        """
        dense_ids = self.ids.dense_ids(ids)
        if not given:
            distinct, index = tf.unique(dense_ids)
            features = [tf.gather(of_item, distinct) for of_item in self._feature_of_item]
            return self._look_up(self._rows(distinct), features, self._values_of(distinct), index)
        features = [
            tf.where(tf.equal(values, MISSING[table.dtype]), tf.gather(of_item, dense_ids), table.dense_ids(values))
            for values, table, of_item in zip(given, self._features.values(), self._feature_of_item, strict=False)
        ]
        categories = [
            tf.where(tf.equal(values, MISSING[values.dtype]), self._values[name].of(dense_ids), encoder.rows_of(values))
            for values, (name, encoder) in zip(given[len(features) :], self._categories.items(), strict=True)
        ]
        rows = self._rows(dense_ids)
        _, index = tf.unique(dense_ids if self._values else rows)
        sizes = [table.shape[0] for table in self._tables[1:]]
        sizes += [encoder.encoding.num_rows for encoder in self._categories.values()]
        for size, found in zip(sizes, (*features, *categories), strict=True):
            combined = tf.cast(index, tf.int64) * size + tf.cast(found, tf.int64)
            _, index = tf.unique(combined)
        num_distinct = tf.reduce_max(tf.concat([index, [-1]], axis=0)) + 1
        firsts = tf.math.unsorted_segment_min(tf.range(tf.size(index)), index, num_distinct)
        of_distinct = self._values_of(tf.gather(dense_ids, firsts))
        of_distinct |= {
            name: tf.gather(values, firsts) for name, values in zip(self._categories, categories, strict=True)
        }
        distinct_features = [tf.gather(feature, firsts) for feature in features]
        return self._look_up(tf.gather(rows, firsts), distinct_features, of_distinct, index)

    def _values_of(self, dense_ids: tf.Tensor) -> dict:
        return {name: values.of(dense_ids) for name, values in self._values.items()}

    def _look_up(self, rows: tf.Tensor, features: Sequence[tf.Tensor], values: dict, index: tf.Tensor) -> Items:
        """Looks up distinct items as `LocalLookup` does, but without its provisions for gradients.

        Args:
            rows: int32 `[U]`, rows of the item table.
            features: int32 `[U]` each, rows of the tables of the item features.
            values: name -> U values of each declared feature.
            index: int32 `[M]`, the index of each of the request's items among the distinct ones.
        """
        parts = [tf.gather(table, ids) for table, ids in zip(self._tables, [rows, *features], strict=True)]
        if self._columns:
            parts.append(self._columns.of(values))
        biases = tf.zeros(tf.shape(rows))
        if self._lookup.has_biases:
            biases = self._lookup.flat(tf.gather(self._lookup.item_bias.value, rows))
        return Items(tf.concat(parts, axis=1), biases, index, dict(zip(self._features, features, strict=True)))

    def _rows(self, dense_ids: tf.Tensor) -> tf.Tensor:
        """Returns the row of the item table of each dense id."""
        return dense_ids if self._row_of_item is None else tf.gather(self._row_of_item, dense_ids)


def _named_to_save(table: tf.Variable) -> tf.Variable:
    """Returns the table, or a copy with another name if TensorFlow cannot save its name.

    A table is named after its item feature, in any language, but TensorFlow saves plain names only.
    """
    return table if is_plain(table) else _variable(table)


def _variable(values: tf.Tensor) -> tf.Variable:
    return tf.Variable(values, trainable=False)
