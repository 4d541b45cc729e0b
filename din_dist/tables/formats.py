"""Files of events or rows as people have them: Parquet, CSV or JSON lines, compressed or not, read bit by bit.

Nothing is decided by a file's first rows, and nothing that a file says of itself can fill the memory.
"""

from __future__ import annotations

import contextlib
import csv
import enum
import json
import lzma
import math
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
_TEXT = pa.string()
_LARGE_NUMBER = re.compile(rb"[eE]\+?[0-9]{3}|[0-9]{308}")
INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"  # as logs of integers write them: 007 is another id than 7
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# A name in which an ASCII character has an escape; the bounds keep the search linear.
_ESCAPED_KEY = re.compile(rb'\\u00[2-7][0-9a-fA-F][^"\\]{0,200}(?:\\.[^"\\]{0,200}){0,20}"\s*:')


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
    """Turns whatever a reader raises about a damaged file into one line.

    `locate` finds the row, once it is needed: it returns the row as a piece of the text, or raises an `InputError` that
    says more.
    """
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
        if form is Format.JSON_LINES:
            detail = re.sub(r",? in row \d+", "", detail)  # Arrow counts from 0, in each of its blocks
        raise InputError(
            f"{file}{locate()}: must be {form} from end to end. Received: {detail}. "
            "Correct the row; if the file was cut off, write it again."
        ) from error


# --- Text. ---


def open_stream(file: Path) -> pa.NativeFile:
    """Opens a file's content, decompressed and without a byte order mark.

    Raises:
        InputError: it is UTF-16.
    """
    stream = _decompressed(file)
    head = stream.read(len(_BYTE_ORDER_MARK))
    if head == _BYTE_ORDER_MARK:
        return stream
    stream.close()
    if head.startswith(_UTF_16_MARKS) or b"\0" in head[:2]:
        raise InputError(f"{file}: text must be UTF-8. Received: UTF-16. Write the file anew, as UTF-8.")
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
        InputError: there is no header, or it is not UTF-8.
        ValueError: it is too long.
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
        raise _not_utf8(f"{file}, the first line", line, error) from error


def shown_names(names: Sequence[str]) -> str:
    """Returns columns' names as a sentence for an error's text, in which tabs, ends of lines and blanks are seen."""
    told = ", ".join(name if name.isprintable() and name == name.strip() and name else repr(name) for name in names)
    separator = next((sign for sign in "\t;|" if len(names) == 1 and sign in names[0]), None)
    comma = f" Columns of CSV must be separated by commas, not by {separator!r}." if separator else ""
    return f"columns {told or 'none'}.{comma}"


def _not_utf8(place: str, text: bytes, error: UnicodeDecodeError) -> InputError:
    received = shown(text[max(0, error.start - 20) : error.start + 20])
    return InputError(f"{place}: text must be UTF-8. Received: {received}. Write the file anew, as UTF-8.")


def csv_reader(
    file: Path, names: Sequence[str], threads: bool = True, kind: pa.DataType = _TEXT, **options: Any
) -> Iterator[pa.RecordBatch]:
    """Reads every column as text: what a file's first rows look like is no promise about the rest."""
    try:
        return pyarrow.csv.open_csv(
            open_stream(file),
            pyarrow.csv.ReadOptions(block_size=BYTES_PER_BATCH, use_threads=threads),
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


def _is_header_only(file: Path) -> bool:
    """Tells whether a header without an end of line is all; Arrow takes that for no CSV."""
    with open_stream(file) as stream:
        head = stream.read(_MOST_HEADER_BYTES)
    return b"\n" not in head and b"\r" not in head and len(head) < _MOST_HEADER_BYTES


def csv_fault(file: Path, names: Sequence[str]) -> str:
    """Finds the row of wrong width that made a reader fail, as a piece of an error's text.

    Raises:
        InputError: instead, a row is not UTF-8.
    """
    found: list[int] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        found.append(row.number)
        return "error"

    rows = 0
    with contextlib.suppress(pa.ArrowException, OSError, EOFError):
        for batch in csv_reader(file, names, threads=False, kind=pa.binary(), invalid_row_handler=note):
            for name in names:
                _require_utf8(file, rows, name, batch.column(name))
            rows += len(batch)
    return f", row {found[0] - 1}" if found and found[0] else ""  # Arrow counts the header


def _require_utf8(file: Path, rows_before: int, name: str, column: pa.Array) -> None:
    try:
        column.cast(pa.string())
    except pa.ArrowInvalid:
        for row, value in enumerate(column.to_pylist(), start=rows_before + 1):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{file}, row {row}: text must be UTF-8. Received: {name}={shown(value)}. Write the file anew, as "
                    "UTF-8."
                ) from error


