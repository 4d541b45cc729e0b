"""The columns of declared features in an export, whatever the features are called."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import tensorflow as tf

from din_dist.features.spec import Owner
from din_dist.layers.feature_columns import FeatureColumns

_PLAIN = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_./-]*(:0)?")


class ExportedColumns:
    """`FeatureColumns` whose variables TensorFlow can save.

    Variables are named after features, in any language, but TensorFlow saves plain names only. Where a name is not
    plain, the columns are copied.

    Args:
        columns: of the trained model.
    """

    def __init__(self, columns: FeatureColumns) -> None:
        names = [encoding.spec.name for encoding in columns.encodings]
        self._plain_names = {name: name for name in names}
        self._columns = columns
        if not all(is_plain(weight.value) for weight in columns.weights):
            self._plain_names = {name: f"feature_{number}" for number, name in enumerate(names)}
            self._columns = _renamed(columns, self._plain_names)

    @property
    def variables(self) -> list[tf.Variable]:
        """All variables of the columns."""
        return [weight.value for weight in self._columns.weights]

    def of(self, values: Mapping[str, Any], owners: Collection[Owner] = tuple(Owner)) -> tf.Tensor:
        """Returns the columns of the features of some owners; see `FeatureColumns.call`."""
        return self._columns({self._plain_names[name]: value for name, value in values.items()}, owners=owners)


def is_plain(variable: tf.Variable) -> bool:
    """Tells whether TensorFlow can save a variable of this name."""
    return _PLAIN.fullmatch(variable.name) is not None


def _renamed(columns: FeatureColumns, names: Mapping[str, str]) -> FeatureColumns:
    """Returns a copy whose features have the given names."""
    encodings = [
        dataclasses.replace(encoding, spec=dataclasses.replace(encoding.spec, name=names[encoding.spec.name]))
        for encoding in columns.encodings
    ]
    config = columns.get_config()
    copy = FeatureColumns(encodings, config["default_width"], config["seed"], name="renamed")
    for weight, own in zip(copy.weights, columns.weights, strict=True):
        weight.assign(own.value)
    return copy
