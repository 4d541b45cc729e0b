"""Encodes a log's own values of declared features inside a SavedModel, as `data/encoding.py` encoded the log.

Each kind of value is one class. Times are given as the log has them, so the time zone belongs to the export: a client
cannot compute another hour than training did.

Letters of shapes: n rows, which are users, contexts or candidates; M values of all lists; D numbers of a vector.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow as tf

from din_dist import schema
from din_dist.data.hashing import hashed_rows
from din_dist.features.encoding import Encoding, Lists, StoredFeature
from din_dist.features.sides import age_rows
from din_dist.features.spec import TIME_KINDS, FeatureSpec, Form, Kind, Owner, Scale
from din_dist.features.times import PER_SECOND, TimestampUnit, zone_table
from din_dist.layers.packed import segment_ids
from din_dist.serving.export.vocabulary import IdTable
from din_dist.serving.manifest import FeatureInputs

VALUES, LENGTHS, WEIGHTS = "", "_lengths", "_weights"  # what the names of a feature's inputs end with
MISSING = {tf.string: "", tf.int64: tf.int64.min}  # an id that is not given
_LARGEST = float(np.finfo(np.float32).max)
_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
_TYPE = {tf.string: "string", tf.int64: "integer", tf.float32: "number"}


class Declared(NamedTuple):
    """A declared feature with its own ids.

    Attributes:
        stored: as prepared; only its encoding counts, unless its rows are items.
        ids: strings or integers, the own id of each row of its table from row 1 on; empty without a vocabulary.
    """

    stored: StoredFeature
    ids: pa.Array


class ValueEncoder(tf.Module, abc.ABC):
    """Encodes the own values of one feature.

    Args:
        encoding: as the training part fixed it.
    """

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.encoding = encoding

    @property
    @abc.abstractmethod
    def specs(self) -> dict[str, tf.TensorSpec]:
        """The tensors that are given, by the end of the input's name; `VALUES` is first."""

    @abc.abstractmethod
    def encode(self, given: Mapping[str, tf.Tensor]) -> Any:
        """Returns n values in the form of the encoding, as `FeatureColumns.call` takes them.

        Args:
            given: tensors like `specs`.
        """


class CategoryEncoder(ValueEncoder):
    """Ids `[n]` to rows of a table, by a vocabulary or by hashing. Own ids of trained vectors are those of users.

    Args:
        feature: as the training part fixed it.
        path: of the vocabulary's file, which is needed until the SavedModel is written.
    """

    def __init__(self, feature: Declared, path: Path) -> None:
        super().__init__(feature.stored.encoding)
        self._rows = feature.stored.encoding.spec.rows
        self._table = None if self._rows else IdTable(pa.chunked_array([feature.ids]), path)
        self._dtype = _type_of(feature)

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        return {VALUES: tf.TensorSpec([None], self._dtype)}

    def encode(self, given: Mapping[str, tf.Tensor]) -> tf.Tensor:
        return self.rows_of(given[VALUES])

    def rows_of(self, ids: tf.Tensor) -> tf.Tensor:
        """Returns the row of each id, int32; that of unknown ids for those that are missing."""
        if self._table is None:
            found = hashed_rows(ids if ids.dtype == tf.string else tf.strings.as_string(ids), self._rows)
        else:
            found = self._table.dense_ids(ids)
        return tf.where(tf.equal(ids, MISSING[ids.dtype]), schema.UNKNOWN_ID, found)


class ListEncoder(ValueEncoder):
    """Lists of ids, concatenated, and their lengths `[n]`. Ids that are missing are left out, as preparation does."""

    def __init__(self, feature: Declared, path: Path) -> None:
        super().__init__(feature.stored.encoding)
        self._ids = CategoryEncoder(feature, path)

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        found = {**self._ids.specs, LENGTHS: tf.TensorSpec([None], tf.int64)}
        return found | ({WEIGHTS: tf.TensorSpec([None], tf.float32)} if self.encoding.spec.weights else {})

    def encode(self, given: Mapping[str, tf.Tensor]) -> Lists:
        ids, lengths = given[VALUES], tf.cast(given[LENGTHS], tf.int32)
        kept = tf.not_equal(ids, MISSING[ids.dtype])
        lengths = tf.math.unsorted_segment_sum(tf.cast(kept, tf.int32), segment_ids(lengths), tf.size(lengths))
        weights = tf.boolean_mask(given[WEIGHTS], kept) if WEIGHTS in given else tf.zeros([0])
        return Lists(self._ids.rows_of(tf.boolean_mask(ids, kept)), lengths, weights)


