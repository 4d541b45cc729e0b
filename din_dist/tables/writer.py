"""Writes the rows of a table again with results added as columns, in the format and compression of the input.

Letters of shapes: R rows of a batch, V values in all of their lists.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import dataclasses
import gzip
import io
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from din_dist.errors import InputError
from din_dist.tables import json_lines
from din_dist.tables.arrow_text import content, join
from din_dist.tables.formats import COMPRESSIONS, Format, compression_of, format_of
from din_dist.tables.record_batches import column_names, whole
from din_dist.text import printable

_ROW_GROUP_ROWS = 1 << 16
_ROW_GROUP_BYTES = 32 << 20
_SPECIAL_IN_CSV = '[",\r\n]'
_SPECIAL_IN_JSON = r'[\x00-\x1f"\\]'
_SUFFIXES = {Format.PARQUET: ".parquet", Format.CSV: ".csv", Format.JSON_LINES: ".jsonl"}


@dataclasses.dataclass(frozen=True)
class Added:
    """A column to write.

    Attributes:
        name: its name.
        values: numbers or strings `[V]`.
        offsets: int64 `[R + 1]`, where each row's list begins; None if each row has one value.
    """

    name: str
    values: pa.Array
    offsets: np.ndarray | None = None

    def array(self) -> pa.Array:
        """Returns the values, or lists of them, one a row `[R]`."""
        return self.values if self.offsets is None else pa.LargeListArray.from_arrays(self.offsets, self.values)

    def type(self) -> pa.DataType:
        """Returns the type that Parquet has of the column."""
        return self.values.type if self.offsets is None else pa.list_(self.values.type)


_Results = Iterator[tuple[pa.Table, list[Added]]]


def suffix_of(path: Path) -> str:
    """Returns the end of the name of a file that `write_results` writes for the input `path`."""
    form, ending = format_of(path), path.suffix.lower()
    if form is None:
        raise ValueError(path)
    return _SUFFIXES[form] + (ending if ending in COMPRESSIONS else "")


def write_results(path: Path, stream: BinaryIO, results: _Results, added: Sequence[Added]) -> None:
    """Writes rows with columns added; the same rows make the same bytes.

    Args:
        path: the file that the rows are from; its format and compression are kept.
        stream: where to write.
        results: batches of whole rows, as `TableReader.read` yields them, each with its columns to add.
        added: empty columns, which give the names and types.

    Raises:
        InputError: a row of JSON lines has a column of that name.
    """
    if format_of(path) is Format.PARQUET:
        _write_parquet(path, stream, results, added)
        return
    with _compressed(stream, compression_of(path)) as target:
        if format_of(path) is Format.CSV:
            target.write(_csv_header(path, added))
        for rows, columns in results:
            lines = _csv_lines(rows, columns) if format_of(path) is Format.CSV else _json_lines(path, rows, columns)
            target.write(content(lines))


def _write_parquet(path: Path, stream: BinaryIO, results: _Results, added: Sequence[Added]) -> None:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
    for column in added:
        schema = schema.append(pa.field(column.name, column.type()))
    with pq.ParquetWriter(stream, schema) as writer:
        group: list[pa.Table] = []
        for rows, columns in results:
            for column in columns:
                rows = rows.append_column(column.name, column.array().cast(column.type()))
            group.append(rows)
            full = sum(map(len, group)) >= _ROW_GROUP_ROWS
            if full or sum(table.nbytes for table in group) >= _ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(group).cast(schema))
                group.clear()
        if group:
            writer.write_table(pa.concat_tables(group).cast(schema))


# --- Compression. ---


def _compressed(stream: BinaryIO, compression: str | None) -> contextlib.AbstractContextManager[Any]:
    """Returns a stream that compresses into `stream`: the same rows make the same bytes."""
    match compression:
        case None:
            return contextlib.nullcontext(stream)
        case "gzip":
            return gzip.GzipFile("", "wb", fileobj=stream, mtime=0)  # without a name and a time
        case "bz2":
            return bz2.BZ2File(stream, "wb")
        case "xz":
            return lzma.LZMAFile(stream, "wb")
        case _:
            return pa.CompressedOutputStream(pa.PythonFile(_KeptOpen(stream), "w"), compression)


class _KeptOpen:
    """A stream that stays open when Arrow closes what it wrote to."""

    def __init__(self, stream: BinaryIO) -> None:
        self.write, self.flush, self.closed = stream.write, stream.flush, False

    def close(self) -> None:
        """Does nothing."""


# --- CSV. ---


def _csv_header(path: Path, added: Sequence[Added]) -> bytes:
    names = [*column_names(path, Format.CSV), *(column.name for column in added)]
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(names)
    return line.getvalue().encode()


def _csv_lines(rows: pa.Table, columns: list[Added]) -> pa.Array:
    """Returns each row with its end of line, as large_string `[R]`."""
    cells = [_quoted(whole(column).fill_null("")) for column in rows.columns]
    cells += [_quoted(_as_text(column, quote=False)) for column in columns]
    return join(join(*cells, separator=","), "\n")


def _quoted(cells: pa.Array) -> pa.Array:
    special = pc.match_substring_regex(cells, _SPECIAL_IN_CSV)
    if not pc.any(special).as_py():
        return cells
    doubled = pc.replace_substring(cells, '"', '""')
    return pc.if_else(special, join('"', doubled, '"'), cells.cast(pa.large_string()))


# --- JSON lines. ---


def _json_lines(path: Path, rows: pa.Table, columns: list[Added]) -> pa.Array:
    """Returns each row with its end of line, as large_string `[R]`."""
    lines = whole(rows.column(json_lines.LINE)).cast(pa.large_binary())
    _check_names(path, lines, columns)
    parts = [pc.binary_slice(lines, 0, -1).cast(pa.large_string())]  # without the closing brace
    for column in columns:
        parts += [f",{json.dumps(column.name)}:", _as_text(column, quote=True)]
    return join(*parts, "}\n")


def _check_names(path: Path, lines: pa.Array, columns: list[Added]) -> None:
    """Refuses a row that has one of the columns already; only the columns of the first row are known before."""
    for column in columns:
        named = pc.match_substring(lines, json.dumps(column.name))
        for line in lines.filter(named).to_pylist() if pc.any(named).as_py() else ():
            if column.name in json_lines.parse_line(path, 1, line):
                row = printable(line.decode()[:100])
                raise InputError(
                    f"{path}: {column.name!r} is to be added. Received: the row {row}. Rename or drop its own."
                )


def _as_text(column: Added, quote: bool) -> pa.Array:
    """Returns numbers and ids as JSON writes them, lists in brackets.

    Args:
        column: the column to write.
        quote: quote strings that are not in a list, too.
    """
    text = column.values
    if pa.types.is_string(text.type):
        if quote or column.offsets is not None:
            text = _json_strings(text)
    else:
        text = text.cast(pa.string())
    if column.offsets is None:
        return text
    lists = pa.LargeListArray.from_arrays(column.offsets, text.cast(pa.large_string()))
    return join("[", pc.binary_join(lists, pa.scalar(",", pa.large_string())), "]")


def _json_strings(values: pa.Array) -> pa.Array:
    special = pc.match_substring_regex(values, _SPECIAL_IN_JSON)
    if pc.any(special).as_py():
        return pa.array([json.dumps(value, ensure_ascii=False) for value in values.to_pylist()], pa.string())
    return join('"', values, '"')
