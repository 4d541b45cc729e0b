"""Maps a log's own ids to dense ids, by a lookup table inside a SavedModel.

The ids are in a text file, one a line, so that the graph stays small whatever their number. TensorFlow reads such a
file by line, drops carriage returns and refuses empty lines. A vocabulary that has an empty id, or one with a line
break, is therefore escaped. Each id is then escaped before it is looked up.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf

from din_dist import schema

IDS_AT_ONCE = 1_000_000  # most ids that are Python objects at once
_EMPTY = rb"\e"  # no other id becomes this, because their backslashes are followed by a backslash, n or r
_ESCAPES = ((b"\\", rb"\\"), (b"\n", rb"\n"), (b"\r", rb"\r"))


class IdTable(tf.Module):
    """A lookup table from a log's own ids to dense ids.

    Args:
        ids: `[V]`, strings or integers, each once. Entry i belongs to dense id i + 1.
        path: of the text file to write, which is needed until the SavedModel is written.
    """

    def __init__(self, ids: pa.ChunkedArray, path: Path) -> None:
        super().__init__()
        self.dtype = tf.int64 if pa.types.is_integer(ids.type) else tf.string
        self.escaped = self.dtype == tf.string and _needs_escapes(ids)
        self.table = None  # TensorFlow has no empty tables
        if len(ids):
            with path.open("wb") as file:
                for first in range(0, len(ids), IDS_AT_ONCE):
                    file.write(b"".join(self._lines(ids[first : first + IDS_AT_ONCE])))
            words = self.dtype == tf.string
            source = tf.lookup.TextFileInitializer(
                str(path),
                self.dtype,
                tf.lookup.TextFileIndex.WHOLE_LINE if words else 0,
                tf.int64,
                tf.lookup.TextFileIndex.LINE_NUMBER,
                vocab_size=len(ids),
            )
            self.table = tf.lookup.StaticHashTable(source, default_value=schema.UNKNOWN_ID - 1)

    def dense_ids(self, ids: tf.Tensor) -> tf.Tensor:
        """Returns dense ids: int32, of the shape of `ids`; `schema.UNKNOWN_ID` for ids that are not in the table."""
        if self.table is None:
            return tf.zeros_like(ids, tf.int32)
        if self.escaped:
            ids = _escaped(ids)
        return tf.cast(self.table.lookup(ids), tf.int32) + 1

    def _lines(self, ids: pa.ChunkedArray) -> list[bytes]:
        if self.dtype == tf.int64:
            return [b"%d\n" % number for number in ids.to_pylist()]
        words = ids.cast(pa.large_binary()).to_pylist()
        if self.escaped:
            for plain, escape in _ESCAPES:
                words = [word.replace(plain, escape) for word in words]
            words = [word or _EMPTY for word in words]
        return [word + b"\n" for word in words]


def _needs_escapes(ids: pa.ChunkedArray) -> bool:
    words = ids.cast(pa.large_binary())
    return any(
        pc.any(found, min_count=0).as_py()
        for found in (
            pc.equal(pc.binary_length(words), 0),
            pc.match_substring(words, "\n"),
            pc.match_substring(words, "\r"),
        )
    )


def _escaped(words: tf.Tensor) -> tf.Tensor:
    for plain, escape in _ESCAPES:
        pattern, rewrite = (text.replace(b"\\", rb"\\") for text in (plain, escape))
        words = tf.strings.regex_replace(words, pattern, rewrite)
    return tf.where(tf.equal(words, b""), tf.constant(_EMPTY), words)
