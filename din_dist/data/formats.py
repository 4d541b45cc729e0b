"""Files of events or rows as people have them: Parquet, CSV or JSON lines, compressed or not, read bit by bit.

Nothing is decided by a file's first rows, and nothing that a file says of itself can fill the memory.
"""

from __future__ import annotations

import contextlib
import csv
import enum
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from din_dist.errors import InputError
from din_dist.text import NestedTooDeeply, parse_json, shown

ROWS_PER_BATCH = 1 << 18
BYTES_PER_BATCH = 16 << 20  # of text, before decoding
MOST_LINE_BYTES = 64 << 20
_MOST_HEADER_BYTES = 1 << 20
HEAD_ROWS = 1000  # of JSON lines, all of whose fields are noted
_BLOCK_BYTES = 4 << 20
INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"  # as logs of integers write them: 007 is another id than 7
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Format(enum.StrEnum):
    PARQUET = "Parquet"
    CSV = "CSV"
    JSON_LINES = "JSON lines"


_SUFFIXES = {
    ".parquet": Format.PARQUET,
    ".pq": Format.PARQUET,
    ".csv": Format.CSV,
    ".jsonl": Format.JSON_LINES,
    ".ndjson": Format.JSON_LINES,
    ".json": Format.JSON_LINES,
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}  # of text
KNOWN = f"{', '.join(_SUFFIXES)}; text also with {', '.join(COMPRESSIONS)}"


def format_of(path: Path) -> Format | None:
    """Returns the format that the file's name promises, None if it is none of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    form = _SUFFIXES.get(suffixes[-2 if compressed else -1]) if len(suffixes) > compressed else None
    return None if compressed and form is Format.PARQUET else form


def compression_of(path: Path) -> str | None:
    """Returns how the file is compressed, by its name: a value of `COMPRESSIONS`, or None."""
    return COMPRESSIONS.get(path.suffix.lower())


@contextlib.contextmanager
def reading(file: Path, form: Format, locate: Callable[[], str] = str) -> Iterator[None]:
    """Turns whatever a reader raises about a damaged file into one line; `locate` finds the row, once it is needed."""
    try:
        if not file.stat().st_size:
            raise InputError(f"{file}: a log must have events. Received: an empty file. Give another, or delete it.")
        yield
    except PermissionError as error:
        raise InputError(f"{file}: must be readable. Received: {error.strerror}. Give rights to read it.") from error
    except (pa.ArrowException, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        detail = " ".join(str(error).split())[:300]
        raise InputError(
            f"{file}{locate()}: must be {form} from end to end. Received: {detail}. "
            "Correct the row; if the file was cut off, write it again."
        ) from error


# --- Text. ---


def open_stream(file: Path) -> pa.NativeFile:
    """Opens a file's content, decompressed and without a byte order mark."""
    stream = _decompressed(file)
    if stream.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK:
        return stream
    stream.close()
    return _decompressed(file)


def _decompressed(file: Path) -> pa.NativeFile:
    compression = compression_of(file)
    if compression == "xz":  # which Arrow does not know
        return pa.PythonFile(lzma.open(file), "r")
    return pa.input_stream(str(file), compression=compression)


def blocks_of_lines(file: Path) -> Iterator[bytes]:
    """Yields a text file's content in pieces of some MiB that end with an end of line; one is added at the end.

    Raises:
        ValueError: a line is longer than `MOST_LINE_BYTES`.
    """
    with open_stream(file) as stream:
        rest = stream.read(_BLOCK_BYTES)
        while rest:
            head, found, tail = rest.rpartition(b"\n")
            if found:
                yield head + found
                rest = tail
            if len(rest) > MOST_LINE_BYTES:
                raise ValueError(f"a line of more than {MOST_LINE_BYTES >> 20} MiB")
            block = stream.read(_BLOCK_BYTES)
            if not block:
                break
            rest += block
        if rest:
            yield rest + b"\n"


def csv_names(file: Path) -> list[str]:
    """Returns the columns that a CSV file's header names.

    Raises:
        ValueError: the header is no text, or too long.
    """
    with open_stream(file) as stream:
        head = stream.read(_MOST_HEADER_BYTES)
    line, found, _ = head.partition(b"\n")
    if not found and len(head) == _MOST_HEADER_BYTES:
        raise ValueError(f"a header of more than {_MOST_HEADER_BYTES >> 20} MiB")
    return next(csv.reader([line.decode()]), [])


def csv_reader(file: Path, names: Sequence[str], threads: bool = True, **options: Any) -> Iterator[pa.RecordBatch]:
    """Reads every column as text: what a file's first rows look like is no promise about the rest."""
    return pyarrow.csv.open_csv(
        open_stream(file),
        pyarrow.csv.ReadOptions(block_size=BYTES_PER_BATCH, use_threads=threads),
        pyarrow.csv.ParseOptions(newlines_in_values=True, **options),
        pyarrow.csv.ConvertOptions(
            include_columns=list(names),
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        ),
    )


