"""Checksums of prepared files. They find a byte that a disk has changed before anything is learned from it.

Each folder of arrays has a file `checksums.json`: name -> CRC-32 of the file, as eight hexadecimal digits. A folder of
an earlier version has none and is not checked.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from din_dist import progress
from din_dist.files import open_regular, read_record, write_text
from din_dist.text import parse_json

CHECKSUMS_FILE = "checksums.json"
_CHUNK_BYTES = 4 << 20


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files in `folder`, all of which must be complete."""
    write_found(folder, {path.name: checksum_of(path) for path in folder.iterdir() if path.is_file()})


def write_found(folder: Path, found: Mapping[str, str]) -> None:
    """Writes checksums that are known, by the name of the file."""
    in_order = {name: found[name] for name in sorted(found)}
    write_text(folder / CHECKSUMS_FILE, json.dumps(in_order, indent=1) + "\n")


def check(path: Path) -> None:
    """Compares a file with its checksum in `checksums.json` beside it.

    Raises:
        OSError: the file cannot be read.
        ValueError: its content has changed, or `checksums.json` is damaged.
    """
    try:
        known = parse_json(read_record(path.parent / CHECKSUMS_FILE))
    except FileNotFoundError:
        return
    if not isinstance(known, dict) or path.name not in known:
        raise ValueError(f"{CHECKSUMS_FILE} beside it does not know it")
    if checksum_of(path) != known[path.name]:
        raise ValueError("its content changed since it was prepared")


def checksum_of(path: Path) -> str:
    """Returns the CRC-32 of a regular file, as eight hexadecimal digits."""
    checksum = 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
            progress.note()
    return f"{checksum:08x}"
