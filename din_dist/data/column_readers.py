"""Reads the columns of declared features batch by batch, from the log or from a table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import pyarrow as pa

from din_dist.data.raw_columns import RawColumn
from din_dist.features.spec import Kind
from din_dist.tables.columns import Rows
from din_dist.tables.record_batches import Layout
from din_dist.tables.value_columns import ListColumn, value_column
from din_dist.tables.values import ColumnValues


def number_names(columns: Iterable[RawColumn], others: Collection[str]) -> list[str]:
    """Returns the columns that are read as numbers alone.

    Args:
        columns: the columns of features.
        others: the columns that are read for other purposes.
    """
    columns = list(columns)
    as_ids = {column.column for column in columns if column.kind in (Kind.CATEGORY, Kind.CATEGORIES)} | set(others)
    numbers = [column.column for column in columns if column.kind in (Kind.NUMBER, Kind.VECTOR)]
    numbers += [column.weights for column in columns]
    return [name for name in dict.fromkeys(numbers) if name and name not in as_ids]


def names_of(columns: Iterable[RawColumn]) -> list[str]:
    """Returns the names of the columns of a file, each once."""
    return list(dict.fromkeys(name for column in columns for name in column.names))


class ColumnReaders:
    """Readers of some columns of one log or table, which are given batch after batch."""

    def __init__(self, columns: Sequence[RawColumn], rows: Rows) -> None:
        self.readers = {
            column: value_column(column.kind, column.column, rows, column.separator, column.weights)
            for column in columns
        }

    def add(self, batch: pa.RecordBatch, layout: Layout) -> None:
        """Takes the next batch. Columns that it lacks have no values there.

        Raises:
            InputError: a value breaks a rule.
        """

        def values(name: str) -> pa.Array:
            return batch.column(name) if name in batch.schema.names else pa.nulls(batch.num_rows)

        for column, reader in self.readers.items():
            if column.weights and isinstance(reader, ListColumn):
                reader.add_weighted(values(column.column), values(column.weights))
            else:
                reader.add(values(column.column), column.column in layout.partition)

    def finish(self, is_text: Callable[[str], bool]) -> dict[RawColumn, ColumnValues]:
        """Returns the values of all batches; `is_text` tells of a column's name that text was read."""
        return {column: reader.finish(is_text(column.column)) for column, reader in self.readers.items()}
