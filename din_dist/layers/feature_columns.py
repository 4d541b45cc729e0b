"""Turns the values of declared features into columns: embeddings, pooled lists, numbers and projected vectors.

Letters of shapes: n rows, which are examples or distinct items; M values of all their lists; R distinct rows of a
table; D width of a feature.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from din_dist.execution import INFERENCE, Mode, on_host
from din_dist.features.encoding import Encoding, Lists
from din_dist.features.gathering import missing_values
from din_dist.features.spec import Form, Owner, Pooling, Scale
from din_dist.kernels import operations
from din_dist.layers.native.vectors import VectorColumns, concatenated, vectors_and_candidates
from din_dist.layers.packed import segment_ids, segment_sum
from din_dist.layers.table_holder import WHOLE, TableHolder
from din_dist.schema import UNKNOWN_ID, TableSpec, feature_label

_LONGEST_NAME = 150  # bytes: names of checkpoints' files have more in them
_OURS = ("item", "item_bias")  # variables of `LocalLookup`
_SEEDS_OF_TABLES = 2**20  # projections and frequencies have seeds beyond those


def variable_name(feature: str) -> str:
    """Returns a name for a feature's variables: the feature's, unless another variable has it or Keras refuses it."""
    if "/" in feature or feature in _OURS or len(feature.encode()) > _LONGEST_NAME:
        return _digest_name(feature)
    return feature


def layer_name(feature: str) -> str:
    """Returns a name for a feature's layer: `variable_name`, unless TensorFlow refuses it as the name of a scope."""
    return variable_name(feature) if re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9_.-]*", feature) else _digest_name(feature)


def _digest_name(feature: str) -> str:
    return f"feature.{hashlib.blake2b(feature.encode(), digest_size=16).hexdigest()}"


class _Weights(NamedTuple):
    """The weights of a feature; None where its form or its declaration has no use for them."""

    rows: Any  # takes ids int32 [R] and returns rows [R, D] of the table, or as wide as the vectors it starts from
    frequencies: Any  # a variable [K]
    projection: Any  # a Dense layer


