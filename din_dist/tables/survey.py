"""Counts the rows and bytes of a table before it is read."""

from __future__ import annotations

import dataclasses

import pyarrow.parquet as pq

from din_dist.errors import InputError
from din_dist.tables.formats import Format, format_of, reading
from din_dist.tables.record_batches import column_names, read_rows
from din_dist.tables.storage import File, readable

BATCH_BYTES = 8 << 20  # about what a batch of rows may take, as it is read
MOST_ROWS = 8192  # in a batch


@dataclasses.dataclass(frozen=True)
class Survey:
    """The columns and the size of one file, which was read through once: its text keeps its format to the end."""

    columns: tuple[str, ...]
    num_rows: int
    num_bytes: int  # uncompressed

    @property
    def rows_per_batch(self) -> int:
        """The rows of a batch, the same for every reader: the last digit of scores depends on them."""
        return max(1, min(MOST_ROWS, BATCH_BYTES * self.num_rows // max(1, self.num_bytes)))


def names_of(path: File) -> tuple[str, ...]:
    """Returns the names of a table's columns; of JSON lines those of the first row, if there is one.

    Raises:
        InputError: the file is damaged, or empty and not JSON lines.
    """
    form = _format(path)
    _require_content(path, form)
    return column_names(path, form)


def survey_table(path: File) -> Survey:
    """Reads a file through; of Parquet only the metadata.

    Raises:
        InputError: the file is damaged.
    """
    form, names = _format(path), names_of(path)
    num_rows = num_bytes = 0
    if form is Format.PARQUET:
        with reading(path, form), pq.ParquetFile(readable(path)) as file:
            found = file.metadata
            num_bytes = sum(found.row_group(number).total_byte_size for number in range(found.num_row_groups))
            return Survey(names, found.num_rows, num_bytes)
    for batch in read_rows(path, form):
        num_rows += len(batch)
        num_bytes += batch.nbytes
    return Survey(names, num_rows, num_bytes)


def _format(path: File) -> Format:
    if (form := format_of(path)) is None:
        raise ValueError(path)
    return form


def _require_content(path: File, form: Format) -> None:
    """Refuses an empty file, which names no columns. Of JSON lines it is a table without rows."""
    if form is not Format.JSON_LINES and not path.stat().st_size:
        raise InputError(
            f"{path}: a table must at least name its columns. Received: an empty file. Give another, or delete it."
        )