class NumberEncoder(ValueEncoder):
    """Numbers `[n]`, NaN where they are missing, to standardized numbers."""

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        return {VALUES: tf.TensorSpec([None], tf.float32)}

    def encode(self, given: Mapping[str, tf.Tensor]) -> tf.Tensor:
        encoding, numbers = self.encoding, tf.cast(given[VALUES], tf.float64)
        if encoding.spec.encode.scale is Scale.LOG:
            numbers = tf.sign(numbers) * tf.math.log1p(tf.abs(numbers))
        found = (numbers - encoding.mean) / encoding.deviation
        found = tf.where(tf.math.is_nan(found), found, tf.clip_by_value(found, -_LARGEST, _LARGEST))
        return tf.cast(found, tf.float32)


class BinEncoder(ValueEncoder):
    """Numbers `[n]`, NaN where they are missing, to the rows of their bins."""

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        return {VALUES: tf.TensorSpec([None], tf.float32)}

    def encode(self, given: Mapping[str, tf.Tensor]) -> tf.Tensor:
        numbers, bounds = given[VALUES], self.encoding.bounds
        bins = tf.ones_like(numbers, tf.int32)
        if bounds:
            bins += tf.searchsorted(tf.constant(bounds, tf.float64), tf.cast(numbers, tf.float64), side="right")
        return tf.where(tf.math.is_nan(numbers), schema.UNKNOWN_ID, bins)


