"""Reads the values of declared features from batches of rows, by the rules by which the log was read.

Letters of shapes: R rows of a batch, C values, one for each row or for each element of the rows' lists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from din_dist.features.spec import Kind
from din_dist.tables import arrow_text, json_lines
from din_dist.tables.arrow_text import is_text, without_empty
from din_dist.tables.columns import Rows, plain
from din_dist.tables.value_columns import ListColumn, ValueRows, is_list, value_column
from din_dist.tables.values import ColumnValues, IdValues, ListValues


@dataclasses.dataclass(frozen=True)
class ValueField:
    """A column with the values of a feature.

    Attributes:
        name: of the column.
        kind: of the values, other than times.
        integers: ids are integers; otherwise strings.
        separator: separates the values of a list or vector that is written as text; empty: it is a JSON array.
        weights: the column of the weights of lists.
        in_lists: a row has a list of values, one for each of its candidates, or of what `each` says.
        each: what has a value, for the texts of errors.
    """

    name: str
    kind: Kind
    integers: bool = False
    separator: str = ""
    weights: str = ""
    in_lists: bool = False
    each: str = "candidate"

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [name for name in (self.name, self.weights) if name]

    @property
    def json_types(self) -> dict[str, pa.DataType]:
        """The type of each column in JSON lines."""
        ids = pa.int64() if self.integers else pa.string()
        kinds = {
            Kind.CATEGORY: ids,
            Kind.NUMBER: pa.float64(),
            Kind.CATEGORIES: pa.string() if self.separator else pa.list_(ids),
            Kind.VECTOR: pa.string() if self.separator else pa.list_(pa.float64()),
        }
        found = {self.name: kinds[self.kind]}
        if self.weights:
            found[self.weights] = pa.string() if self.separator else pa.list_(pa.float64())
        return {name: pa.list_(kind) for name, kind in found.items()} if self.in_lists else found


class ValueReader:
    """Reads the values of features in one file.

    Args:
        path: the file, for the texts of errors.
        in_text: values are written as text, as in CSV.
        list_separator: separates the elements of a row's list of candidates that is written as text.
    """

    def __init__(self, path: Path, in_text: bool, list_separator: str = "") -> None:
        self._path, self._in_text, self._separator = path, in_text, list_separator

    def read(
        self, columns: Mapping[str, pa.Array], field: ValueField, first_row: int, counts: np.ndarray | None = None
    ) -> ColumnValues:
        """Returns the values of a field, C of them.

        Args:
            columns: the columns of the field by name, `[R]` each.
            field: what to read.
            first_row: the row of the file at which the batch begins.
            counts: int64 `[R]`, the number of each row's candidates; None: a value for each row.

        Raises:
            InputError: a value breaks a rule; the text names file and row.
        """
        rows = Rows("row")
        rows.begin(self._path)
        rows.advance(first_row)
        found = {name: plain(columns[name]) for name in field.columns}
        if field.in_lists and counts is not None:
            found = {name: self._flat(found[name], name, field, rows, counts) for name in found}
            rows = ValueRows(rows)
            rows.begin_batch(np.repeat(np.arange(len(counts)), counts))
        reader = value_column(field.kind, field.name, rows, field.separator, field.weights)
        if isinstance(reader, ListColumn) and field.weights:
            reader.add_weighted(found[field.name], found[field.weights])
        else:
            reader.add(found[field.name])
        values = reader.finish(self._in_text and field.integers)
        if isinstance(values, (IdValues, ListValues)):
            return self._of_type(values, field, rows)
        return values

    def _flat(self, column: pa.Array, name: str, field: ValueField, rows: Rows, counts: np.ndarray) -> pa.Array:
        """Returns the elements of the rows' lists, concatenated. A missing list has missing elements."""
        if is_text(column.type):
            column = without_empty(column)
            if self._separator:
                column = pc.split_pattern(column, self._separator)
            else:
                column = self._parsed(column, name, field, rows)
        if pa.types.is_null(column.type):
            return pa.nulls(int(counts.sum()))
        if not is_list(column.type):
            rule = f"{name} must hold lists, one value for each {field.each}"
            raise rows.reject(rows.count, rule, f"{column.type}", f"Write lists, as of the {field.each}s.")
        column = column.cast(pa.large_list(column.type.value_type))
        given = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
        wrong = (given != counts) & (given >= 0)
        if wrong.any():
            row = int(np.argmax(wrong))
            rule = f"{name} must have one value for each of the {counts[row]} {field.each}s"
            raise rows.reject(rows.count + row, rule, f"{given[row]} values", "Correct the row.")
        values = column.flatten()
        if (given == counts).all():
            return values
        index = np.full(int(counts.sum()), -1)
        index[np.repeat(given >= 0, counts)] = np.arange(len(values))
        return values.take(pa.array(index, mask=index < 0))

    def _parsed(self, cells: pa.Array, name: str, field: ValueField, rows: Rows) -> pa.Array:
        text = pc.replace_substring_regex(cells.fill_null("null"), r"[\r\n]", " ")
        try:
            schema = pa.schema({"v": field.json_types[name]})
            return json_lines.parse_lines(arrow_text.join('{"v":', text, "}"), schema).column("v").combine_chunks()
        except pa.ArrowException as error:
            detail = " ".join(str(error).split())[:100]
            rule = f"{name} must be a JSON array with one value for each {field.each}, from here on"
            raise rows.reject(rows.count, rule, detail, "Correct the cell.") from error

    def _of_type(self, values: IdValues | ListValues, field: ValueField, rows: Rows) -> ColumnValues:
        """Returns ids as the type of the model's, or refuses them."""
        if not len(values.ids) or pa.types.is_integer(values.ids.type) is field.integers:
            return values
        if not field.integers and (self._in_text or field.separator):  # "7" in text is a string as well
            return dataclasses.replace(values, ids=values.ids.cast(pa.large_string()))
        row = int(np.argmax(values.given))
        kind = "integers" if field.integers else "strings"
        rule = f"{field.name} must hold {kind}, as in the log of the model"
        raise rows.reject(rows.count + row, rule, values.shown(row), "Correct it, or convert the column.")
