"""Estimates how much memory a log takes, and finds what cannot go by way of files yet."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

import pyarrow.parquet as pq

from din_dist.data.builders.event_log import EventLogConfig
from din_dist.tables.formats import Format, format_of
from din_dist.tables.storage import File, readable

_ROW_BYTES, _VALUE_BYTES = 64, 24  # of a row, and beside it of each of its values
_TEXT_FACTOR, _PACKED_FACTOR = 4, 32  # of the size of a text file, and of one that is compressed
_PACKED = (".gz", ".bz2", ".zst", ".xz")


def memory_need(config: EventLogConfig, files: Iterable[File]) -> int:
    """Returns about how many bytes the rows of a log take in memory while it is prepared, rather too many than too few.

    Args:
        config: names the columns. Of Parquet files, the values of these are counted.
        files: of the log. Those that cannot be read count as empty: reading them says what is wrong.
    """
    names = {*config.columns.names, *(name for column in config.features.columns for name in column.names)}
    return sum(_need(file, names) for file in files)


def _need(file: File, names: set[str]) -> int:
    if format_of(file) is not Format.PARQUET:
        try:
            size = file.stat().st_size
        except OSError:
            return 0
        return size * (_PACKED_FACTOR if PurePath(file.name).suffix.lower() in _PACKED else _TEXT_FACTOR)
    try:
        with pq.ParquetFile(readable(file)) as parquet:
            found = parquet.metadata
            groups = [found.row_group(number) for number in range(found.num_row_groups)]
    except Exception:  # whatever is wrong: reading the file says it
        return 0
    values = 0
    for group in groups:
        columns = [group.column(number) for number in range(group.num_columns)]
        values += sum(column.num_values for column in columns if column.path_in_schema.split(".")[0] in names)
    return found.num_rows * _ROW_BYTES + values * _VALUE_BYTES


def why_in_memory(config: EventLogConfig) -> str:
    """Returns what of a log's settings cannot go by way of files yet; empty if all can."""
    if config.behaviours:
        return "--behaviours_path"
    if config.features.offers_path:
        return "--offers_path"
    if config.forgets.is_any:
        return "forgetting"
    return "--extend" if config.extends else ""