@keras.saving.register_keras_serializable("din_dist")
class FeatureColumns(keras.layers.Layer):
    """The columns of some features, concatenated in their order.

    - IDS: a row of a table. Rows of a table that starts from vectors are projected, unless they have the width.
    - LISTS: the mean, the sum or the weighted sum of rows; zeros for an empty list.
    - NUMBERS: the number or 0, then 1 where it is missing. A periodic number is sin(2 pi c_k x) for each k, then
      cos(2 pi c_k x), with trained c_k of which the first values are normal (Gorishniy et al. 2022, "On Embeddings
      for Numerical Features in Tabular Deep Learning"). Projected if the declaration has a width.
    - VECTORS: the vector or zeros, then 1 where it is missing, projected. Vectors are no variables.

    No row of a table is gathered twice, so the gradient of a table names each row once.

    Args:
        encodings: of the features.
        default_width: the width of embeddings and projections that declare none.
        seed: of the initial values; every variable gets its own.
        starts: name -> `[rows, dimension]`, the initial values of the table of a trained vector.
        holder: makes the tables and reads their rows.
    """

    def __init__(
        self,
        encodings: Sequence[Encoding],
        default_width: int,
        seed: int = 0,
        starts: Mapping[str, np.ndarray] | None = None,
        holder: TableHolder = WHOLE,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._holder = holder
        self.encodings, self._default_width, self._seed = tuple(encodings), default_width, seed
        self.specs = feature_table_specs(self.encodings, default_width)
        starts = starts or {}
        self.tables = [
            holder.add_table(
                self,
                variable_name(encoding.spec.name),
                (spec.num_rows, spec.width),
                _first_values(starts.get(encoding.spec.name), seed + place),
            )
            for place, (spec, encoding) in enumerate(zip(self.specs, self._with_tables, strict=True))
        ]
        self.frequencies: dict[str, keras.Variable] = {}
        self.projections: dict[str, keras.layers.Dense] = {}
        for place, encoding in enumerate(self.encodings):
            self._add_dense(encoding, (seed + _SEEDS_OF_TABLES + 2 * place) % 2**32)
        self.built = True

    @property
    def _with_tables(self) -> list[Encoding]:
        return [encoding for encoding in self.encodings if _table_width(encoding, self._default_width)]

    def _add_dense(self, encoding: Encoding, seed: int) -> None:
        """Makes the frequencies and the projection of a feature that has them."""
        name, encode = encoding.spec.name, encoding.spec.encode
        if encoding.form is Form.NUMBERS and encode.scale is Scale.PERIODIC:
            first = keras.initializers.RandomNormal(stddev=encode.sigma, seed=seed + 1)
            shape, of_feature = (encode.frequencies,), f"{variable_name(name)}.frequencies"
            self.frequencies[name] = self.add_weight(shape=shape, initializer=first, name=of_feature)
        if (width := _projected_width(encoding, self._default_width)) is not None:
            initializer = keras.initializers.GlorotUniform(seed)
            projection = keras.layers.Dense(
                encoding.width(self._default_width), kernel_initializer=initializer, name=layer_name(name)
            )
            with keras.name_scope(self.name):
                projection.build((None, width))
            self.projections[name] = projection

    @property
    def embedded(self) -> list[tuple[Encoding, keras.Variable]]:
        """Each feature that has a table, with the table."""
        return [*zip(self._with_tables, self.tables, strict=True)]

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.width_of(tuple(Owner))

    def width_of(self, owners: Collection[Owner]) -> int:
        """Returns the number of columns of the features of some owners."""
        return sum(encoding.width(self._default_width) for encoding in self._of(owners))

    def _of(self, owners: Collection[Owner]) -> list[Encoding]:
        return [encoding for encoding in self.encodings if encoding.spec.owner in owners]

    @property
    def projected_widths(self) -> list[tuple[Encoding, int, int]]:
        """Each feature that is projected, with the widths before and after."""
        widths = ((encoding, _projected_width(encoding, self._default_width)) for encoding in self.encodings)
        return [(encoding, width, encoding.width(self._default_width)) for encoding, width in widths if width]

    def call(
        self, values: Mapping[str, Any], mode: Mode = INFERENCE, owners: Collection[Owner] = tuple(Owner)
    ) -> tf.Tensor:
        """Returns the columns, float32 `[n, width_of(owners)]`.

        Args:
            values: name -> by form, int32 `[n]`, `Lists` of n, float32 `[n]` or float16 `[n, D]`.
            mode: of the pass.
            owners: of the features; those of others may be absent from `values`.
        """
        parts = self.parts(values, mode, owners)
        if mode.kernels:
            return vectors_and_candidates(parts, tf.zeros([0], tf.int32))[0]
        return concatenated(parts)

    def parts(
        self, values: Mapping[str, Any], mode: Mode = INFERENCE, owners: Collection[Owner] = tuple(Owner)
    ) -> list[VectorColumns]:
        """Returns the parts that `call` concatenates; arguments as there."""
        tables = {encoding.spec.name: table for encoding, table in self.embedded}
        parts = []
        for encoding in self._of(owners):
            name = encoding.spec.name
            weights = _Weights(self._rows_of(tables.get(name)), self.frequencies.get(name), self.projections.get(name))
            parts.append(_PART_OF_FORM[encoding.form](encoding, weights, values[name], mode))
        return parts

    def _rows_of(self, table: keras.Variable | None) -> Callable[[tf.Tensor], tf.Tensor] | None:
        return None if table is None else functools.partial(self._holder.rows, table)

    def missing(self, num_rows: int | tf.Tensor) -> dict[str, Any]:
        """Returns `values` for `call` in which all are missing."""
        return missing_values(self.encodings, num_rows)

    @property
    def specs_of_ids(self) -> list[TableSpec]:
        """The tables of the features of one id a row, in the order of `unknown`."""
        pairs = zip(self._with_tables, self.specs, strict=True)
        return [spec for encoding, spec in pairs if encoding.form is Form.IDS]

    def unknown(self, values: Mapping[str, Any]) -> list[tf.Tensor]:
        """Returns, for each feature of one id a row, which rows have no known id: bool `[n]`."""
        of_ids = [encoding.spec.name for encoding in self.encodings if encoding.form is Form.IDS]
        return [tf.equal(values[name], UNKNOWN_ID) for name in of_ids]

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "encodings": [encoding.to_json() for encoding in self.encodings],
            "default_width": self._default_width,
            "seed": self._seed,
        }

    @classmethod
    def from_config(cls, config: dict) -> FeatureColumns:
        return cls(**config | {"encodings": [Encoding.from_json(encoding) for encoding in config["encodings"]]})