class TimeEncoder(ValueEncoder):
    """Times of the log's unit `[n]` to hours or days of its time zone, as `features/times.py` finds them."""

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        return {VALUES: tf.TensorSpec([None], tf.int64)}

    def __init__(self, encoding: Encoding) -> None:
        super().__init__(encoding)
        self._zone = zone_table(encoding.timezone)

    def encode(self, given: Mapping[str, tf.Tensor]) -> tf.Tensor:
        times, zone = given[VALUES], self._zone
        seconds = times // PER_SECOND[TimestampUnit(self.encoding.unit)]
        blocks = tf.clip_by_value(seconds, zone.first, zone.last) // zone.block_seconds
        repeated = zone.cycle_from + (blocks - zone.cycle_from) % zone.cycle
        blocks = tf.where(blocks >= zone.cycle_from + zone.cycle, repeated, blocks)
        ahead = tf.gather(tf.constant(zone.offsets), tf.searchsorted(tf.constant(zone.starts), blocks, "right") - 1)
        local = seconds % (7 * 86_400) + ahead
        if self.encoding.spec.kind is Kind.HOUR_OF_DAY:
            found = 1 + local % 86_400 // 3600
        else:
            found = 1 + (local // 86_400 + 3) % 7
        return tf.where(tf.equal(times, MISSING[tf.int64]), schema.UNKNOWN_ID, tf.cast(found, tf.int32))


class AgeEncoder(ValueEncoder):
    """Ages of behaviours at the request `[n]`, in the log's unit, to the rows of their doublings."""

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        return {VALUES: tf.TensorSpec([None], tf.int64)}

    def encode(self, given: Mapping[str, tf.Tensor]) -> tf.Tensor:
        ages = given[VALUES]
        return tf.where(tf.equal(ages, MISSING[tf.int64]), schema.UNKNOWN_ID, age_rows(ages))


class VectorEncoder(ValueEncoder):
    """Vectors `[n, D]`, NaN where they are missing, to float16."""

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        return {VALUES: tf.TensorSpec([None, self.encoding.dimension], tf.float32)}

    def encode(self, given: Mapping[str, tf.Tensor]) -> tf.Tensor:
        vectors = given[VALUES]
        kept = tf.clip_by_value(vectors, -_LARGEST_FLOAT16, _LARGEST_FLOAT16)
        return tf.cast(tf.where(tf.math.is_nan(vectors), vectors, kept), tf.float16)


def encoder_of(feature: Declared, path: Path) -> ValueEncoder:
    """Returns the encoder of a feature; `path` is for the file of its vocabulary."""
    encoding = feature.stored.encoding
    spec = encoding.spec
    if spec.kind is Kind.TIME_SINCE:
        return AgeEncoder(encoding)
    if spec.kind in TIME_KINDS:
        return TimeEncoder(encoding)
    if spec.kind is Kind.NUMBER:
        return BinEncoder(encoding) if encoding.form is Form.IDS else NumberEncoder(encoding)
    match encoding.form:
        case Form.VECTORS:
            return VectorEncoder(encoding)
        case Form.LISTS:
            return ListEncoder(feature, path)
        case _:
            return CategoryEncoder(feature, path)


class ExampleInputs(tf.Module):
    """The inputs of user, context and candidate features, or of those of behaviours.

    Args:
        encoders: of the features.
        names: name of each feature -> its NAME in the names of its inputs, such as `user_NAME`.
    """

    def __init__(self, encoders: Iterable[ValueEncoder], names: Mapping[str, str]) -> None:
        super().__init__()
        self._encoders = {_input_name(encoder.encoding.spec, names): encoder for encoder in encoders}

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        """The inputs by name."""
        return self.specs_of(*Owner)

    def specs_of(self, *owners: Owner) -> dict[str, tf.TensorSpec]:
        """Returns the inputs of the features of some owners by name."""
        return {
            f"{name}{end}": spec
            for name, encoder in self._encoders.items()
            if encoder.encoding.spec.owner in owners
            for end, spec in encoder.specs.items()
        }

    def encode(
        self, given: Mapping[str, tf.Tensor], owners: Collection[Owner], num_rows: tf.Tensor, whose: str
    ) -> dict[str, Any]:
        """Returns the values of the features of some owners, as `FeatureColumns.call` takes them.

        Args:
            given: tensors like `specs`, and others.
            owners: of the features.
            num_rows: int32, how many values there must be.
            whose: what has the values, for errors.
        """
        found = {}
        for name, encoder in self._encoders.items():
            if encoder.encoding.spec.owner in owners:
                own = {end: given[f"{name}{end}"] for end in encoder.specs}
                found[encoder.encoding.spec.name] = encoder.encode(_checked(own, name, num_rows, whose))
        return found

    def missing(self, owner: Owner, num_rows: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the inputs of an owner's features by name, all of them missing.

        Args:
            owner: of the features.
            num_rows: int32, how many values of each.
        """
        found = {}
        for name, encoder in self._encoders.items():
            if encoder.encoding.spec.owner is owner:
                lists = LENGTHS in encoder.specs
                for end, spec in encoder.specs.items():
                    size = tf.zeros_like(num_rows) if lists and end != LENGTHS else num_rows
                    value = 0 if end == LENGTHS else MISSING.get(spec.dtype, np.nan)
                    found[f"{name}{end}"] = tf.fill([size, *spec.shape[1:]], tf.constant(value, spec.dtype))
        return found


class ItemValues(tf.Module):
    """The prepared values of a feature of items, in variables: a graph is limited to 2 GB.

    Args:
        stored: the feature.
    """

    def __init__(self, stored: StoredFeature) -> None:
        super().__init__()
        arrays = (stored.values, stored.offsets, stored.weights)
        self._values, self._offsets, self._weights = (
            None if array is None else tf.Variable(array, trainable=False) for array in arrays
        )

    def of(self, items: tf.Tensor) -> Any:
        """Returns the values of `items`, int32 `[n]`, as `FeatureColumns.call` takes them."""
        if self._offsets is None:
            return tf.gather(self._values, items)
        begins, ends = tf.gather(self._offsets, items), tf.gather(self._offsets, items + 1)
        index = tf.ragged.range(begins, ends).values
        weights = tf.zeros([0]) if self._weights is None else tf.gather(self._weights, index)
        return Lists(tf.gather(self._values, index), tf.cast(ends - begins, tf.int32), weights)


def inputs_in_manifest(declared: Iterable[Declared], names: Mapping[str, str]) -> list[FeatureInputs]:
    """Returns the descriptions of features for the manifest.

    Args:
        declared: the features. Those of items have inputs if they are categories.
        names: as of `ExampleInputs`.
    """
    found = []
    for feature in declared:
        encoding = feature.stored.encoding
        spec, is_list = encoding.spec, encoding.form is Form.LISTS
        dtype = _type_of(feature)
        if spec.owner is not Owner.ITEM:
            ends = [VALUES, LENGTHS, WEIGHTS] if spec.weights else [VALUES, LENGTHS] if is_list else [VALUES]
            inputs = [f"{_input_name(spec, names)}{end}" for end in ends]
        elif spec.kind is Kind.CATEGORY:
            inputs = [f"{side}_{names[spec.name]}" for side in ("history", "candidate")]
        else:
            inputs = []
        found.append(
            FeatureInputs(
                name=spec.name,
                owner=str(spec.owner),
                kind=str(spec.kind),
                type=_TYPE[dtype],
                inputs=inputs,
                missing=[] if is_list else MISSING.get(dtype, "NaN"),
                dimension=encoding.dimension if encoding.form is Form.VECTORS else 0,
                column="" if spec.trained else spec.column,  # trained vectors are given as ids
                weights=spec.weights,
                separator=spec.separator,
                unit=encoding.unit,
            )
        )
    return found


def input_names(features: Sequence[str], lists: Collection[str] = ()) -> dict[str, str]:
    """Returns, for each feature, the NAME in the names of its inputs, such as `history_NAME`.

    It is the feature's own name if TensorFlow allows it and no other input has it; otherwise a number is used.

    Args:
        features: names, each once.
        lists: those of them that have inputs for lengths and weights, too.
    """
    taken = {"item_ids", "lengths", "counts", "names"}
    names = {}

    def take(feature: str, name: str) -> bool:
        wanted = {f"{name.lower()}{end}" for end in ((VALUES, LENGTHS, WEIGHTS) if feature in lists else (VALUES,))}
        if wanted & taken:
            return False
        taken.update(wanted)
        names[feature] = name
        return True

    for feature in features:
        if re.fullmatch("[A-Za-z0-9_]+", feature):  # TensorFlow's rules
            take(feature, feature)
    for number, feature in enumerate(features):
        name = f"feature_{number}"
        while feature not in names and not take(feature, name):
            name += "_"
    return {feature: names[feature] for feature in features}


def _type_of(feature: Declared) -> tf.DType:
    """Returns the type of a feature's own values."""
    encoding = feature.stored.encoding
    if encoding.spec.kind in TIME_KINDS:
        return tf.int64
    if encoding.spec.kind is Kind.NUMBER or encoding.form is Form.VECTORS:
        return tf.float32
    if encoding.spec.trained and encoding.spec.owner is Owner.ITEM:
        return tf.float32
    of_trained_vectors = len(feature.ids) > 0 and pa.types.is_integer(feature.ids.type)
    return tf.int64 if encoding.integers or of_trained_vectors else tf.string


def _input_name(spec: FeatureSpec, names: Mapping[str, str]) -> str:
    return f"{spec.owner}_{names[spec.name]}"


def _checked(own: dict[str, tf.Tensor], name: str, num_rows: tf.Tensor, whose: str) -> dict[str, tf.Tensor]:
    """Returns a feature's inputs, and asserts that there is a value for each row."""
    counted = f"{name}{LENGTHS}" if LENGTHS in own else name
    num_given = tf.shape(own.get(LENGTHS, own[VALUES]))[0]
    rule = f"{counted} must have one value for each {whose}. Received:"
    checks = [tf.Assert(tf.equal(num_given, num_rows), [rule, num_given, "for", num_rows])]
    if LENGTHS in own:
        lengths, num_values = own[LENGTHS], tf.size(own[VALUES], tf.int64)
        fits = tf.reduce_all((lengths >= 0) & (lengths <= num_values)) & tf.equal(tf.reduce_sum(lengths), num_values)
        rule = f"{counted} must not be negative and must add up to the number of {name}. Received:"
        checks.append(tf.Assert(fits, [rule, lengths, "for", num_values]))
    if WEIGHTS in own:
        num_weights = tf.size(own[WEIGHTS])
        rule = f"{name}{WEIGHTS} and {name} must be as many. Received:"
        fits = tf.equal(num_weights, tf.size(own[VALUES]))
        checks.append(tf.Assert(fits, [rule, num_weights, tf.size(own[VALUES])]))
    with tf.control_dependencies(checks):
        return {end: tf.identity(tensor) for end, tensor in own.items()}
