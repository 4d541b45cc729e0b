"""JSON lines: the fields of a file and their types, lines as values or as text, and the line that broke a reader."""

from __future__ import annotations

import contextlib
import json
import lzma
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from din_dist.errors import InputError
from din_dist.tables import arrow_text, text_files
from din_dist.tables.formats import is_64_bits
from din_dist.tables.storage import File
from din_dist.tables.text_files import BYTE_ORDER_MARK, blocks_of_lines, not_utf8, open_stream
from din_dist.text import NestedTooDeeply, parse_json, printable, shown

LINE = "line"  # the column of whole lines
HEAD_ROWS = 1000  # rows whose fields are all noted
_LARGE_NUMBER = re.compile(rb"[eE]\+?[0-9]{3}|[0-9]{308}")
# A name in which an ASCII character has an escape; the bounds keep the search linear.
_ESCAPED_KEY = re.compile(rb'\\u00[2-7][0-9a-fA-F][^"\\]{0,200}(?:\\.[^"\\]{0,200}){0,20}"\s*:')
_ARROW_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64(), type(None): pa.null()}
_UNKNOWN = (pa.null(), pa.list_(pa.null()))  # where only nulls and empty lists were seen
_KINDS = {pa.string(): "text", pa.bool_(): "true or false", pa.int64(): "integers", pa.float64(): "numbers"}
_PYTHON_TYPES: dict[pa.DataType, list[type]] = {
    pa.string(): [str],
    pa.bool_(): [bool],
    pa.int64(): [int],
    pa.float64(): [int, float],
}


# --- The fields of a file. ---


def field_types(
    file: File, wanted: Sequence[str], lists: Collection[str] = ()
) -> tuple[dict[str, pa.DataType], list[str]]:
    """Returns the fields of a file, each with the type of its first value that is not null, and the late ones.

    The fields are those of the first `HEAD_ROWS` rows, and the wanted ones wherever they begin. A late field is in none
    of the first rows. A file without rows has no fields.

    Args:
        file: the file to look at.
        wanted: the fields to look for in all rows.
        lists: the fields that may hold lists.

    Raises:
        InputError: a line is not a JSON object, or not UTF-8.
        ValueError: a line is too long, or the file cannot be decompressed.
    """
    types: dict[str, pa.DataType] = {}
    late: list[str] = []

    def missing() -> list[str]:
        return [name for name in wanted if types.get(name, pa.null()) in _UNKNOWN]

    for number, line in _lines_to_look_at(file, missing):
        fields = parse_line(file, number, line)
        for name in fields if number <= HEAD_ROWS else [name for name in wanted if name in fields]:
            if name not in types and number > HEAD_ROWS:
                late.append(name)
            if types.get(name, pa.null()) in _UNKNOWN:
                found = _type_of(fields[name], name in lists)
                types[name] = types.get(name, found) if found == pa.null() else found
    return types, late


def _type_of(value: Any, may_be_list: bool) -> pa.DataType:
    if not may_be_list or not isinstance(value, list):
        return _ARROW_TYPES.get(type(value), pa.null())
    first = next((part for part in value if part is not None), None)
    return pa.list_(_ARROW_TYPES.get(type(first), pa.null()))


def _lines_to_look_at(file: File, missing: Callable[[], list[str]]) -> Iterator[tuple[int, bytes]]:
    """Yields the first rows, and each later row that may have one of the fields that are still `missing`."""
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


# --- Lines. ---


def parse_line(file: File, number: int, line: bytes) -> dict[str, Any]:
    """Returns the fields of a line.

    Args:
        file: the file it is from, for an error's text.
        number: its row, from 1.
        line: its text.

    Raises:
        InputError: the line is not a JSON object, or not UTF-8.
    """
    text, deep = _decoded(file, number, line), ""
    try:
        fields = parse_json(text)
    except NestedTooDeeply as error:
        fields, deep = None, str(error)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        received = deep or printable(text.strip()[:100])
        raise InputError(
            f"{file}, row {number}: each line must be one JSON object. Received: {received}. "
            "Correct the line; if the file was cut off, write it again."
        )
    return fields


def _decoded(file: File, number: int, line: bytes) -> str:
    if line.lstrip().startswith(BYTE_ORDER_MARK):
        received = r"\ufeff" + printable(line.decode(errors="replace").strip()[1:100])
        raise InputError(
            f"{file}, row {number}: a byte order mark may only stand at the start of a file. Received: {received}. "
            "Remove it."
        )
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(f"{file}, row {number}", line, error) from error


