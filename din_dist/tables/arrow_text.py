"""Arrow arrays of text: what they hold, and how they are joined."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def is_text(kind: pa.DataType) -> bool:
    """Tells whether a type is one of Arrow's types of text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_utf8(column: pa.Array) -> bool:
    """Tells whether all text of a column is UTF-8, which Arrow believes of every file that claims it."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def has_empty(column: pa.Array) -> bool:
    """Tells whether a value of a text column is empty."""
    return pc.min(pc.binary_length(column)).as_py() == 0


def without_empty(column: pa.Array) -> pa.Array:
    """Returns a text column with nulls in place of empty values."""
    if not has_empty(column):
        return column
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)


def join(*parts: pa.Array | str, separator: str = "") -> pa.Array:
    """Concatenates texts row by row, as large_string: Arrow wants one type."""
    kind = pa.large_string()
    large = [pa.scalar(part, kind) if isinstance(part, str) else part.cast(kind) for part in (*parts, separator)]
    return pc.binary_join_element_wise(*large)


def content(lines: pa.Array) -> memoryview:
    """Returns the bytes of all texts of a column, concatenated, without a copy."""
    if not len(lines):
        return memoryview(b"")
    _, offsets, text = lines.buffers()
    width = np.int64 if pa.types.is_large_string(lines.type) else np.int32
    ends = np.frombuffer(offsets, width)[lines.offset : lines.offset + len(lines) + 1]
    return memoryview(text)[ends[0] : ends[-1]] if text is not None else memoryview(b"")