# --- JSON lines. ---

_ARROW_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64(), type(None): pa.null()}
_KINDS = {pa.string(): "text", pa.bool_(): "true or false", pa.int64(): "integers", pa.float64(): "numbers"}
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
        InputError: a line is no JSON object, or not UTF-8.
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
        escapes = b"\\u00" in block and _ESCAPED_KEY.search(block) is not None
        if number >= HEAD_ROWS and not escapes and not any(key in block for key in keys):
            number += _num_rows(block)
            continue
        for line in block.split(b"\n"):
            if not line.strip():
                continue
            number += 1
            looked_at = number <= HEAD_ROWS or any(key in line for key in keys)
            if looked_at or (escapes and _ESCAPED_KEY.search(line)):
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


def json_fields(file: Path, number: int, line: bytes) -> dict[str, Any]:
    """Returns what is in a line.

    Raises:
        InputError: it is no JSON object, or not UTF-8.
    """
    text = _json_text(file, number, line)
    received = text.strip()[:100]
    try:
        fields = parse_json(text)
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


def _json_text(file: Path, number: int, line: bytes) -> str:
    if line.lstrip().startswith(_BYTE_ORDER_MARK):
        received = r"\ufeff" + line.decode(errors="replace").strip()[1:100]
        raise InputError(
            f"{file}, row {number}: a byte order mark may only stand at the start of a file. Received: {received}. "
            "Remove it."
        )
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{file}, row {number}", line, error) from error


def json_reader(file: Path, types: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """Reads the fields that `types` names."""
    return pyarrow.json.open_json(
        open_stream(file),
        pyarrow.json.ReadOptions(block_size=BYTES_PER_BATCH),
        pyarrow.json.ParseOptions(explicit_schema=pa.schema(types.items()), unexpected_field_behavior="ignore"),
    )


def json_fault(file: Path, types: dict[str, pa.DataType]) -> str:
    """Finds, slowly, the row that made a reader fail.

    Raises:
        InputError: naming it; nothing is raised if there is none, as where the file was cut off.
    """
    number = 0
    with contextlib.suppress(OSError, EOFError, lzma.LZMAError):
        for block in blocks_of_lines(file):
            for line in block.split(b"\n"):
                if line.strip():
                    number += 1
                    _check_json_row(file, number, line, types)
    return ""


def _check_json_row(file: Path, number: int, line: bytes, types: dict[str, pa.DataType]) -> None:
    place = f"{file}, row {number}"
    fields = json_fields(file, number, line)
    twice = any(line.count(json.dumps(name, ensure_ascii=False).encode(errors="surrogatepass")) > 1 for name in types)
    if twice or b"\\" in line or _LARGE_NUMBER.search(line):  # else there is nothing to find
        _check_what_python_takes(place, line.decode().strip(), list(types))
    for name, kind in types.items():
        value = fields.get(name)
        if value is None:
            continue
        if type(value) not in _PYTHON_TYPES.get(kind, []):
            rule = f"all values of {name} must be {_KINDS.get(kind, 'text, numbers, or true or false')}"
            alike = ", as the first one is" if kind in _KINDS else ""
            raise InputError(f"{place}: {rule}{alike}. Received: {name}={shown(value)}. Write them alike.")
        if kind == pa.int64() and not is_64_bits(value):
            raise InputError(f"{place}: integers must fit 64 bits. Received: {name}={shown(value)}. Make ids strings.")


def _check_what_python_takes(place: str, text: str, columns: list[str]) -> None:
    """Checks what Python's parser lets pass, and Arrow's does not."""
    outermost: list[tuple[str, Any]] = []
    large: list[str] = []

    def note_number(digits: str) -> float:
        if math.isinf(float(digits)):
            large.append(digits)
        return 0.0

    def note_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        outermost[:] = pairs  # the last call is that of the outermost object
        return dict(pairs)

    fields = json.loads(text, object_pairs_hook=note_names, parse_float=note_number)
    names = [name for name, _ in outermost]
    twice = next((name for name in columns if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{place}: a row must name a column once. Received: {twice!r} twice. Remove one.")
    if large:
        raise InputError(f"{place}: numbers must fit a float64. Received: {shown(large[0])}. Correct the row.")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        received = f"half a surrogate pair, in {text[:100]}"
        raise InputError(f"{place}: text must be whole characters. Received: {received}. Correct the row.") from error


def is_64_bits(value: object) -> bool:
    """Tells whether a value is no integer, or one that fits 64 bits, signed."""
    return not isinstance(value, int) or -(2**63) <= value < 2**63
