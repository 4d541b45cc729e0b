"""Small logs with declared features, written in every format and prepared."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.config import DataConfig
from din_dist.features.declarations import parse_declarations
from din_dist.features.spec import to_text

Row = dict[str, Any]


# Features of behaviours whose log has the columns kind and quantity.
OF_BEHAVIOURS = """
[how]
of = "history"
kind = "category"
column = "kind"

[pieces]
of = "history"
kind = "number"
column = "quantity"
encode = "quantiles:4"

[age]
of = "history"
kind = "time_since"
from = "timestamp"
"""


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Lists become JSON arrays."""

    def cell(value: Any) -> Any:
        return "" if value is None else json.dumps(value) if isinstance(value, list) else value

    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows([cell(value) for value in row.values()] for row in rows)


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    ".parquet": write_parquet,
    ".csv": write_csv,
    ".jsonl": write_jsonl,
}


def write_table(path: Path, rows: Sequence[Row]) -> Path:
    """Writes rows in the format that the file's name promises."""
    WRITERS[path.suffix](path, rows)
    return path


def config_for(log: Path, declarations: str, **settings: Any) -> DataConfig:
    """The settings of a log with declared features, whose prepared data lies beside it."""
    specs = parse_declarations(declarations, log.parent / "features.toml")
    settings = {"data_path": str(log), "data_dir": str(log.parent / "prepared"), **settings}
    return DataConfig(dataset="event_log", feature_declarations=to_text(specs), **settings)
