"""The formats of files, by their names, and the error for a file that does not keep its format."""

from __future__ import annotations

import contextlib
import csv
import enum
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from din_dist.errors import InputError
from din_dist.tables.storage import File, changed_while_read

INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"  # as logs of integers write them: 007 is another id than 7


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


def format_of(path: File) -> Format | None:
    """Returns the format that a file's name promises, or None if it is not a supported one."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    form = _SUFFIXES.get(suffixes[-2 if compressed else -1]) if len(suffixes) > compressed else None
    return None if compressed and form is Format.PARQUET else form


def compression_of(path: File) -> str | None:
    """Returns how a file is compressed, by its name: a value of `COMPRESSIONS`, or None."""
    return COMPRESSIONS.get(path.suffix.lower())


@contextlib.contextmanager
def reading(file: File, form: Format, locate: Callable[[], str] = str) -> Iterator[None]:
    """Turns the errors of a reader about a damaged file into one line.

    Args:
        file: the file that is read in the block.
        form: its format.
        locate: finds the row after an error. Returns it as a piece of the text, or raises an `InputError` that says
            more.

    Raises:
        InputError: the file is empty, damaged or cannot be read.
    """
    try:
        before = file.stat()
        if not before.st_size:
            raise InputError(f"{file}: a log must have events. Received: an empty file. Give another, or delete it.")
        yield
    except PermissionError as error:
        raise InputError(f"{file}: must be readable. Received: {error.strerror}. Give rights to read it.") from error
    except (pa.ArrowException, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        if not isinstance(file, Path) and file.stat() != before:
            raise changed_while_read(file) from error
        detail = " ".join(str(error).split())[:300]
        if form is Format.JSON_LINES:
            detail = re.sub(r",? in row \d+", "", detail)  # Arrow counts from 0, in each of its blocks
        raise InputError(
            f"{file}{locate()}: must be {form} from end to end. Received: {detail}. "
            "Correct the row; if the file was cut off, write it again."
        ) from error


def shown_names(names: Sequence[str]) -> str:
    """Returns columns' names as a sentence for an error, in which tabs, ends of lines and blanks are visible."""
    told = ", ".join(name if name.isprintable() and name == name.strip() and name else repr(name) for name in names)
    separator = next((sign for sign in "\t;|" if len(names) == 1 and sign in names[0]), None)
    comma = f" Columns of CSV must be separated by commas, not by {separator!r}." if separator else ""
    return f"columns {told or 'none'}.{comma}"


def is_64_bits(value: object) -> bool:
    """Tells whether a value is an integer that fits 64 bits, signed, or no integer at all."""
    return not isinstance(value, int) or -(2**63) <= value < 2**63