def feature_table_specs(encodings: Sequence[Encoding], default_width: int) -> list[TableSpec]:
    """Returns the table of each feature that has one."""
    widths = [(encoding, _table_width(encoding, default_width)) for encoding in encodings]
    return [
        TableSpec(feature_label(encoding.spec.name), encoding.num_rows, width) for encoding, width in widths if width
    ]


def _table_width(encoding: Encoding, default: int) -> int:
    """Returns the width of a feature's table; 0 without one."""
    if encoding.form not in (Form.IDS, Form.LISTS):
        return 0
    return encoding.dimension if encoding.spec.trained else encoding.width(default)


def _projected_width(encoding: Encoding, default: int) -> int | None:
    """Returns the number of columns before a feature's projection; None without one."""
    match encoding.form:
        case Form.VECTORS:
            return encoding.dimension + 1
        case Form.NUMBERS:
            return encoding.num_number_columns if encoding.spec.width else None
        case Form.IDS if encoding.spec.trained and encoding.dimension != encoding.width(default):
            return encoding.dimension
        case _:
            return None


def _first_values(start: np.ndarray | None, seed: int) -> keras.initializers.Initializer:
    if start is None:
        return keras.initializers.GlorotUniform(seed % 2**32)
    return lambda shape, dtype: tf.reshape(tf.constant(np.nan_to_num(start), dtype), shape)


def _ids_part(encoding: Encoding, weights: _Weights, ids: tf.Tensor, mode: Mode) -> VectorColumns:
    distinct, index = _distinct(ids, mode)
    rows = weights.rows(distinct)
    return VectorColumns(rows if weights.projection is None else weights.projection(rows), index)


def _lists_part(encoding: Encoding, weights: _Weights, lists: Lists, mode: Mode) -> VectorColumns:
    distinct, index = _distinct(lists.values, mode)
    rows = tf.gather(weights.rows(distinct), index)  # [M, D]
    if encoding.spec.pool is Pooling.WEIGHTED:
        rows *= lists.weights[:, None]
    pooled = segment_sum(rows, segment_ids(lists.lengths, mode), tf.size(lists.lengths))
    if encoding.spec.pool is Pooling.MEAN:
        pooled /= tf.cast(tf.maximum(lists.lengths, 1), tf.float32)[:, None]
    return VectorColumns(pooled, None)


def _numbers_part(encoding: Encoding, weights: _Weights, numbers: tf.Tensor, mode: Mode) -> VectorColumns:
    missing = tf.math.is_nan(numbers)
    known = tf.where(missing, 0.0, numbers)[:, None]
    columns = [known]
    if weights.frequencies is not None:
        angles = 2 * math.pi * known * weights.frequencies.value
        columns = [tf.sin(angles), tf.cos(angles)]
    found = tf.concat([*columns, tf.cast(missing, tf.float32)[:, None]], axis=1)
    return VectorColumns(found if weights.projection is None else weights.projection(found), None)


def _vectors_part(encoding: Encoding, weights: _Weights, vectors: tf.Tensor, mode: Mode) -> VectorColumns:
    vectors = tf.cast(vectors, tf.float32)
    missing = tf.reduce_any(tf.math.is_nan(vectors), axis=1, keepdims=True)
    found = tf.concat([tf.where(missing, 0.0, vectors), tf.cast(missing, tf.float32)], axis=1)
    return VectorColumns(weights.projection(found), None)


_PART_OF_FORM = {
    Form.IDS: _ids_part,
    Form.LISTS: _lists_part,
    Form.NUMBERS: _numbers_part,
    Form.VECTORS: _vectors_part,
}


def _distinct(ids: tf.Tensor, mode: Mode) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns each id once, `[R]`, and the index in it of each of `ids` `[n]`."""
    with on_host():
        return operations.distinct_ids([ids]) if mode.kernels else tf.unique(ids)