def read_fields(file: File, types: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """Reads the fields that `types` names, each as a column of its type."""
    return pyarrow.json.open_json(
        open_stream(file),
        pyarrow.json.ReadOptions(block_size=text_files.BYTES_PER_BATCH),
        pyarrow.json.ParseOptions(explicit_schema=pa.schema(types.items()), unexpected_field_behavior="ignore"),
    )


def lines_of(file: File, block: bytes, row: int) -> pa.RecordBatch:
    """Returns the lines of a block that are not blank, as one column of text.

    Args:
        file: the file it is from, for an error's text.
        block: text that ends with an end of line.
        row: how many rows the file has before it.

    Raises:
        InputError: a line is not UTF-8.
    """
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    lines = pa.BinaryArray.from_buffers(pa.binary(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(block)])
    try:
        lines = lines.cast(pa.string())
    except pa.ArrowInvalid:
        for line in lines.to_pylist():
            row += bool(line.strip())
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise not_utf8(f"{file}, row {row}", line, error) from None
        raise
    lines = pc.utf8_trim(lines, characters=" \t\r\n")
    return pa.record_batch({LINE: lines.filter(pc.not_equal(lines, ""))})


def parse_lines(lines: pa.Array, schema: pa.Schema) -> pa.Table:
    """Parses one object a line into the fields of `schema`.

    Raises:
        pa.ArrowException: a line is not one object, or a value is of another type.
    """
    text = pa.py_buffer(arrow_text.content(arrow_text.join(lines, "\n")))
    found = pyarrow.json.read_json(
        pa.BufferReader(text),
        pyarrow.json.ReadOptions(block_size=text.size + 1, use_threads=False),
        pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    if len(found) != len(lines):  # Arrow takes two objects of one line for two rows
        raise pa.ArrowInvalid(f"{len(found)} objects in {len(lines)} lines")
    return found


# --- The line that broke a reader. ---


def find_fault(file: File, types: dict[str, pa.DataType]) -> str:
    """Looks, slowly, for the row that made a reader fail. Returns nothing if there is none, as in a file cut off.

    Raises:
        InputError: the row that was found, and what is wrong with it.
    """
    number = 0
    with contextlib.suppress(OSError, EOFError, lzma.LZMAError):
        for block in blocks_of_lines(file):
            for line in block.split(b"\n"):
                if line.strip():
                    number += 1
                    _check_row(file, number, line, types)
    return ""


def _check_row(file: File, number: int, line: bytes, types: dict[str, pa.DataType]) -> None:
    place = f"{file}, row {number}"
    fields = parse_line(file, number, line)
    twice = any(line.count(json.dumps(name, ensure_ascii=False).encode(errors="surrogatepass")) > 1 for name in types)
    if twice or b"\\" in line or _LARGE_NUMBER.search(line):  # otherwise there is nothing to find
        _check_as_arrow_does(place, line.decode().strip(), list(types))
    for name, kind in types.items():
        value = fields.get(name)
        if value is None:
            continue
        parts, of_part = ([value], kind) if not pa.types.is_list(kind) else (value, kind.value_type)
        fits = isinstance(parts, list) and all(_fits(part, of_part) for part in parts)
        if not fits:
            lists = "lists of " if pa.types.is_list(kind) else ""
            rule = f"all values of {name} must be {lists}{_KINDS.get(of_part, 'text, numbers, or true or false')}"
            alike = ", as the first one is" if of_part in _KINDS else ""
            raise InputError(f"{place}: {rule}{alike}. Received: {name}={shown(value)}. Write them alike.")
        if of_part == pa.int64() and not all(map(is_64_bits, parts)):
            raise InputError(f"{place}: integers must fit 64 bits. Received: {name}={shown(value)}. Make ids strings.")


def _fits(value: Any, kind: pa.DataType) -> bool:
    return value is None or type(value) in _PYTHON_TYPES.get(kind, [])


def _check_as_arrow_does(place: str, text: str, columns: list[str]) -> None:
    """Checks what Python's parser accepts and Arrow's does not."""
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
        received = f"half a surrogate pair, in {printable(text[:100])}"
        raise InputError(f"{place}: text must be whole characters. Received: {received}. Correct the row.") from error