def csv_row_of_wrong_width(file: Path, names: Sequence[str]) -> str:
    """Finds the row that made a reader fail, as a piece of an error's text."""
    found: list[int] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        found.append(row.number)
        return "error"

    with contextlib.suppress(pa.ArrowException, OSError, EOFError):
        for _ in csv_reader(file, names, threads=False, invalid_row_handler=note):
            pass
    return f", row {found[0] - 1}" if found and found[0] else ""  # Arrow counts the header


# --- JSON lines. ---

_ARROW_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64(), type(None): pa.null()}
_PYTHON_TYPES: dict[pa.DataType, list[type]] = {
    pa.string(): [str],
    pa.bool_(): [bool],
    pa.int64(): [int],
    pa.float64(): [int, float],
}


def json_types(file: Path, wanted: Sequence[str]) -> tuple[dict[str, pa.DataType], list[str]]:
    """Returns the fields of a file of JSON lines, with the type of the first value that is not null.

    These are the fields of the first rows, and the `wanted` ones wherever they begin; none where there are no rows.
    Also returns which of these are in none of the first rows.

    Raises:
        InputError: a line is no JSON object.
        ValueError: a line is too long, or the file cannot be decompressed.
    """
    types: dict[str, pa.DataType] = {}
    late: list[str] = []

    def missing() -> list[str]:
        return [name for name in wanted if types.get(name, pa.null()) == pa.null()]

    for number, line in _lines_to_look_at(file, missing):
        fields = json_fields(file, number, line)
        for name in fields if number <= HEAD_ROWS else [name for name in wanted if name in fields]:
            if name not in types and number > HEAD_ROWS:
                late.append(name)
            if types.get(name, pa.null()) == pa.null():
                types[name] = _ARROW_TYPES.get(type(fields[name]), pa.null())
    return types, late


def _lines_to_look_at(file: Path, missing: Callable[[], list[str]]) -> Iterator[tuple[int, bytes]]:
    """Yields the first rows, and of the others those that may have one of the fields that are still `missing`."""
    number = 0
    for block in blocks_of_lines(file):
        keys = _written(missing())
        if number >= HEAD_ROWS and not keys:
            return
        if number >= HEAD_ROWS and not any(key in block for key in keys):
            number += _num_rows(block)
            continue
        for line in block.split(b"\n"):
            if not line.strip():
                continue
            number += 1
            if number <= HEAD_ROWS or any(key in line for key in keys):
                yield number, line
                keys = _written(missing())


def _num_rows(block: bytes) -> int:
    """Counts the lines that are not blank."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    short = np.flatnonzero(ends - starts < 8)  # only these can be blank, or nearly
    blank = sum(not block[starts[line] : ends[line]].strip() for line in short)
    long_blank = block.count(b"        ") and sum(not line.strip() for line in block.split(b"\n")[:-1]) - blank
    return len(ends) - blank - long_blank


def _written(names: Sequence[str]) -> list[bytes]:
    """Returns how fields' names may stand in a line: as they are, or with the escapes that encoders use."""
    keys = [json.dumps(name, ensure_ascii=escaped) for name in names for escaped in (False, True)]
    keys += [re.sub(r"(?<=\\u)[0-9a-f]{4}", lambda match: match[0].upper(), key) for key in keys]
    keys += [key.replace("/", r"\/") for key in keys]
    return [key.encode(errors="surrogatepass") for key in dict.fromkeys(keys)]


def json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each row, from 1, and its fields; slowly. Blank lines are no rows."""
    number = 0
    for block in blocks_of_lines(file):
        for line in block.split(b"\n"):
            if line.strip():
                number += 1
                yield number, json_fields(file, number, line)


def json_fields(file: Path, number: int, line: bytes) -> dict[str, Any]:
    """Returns what is in a line.

    Raises:
        InputError: it is no JSON object.
    """
    received = line.decode(errors="replace").strip()[:100]
    try:
        fields = parse_json(line)
    except NestedTooDeeply as error:
        fields, received = None, str(error)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise InputError(
            f"{file}, row {number}: each line must be one JSON object. Received: {received}. "
            "Correct the line; if the file was cut off, write it again."
        )
    return fields


def json_reader(file: Path, types: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """Reads the fields that `types` names."""
    return pyarrow.json.open_json(
        open_stream(file),
        pyarrow.json.ReadOptions(block_size=BYTES_PER_BATCH),
        pyarrow.json.ParseOptions(explicit_schema=pa.schema(types.items()), unexpected_field_behavior="ignore"),
    )


def json_row_of_wrong_type(file: Path, types: dict[str, pa.DataType]) -> str:
    """Finds the row that made a reader fail, as a piece of an error's text."""
    with contextlib.suppress(OSError, EOFError, lzma.LZMAError):  # cut off: there is no such row
        for row, fields in json_rows(file):
            for name, kind in types.items():
                value = fields.get(name)
                fits = type(value) in _PYTHON_TYPES.get(kind, [])
                if value is not None and not (fits and is_64_bits(value)):
                    return f", row {row} ({name}={shown(value)})"
    return ""


def is_64_bits(value: object) -> bool:
    """Tells whether a value is no integer, or one that fits 64 bits, signed."""
    return not isinstance(value, int) or -(2**63) <= value < 2**63
