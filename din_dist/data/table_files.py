"""Reads the files of a table that lies beside the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from din_dist import progress
from din_dist.data.column_readers import names_of, number_names
from din_dist.data.raw_columns import RawColumn
from din_dist.errors import InputError
from din_dist.tables.columns import Rows
from din_dist.tables.formats import Format, format_of
from din_dist.tables.record_batches import Layout, read_columns, require_columns
from din_dist.tables.sources import find_files


class TableFiles:
    """The files of a table.

    Args:
        source: a file, a folder or a glob.
        name: the table's name.
        keys: the columns that name a row.
        columns: the columns of features. A file may lack them.
        rows: where rows stand, if others were read before. None: the table is read alone.

    Raises:
        InputError: a file is missing or damaged.
    """

    def __init__(
        self, source: str, name: str, keys: Sequence[str], columns: Sequence[RawColumn], rows: Rows | None = None
    ) -> None:
        self.source, self.flag = source, f"--{name}_path"
        self.rows = rows or Rows(f"row of a table of {name}")
        files = find_files(source, self.flag, f"table of {name}").files
        self._form = format_of(files[0]) or Format.PARQUET
        names = list(dict.fromkeys([*keys, *names_of(columns)]))
        numbers, lists = number_names(columns, keys), names_of(columns)
        layouts = {file: Layout.of(file, self._form, names, numbers, lists) for file in files}
        self._layouts = {file: layout for file, layout in layouts.items() if layout}
        self._from_folders = set().union(*(layout.partition for layout in self._layouts.values()))
        self.anywhere = set().union(*(layout.names for layout in self._layouts.values()))

    def require(self, names: Sequence[str], remedy: str) -> None:
        """Refuses a file that lacks a column."""
        require_columns(self._layouts, names, remedy)

    def batches(self, names: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, Layout]]:
        """Yields the batches of all files; `rows` tells where each stands.

        Raises:
            InputError: the files have no rows.
        """
        before = self.rows.count
        for file, layout in self._layouts.items():
            self.rows.begin(file)
            for batch in filter(len, read_columns(file, self._form, layout, names)):
                progress.note()
                yield batch, layout
                self.rows.advance(batch.num_rows)
        if self.rows.count == before:
            raise InputError(f"{self.source}: a table must have rows. Received: none. Correct {self.flag}.")

    def is_text(self, name: str) -> bool:
        """Tells whether a column is read as text."""
        return self._form is Format.CSV or name in self._from_folders
