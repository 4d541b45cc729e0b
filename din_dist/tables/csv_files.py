"""CSV: the header, the columns as text, and the row that broke a reader."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv

from din_dist.errors import InputError
from din_dist.tables import text_files
from din_dist.tables.storage import File
from din_dist.tables.text_files import not_utf8, open_stream
from din_dist.text import shown

_MOST_HEADER_BYTES = 1 << 20
_TEXT = pa.string()


def column_names(file: File) -> list[str]:
    """Returns the columns that a file's header names.

    Raises:
        InputError: there is no header, or it is not UTF-8.
        ValueError: the header is too long.
    """
    with open_stream(file) as stream:
        head = stream.read(_MOST_HEADER_BYTES)
    line, found, _ = head.partition(b"\n")
    if not found and len(head) == _MOST_HEADER_BYTES:
        raise ValueError(f"a header of more than {_MOST_HEADER_BYTES >> 20} MiB")
    if not line.strip():
        received = "an empty first line" if head.strip() else "an empty file"
        raise InputError(f"{file}: the first line must name the columns. Received: {received}. Correct the file.")
    try:
        return next(csv.reader([line.decode()]), [])
    except UnicodeDecodeError as error:
        raise not_utf8(f"{file}, the first line", line, error) from error


def read_columns(
    file: File, names: Sequence[str], threads: bool = True, kind: pa.DataType = _TEXT, **options: Any
) -> Iterator[pa.RecordBatch]:
    """Reads every column as text, because a file's first rows promise nothing about the rest.

    Args:
        file: a CSV file.
        names: the columns to read.
        threads: let Arrow decode in threads.
        kind: the type of all columns.
        options: more options of `pyarrow.csv.ParseOptions`.
    """
    try:
        return pyarrow.csv.open_csv(
            open_stream(file),
            pyarrow.csv.ReadOptions(block_size=text_files.BYTES_PER_BATCH, use_threads=threads),
            pyarrow.csv.ParseOptions(newlines_in_values=True, **options),
            pyarrow.csv.ConvertOptions(
                include_columns=list(names),
                column_types=dict.fromkeys(names, kind),
                strings_can_be_null=True,
                null_values=[""],
            ),
        )
    except pa.ArrowInvalid:
        if _is_header_only(file):
            return iter(())
        raise


def _is_header_only(file: File) -> bool:
    """Tells whether a file is a header without an end of line, which Arrow does not take for CSV."""
    with open_stream(file) as stream:
        head = stream.read(_MOST_HEADER_BYTES)
    return b"\n" not in head and b"\r" not in head and len(head) < _MOST_HEADER_BYTES


def find_fault(file: File, names: Sequence[str]) -> str:
    """Finds the row of wrong width that made a reader fail, and returns it as a piece of an error's text.

    Raises:
        InputError: a row is not UTF-8; that is the fault then.
    """
    found: list[int] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        found.append(row.number)
        return "error"

    rows = 0
    with contextlib.suppress(pa.ArrowException, OSError, EOFError):
        for batch in read_columns(file, names, threads=False, kind=pa.binary(), invalid_row_handler=note):
            for name in names:
                _require_utf8(file, rows, name, batch.column(name))
            rows += len(batch)
    return f", row {found[0] - 1}" if found and found[0] else ""  # Arrow counts the header


def _require_utf8(file: File, rows_before: int, name: str, column: pa.Array) -> None:
    try:
        column.cast(pa.string())
    except pa.ArrowInvalid:
        for row, value in enumerate(column.to_pylist(), start=rows_before + 1):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{file}, row {row}: text must be UTF-8. Received: {name}={shown(value)}. "
                    "Convert the file to UTF-8."
                ) from error
