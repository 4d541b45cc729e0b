"""Finds the columns of declared features in the rows to score, and reads their values.

A column has the name that the log's had, or the name of the export's input (`user_F`). Letters of shapes: R rows of a
batch, C candidates of all its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from din_dist.errors import InputError
from din_dist.features.spec import OF_EXAMPLES, TIME_KINDS, Kind, Owner
from din_dist.features.times import PER_SECOND, TimestampUnit
from din_dist.serving.manifest import FeatureInputs, Manifest
from din_dist.serving.own_values import own_values, with_missing
from din_dist.tables.feature_columns import ValueField
from din_dist.tables.reader import TableReader
from din_dist.tables.survey import names_of
from din_dist.tables.values import IdValues, ListValues, VectorValues

_LAST_SECOND = 253_402_300_799  # of the year 9999


@dataclasses.dataclass(frozen=True)
class FeatureColumn:
    """A feature of the model, and the column of the rows that has it."""

    feature: FeatureInputs
    field: ValueField

    @property
    def is_time(self) -> bool:
        """True for features that are made from the time of a row."""
        return self.feature.kind in TIME_KINDS and self.feature.owner != Owner.HISTORY

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return self.field.columns


def find_behaviour_features(manifest: Manifest, file: Path) -> list[FeatureColumn]:
    """Returns the features of behaviours that a table with histories has. Each column has the name of an input."""
    present = names_of(file)
    found = []
    for feature in manifest.features_of(Owner.HISTORY):
        name = feature.inputs[0]
        if name in present:
            kind = Kind.CATEGORY if feature.kind in TIME_KINDS else Kind(feature.kind)  # whole numbers, as ids are
            integers = feature.type == "integer"
            field = ValueField(name, kind, integers, feature.separator, in_lists=True, each="behaviour")
            found.append(FeatureColumn(feature, field))
    return found


def find_features(manifest: Manifest, file: Path, in_lists: bool, before: str = "") -> list[FeatureColumn]:
    """Returns the features of users, contexts and candidates that a table has.

    Args:
        manifest: of the export.
        file: a table whose columns stand for those of all.
        in_lists: a row has a list of candidates.
        before: the column of the time of a row, if it is known.

    Raises:
        InputError: a list has no weights.
    """
    present = names_of(file)
    data = manifest.settings.get("data")
    timestamp = data.get("timestamp_column", "timestamp") if isinstance(data, dict) else "timestamp"
    found = []
    for feature in manifest.features:
        if feature.owner not in OF_EXAMPLES:
            continue
        is_time = feature.kind in TIME_KINDS
        names = [before, timestamp, feature.inputs[0]] if is_time else [feature.column, feature.inputs[0]]
        name = next((name for name in names if name and name in present), None)
        if name is None:
            continue
        weights = ""
        if feature.weights:
            wanted = (feature.weights, feature.inputs[2])
            weights = next((weight for weight in wanted if weight in present), "")
            if not weights:
                raise InputError(
                    f"{file}: a list with weights needs both. Received: {name} without {feature.weights}. Add that "
                    "column, or drop the other."
                )
        field = ValueField(
            name=name,
            kind=Kind.CATEGORY if feature.kind == Kind.VECTOR and feature.type != "number" else Kind(feature.kind),
            integers=feature.type == "integer",
            separator=feature.separator,
            weights=weights,
            in_lists=in_lists and feature.owner == "candidate",
        )
        found.append(FeatureColumn(feature, field))
    return found


def given_features(
    table: TableReader, rows: pa.Table, first_row: int, columns: Sequence[FeatureColumn], counts: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Returns the values of each owner's features by name, as `Bundle.rank_histories` takes them.

    Args:
        table: reads the file.
        rows: a batch of it.
        first_row: the row at which the batch begins.
        columns: of the features.
        counts: int64 `[R]`, the number of each row's candidates, or behaviours.

    Raises:
        InputError: a value breaks a rule; the text names file and row.
    """
    found: dict[str, dict[str, Any]] = {owner: {} for owner in (*OF_EXAMPLES, Owner.HISTORY)}
    for column in columns:
        if column.is_time:
            times = table.times(rows, first_row, column.field.name)
            found[column.feature.owner][column.feature.name] = _of_unit(times, column, table, first_row)
    others = [column for column in columns if not column.is_time]
    if not others:
        return found
    values = table.values(rows, first_row, [column.field for column in others], counts)
    for column, own in zip(others, values, strict=True):
        feature = column.feature
        if isinstance(own, VectorValues) and own.vectors.shape[1] != feature.dimension:
            own = _of_dimension(own, column, table, first_row)
        ids = own.ids if isinstance(own, (IdValues, ListValues)) else pa.array([], pa.large_string())
        if isinstance(own, (IdValues, ListValues)) and not len(ids):
            ids = pa.array([], pa.int64() if feature.type == "integer" else pa.large_string())
        found[feature.owner][feature.name] = own_values(own, with_missing(ids))
    return found


def _of_unit(times: np.ndarray, column: FeatureColumn, table: TableReader, first_row: int) -> np.ndarray:
    """Returns times; refuses those that have a finer unit than the log's, because no calendar has their year."""
    unit = column.feature.unit
    wrong = np.abs(times.astype(np.float64)) > _LAST_SECOND * PER_SECOND[TimestampUnit(unit)]
    if wrong.any():
        row = int(np.argmax(wrong))
        rule = f"{column.field.name} must hold times in {unit}, as the log of the model"
        raise table.reject(first_row + row, rule, str(times[row]))
    return times


def _of_dimension(values: VectorValues, column: FeatureColumn, table: TableReader, first_row: int) -> VectorValues:
    """Returns vectors of the model's length, if none is given; refuses others."""
    dimension = column.feature.dimension
    if not values.given.any():
        return VectorValues(np.full((len(values), dimension), np.nan, np.float16))
    rule = f"{column.field.name} must have {dimension} numbers, as in the log of the model"
    row = first_row if column.field.in_lists else first_row + int(np.argmax(values.given))
    raise table.reject(row, rule, f"{values.vectors.shape[1]} numbers")
