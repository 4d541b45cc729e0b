"""Raw values of declared features, as the user's files have them, stored beside the records of prepared data.

FOLDER/raw_features/
    columns.json             what each file is, and counts
    KEY-NAME.npy             the arrays of `Values`, one row a user, an event, or an item with item 0
    KEY-told.npy             which events tell their owner's value, where not all do
    KEY.parquet              column "id": the own ids of a vocabulary
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.data.checksums import write_checksums
from din_dist.data.event_store import FileState, map_array, reading_prepared
from din_dist.data.raw_columns import RAW_DIR, RawColumn, RawFeature, TableCounts, raw_vocabulary_path
from din_dist.features.spec import Kind
from din_dist.files import read_record, write_text
from din_dist.tables.values import IdValues, ListValues, NumberValues, Values, VectorValues
from din_dist.text import parse_json

_COLUMNS_FILE = "columns.json"


def write_raw(folder: Path, features: Sequence[RawFeature], tables: Mapping[str, TableCounts]) -> None:
    """Writes raw values below the folder of a prepared version. Nothing else writes there."""
    into = folder / RAW_DIR
    into.mkdir()
    for feature in features:
        arrays, ids = _arrays(feature.values)
        if feature.told is not None:
            arrays["told"] = feature.told
        for name, array in arrays.items():
            np.save(into / f"{feature.column.key}-{name}.npy", array)
        if ids is not None:
            pq.write_table(pa.table({"id": ids}), raw_vocabulary_path(folder, feature.column))
    known = {
        "columns": {
            feature.column.key: {**feature.column.to_json(), "extra": feature.extra, "told": feature.told is not None}
            for feature in features
        },
        "tables": {name: dataclasses.asdict(counts) for name, counts in tables.items()},
    }
    write_text(into / _COLUMNS_FILE, json.dumps(known, indent=1) + "\n")
    write_checksums(into)


def open_raw(folder: Path, column: RawColumn, files: dict[Path, FileState]) -> RawFeature:
    """Maps the values of a column into memory. The ids of a vocabulary are read only when they are needed.

    Args:
        folder: the folder of the prepared version.
        column: what to open.
        files: the state of each file, which is noted here.

    Raises:
        InputError: a file is missing or damaged.
    """
    path = folder / RAW_DIR / _COLUMNS_FILE
    with reading_prepared(path):
        facts = parse_json(read_record(path))["columns"][column.key]
        extra, has_told = int(facts["extra"]), bool(facts["told"])

    def load(name: str) -> np.ndarray:
        return np.asarray(map_array(folder / RAW_DIR / f"{column.key}-{name}.npy", files))

    told = load("told") if has_told else None
    values: Values
    match column.kind:
        case Kind.CATEGORY:
            values = IdValues(load("codes"), pa.array([], pa.int64()))
        case Kind.NUMBER:
            values = NumberValues(load("numbers"))
        case Kind.CATEGORIES:
            weights = load("weights") if column.weights else None
            values = ListValues(load("codes"), load("offsets"), pa.array([], pa.int64()), weights)
        case _:
            values = VectorValues(load("vectors"))
    return RawFeature(column, values, told, extra)


def raw_ids(folder: Path, column: RawColumn) -> pa.ChunkedArray:
    """Reads the own ids of a column's vocabulary from the disk.

    Raises:
        InputError: the file is missing or damaged.
    """
    with reading_prepared(raw_vocabulary_path(folder, column)) as path:
        return pq.read_table(path, columns=["id"]).column("id")


def read_tables(folder: Path) -> dict[str, TableCounts]:
    """Returns how the tables of items and users fit the events, by `items` and `users`.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / RAW_DIR / _COLUMNS_FILE
    if not path.exists():
        return {}
    with reading_prepared(path):
        return {name: TableCounts(**counts) for name, counts in parse_json(read_record(path))["tables"].items()}


def _arrays(values: Values) -> tuple[dict[str, np.ndarray], pa.Array | None]:
    match values:
        case IdValues():
            return {"codes": values.codes}, values.ids
        case NumberValues():
            return {"numbers": values.numbers}, None
        case ListValues():
            weights = {} if values.weights is None else {"weights": values.weights}
            return {"codes": values.codes, "offsets": values.offsets, **weights}, values.ids
        case VectorValues():
            return {"vectors": values.vectors}, None
    raise TypeError(type(values))
